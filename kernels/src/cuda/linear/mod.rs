//! `x * W^T` on packed weights: which arithmetic an operand asks for, and which kernels do it.

mod codes;
mod dense;
pub(crate) mod format;
mod fused;
mod gated;
pub(crate) mod hopper;
mod ordered;
mod path;

use std::ops::Range;
use std::sync::Arc;

use ctq_container::TILE;

use crate::cuda::Cuda;
use crate::cuda::buffer::{CudaBuffer, CudaOperand, OperandKind, Stored, table_of_floats};
use crate::cuda::device::{Address, Device, Store};
use crate::cuda::elementwise;
use crate::cuda::matrix::{CudaMatrix, Worth};
use crate::{Compute, KernelError};

pub(crate) use self::dense::{Scratches, scratch_bytes};
pub(crate) use self::fused::FusedProduct;
pub(crate) use self::gated::gated;
pub use self::path::LinearPath;
pub(crate) use self::path::{Bf16Path, path};

/// An operand as a matrix takes it: columns in the order of its tiles, fp8 codes as bytes or as f16.
pub(crate) struct Input<'a, M> {
    operand: &'a CudaOperand<M>,
    row: Row,
    /// The operand's values, where they are not its own.
    made: Option<M>,
}

/// Part of a result: f32 [rows of the input, stride], of which the first columns are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) address: Address,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
}

/// What becomes of the sums of a product, after they are divided.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Epilogue {
    /// f32, one a row of the matrix, is added.
    pub(crate) bias: Option<Address>,
    /// Another result is added; may be the one that is written.
    pub(crate) added: Option<Output>,
}

impl Output {
    /// All of `y`.
    fn of<D: Device>(y: &CudaBuffer<D::Memory>) -> Output {
        Output { address: y.address::<D>(), stride: y.width }
    }

    /// Everything from row `row` and column `column` on.
    fn from(self, row: usize, column: usize) -> Output {
        Output { address: self.address.offset((row * self.stride + column) * 4), ..self }
    }
}

impl<'a, M> Input<'a, M> {
    pub(crate) fn new<D: Device<Memory = M>>(
        device: &D,
        operand: &'a CudaOperand<M>,
        weight: &CudaMatrix<M>,
    ) -> Result<Input<'a, M>, KernelError> {
        let mut input = Input { operand, row: Row::of(operand), made: None };
        if codes::wants_halves(&operand.kind, weight)? {
            input.made = Some(codes::widened(device, operand)?);
            input.row.width = 2;
        }
        if let Some(permutation) = &weight.permutation {
            input.made = Some(ordered::permute(device, &input, permutation)?);
        }
        Ok(input)
    }

    pub(crate) fn rows(&self) -> usize {
        self.operand.rows
    }

    pub(crate) fn kind(&self) -> &OperandKind<M> {
        &self.operand.kind
    }

    /// Where row `row` of the values begins.
    pub(crate) fn values<D: Device<Memory = M>>(&self, row: usize) -> Address {
        let values = self.made.as_ref().unwrap_or(&self.operand.values);
        D::address(values).offset(row * self.row.bytes())
    }
}

/// A row of an operand's values in memory.
struct Row {
    elements: usize,
    /// Bytes of one element.
    width: usize,
}

impl Row {
    fn of<M>(x: &CudaOperand<M>) -> Row {
        let padded = x.k.next_multiple_of(TILE);
        match &x.kind {
            OperandKind::Bf16 | OperandKind::ScaledBf16 { .. } => Row { elements: padded, width: 2 },
            OperandKind::F32 | OperandKind::ScaledF32 { .. } => Row { elements: x.k, width: 4 },
            OperandKind::Codes { stored: Stored::Bytes, .. } => Row { elements: padded, width: 1 },
            OperandKind::Codes { stored: Stored::Halves, .. } => Row { elements: padded, width: 2 },
        }
    }

    fn bytes(&self) -> usize {
        self.elements * self.width
    }
}

/// Every row of `weight` for every row of `x`, plus the bias of the weight's own rows: [rows, weight's rows].
///
/// `compute` has become the operand's kind already.
pub(crate) fn linear<D: Device>(
    cuda: &Cuda<D>,
    x: &CudaOperand<D::Memory>,
    weight: &CudaMatrix<D::Memory>,
    bias: Option<&[f32]>,
    compute: Compute,
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    debug_assert!(agree(&x.kind, compute), "an operand of the other compute mode");
    let y = CudaBuffer::new(cuda.device(), x.rows, weight.rows.len())?;
    if !into(cuda, x, weight, bias, None, &y)? {
        let input = Input::new(cuda.device(), x, weight)?;
        product(cuda, &input, 0..x.rows, weight, 0..y.width, Output::of::<D>(&y))?;
        if let Some(bias) = bias {
            elementwise::add_bias(cuda.device(), &y, bias)?;
        }
    }
    Ok(y)
}

/// [`linear`], added to `sum`: each sum rounded.
pub(crate) fn linear_add<D: Device>(
    cuda: &Cuda<D>,
    sum: &mut CudaBuffer<D::Memory>,
    x: &CudaOperand<D::Memory>,
    weight: &CudaMatrix<D::Memory>,
    bias: Option<&[f32]>,
    compute: Compute,
) -> Result<(), KernelError> {
    assert_eq!((sum.rows, sum.width), (x.rows, weight.rows.len()), "shapes of a sum");
    if into(cuda, x, weight, bias, Some(Output::of::<D>(sum)), sum)? {
        return Ok(());
    }
    let y = linear(cuda, x, weight, bias, compute)?;
    elementwise::add(cuda.device(), sum, &y)
}

/// Writes a whole linear with a bias and what it is added to, which is `y` itself, in one go, where kernels do that for
/// this product.
fn into<D: Device>(
    cuda: &Cuda<D>,
    x: &CudaOperand<D::Memory>,
    weight: &CudaMatrix<D::Memory>,
    bias: Option<&[f32]>,
    added: Option<Output>,
    y: &CudaBuffer<D::Memory>,
) -> Result<bool, KernelError> {
    if y.len() == 0 {
        return Ok(false);
    }
    let to = Output::of::<D>(y);
    let Some(product) = fused_product(&x.kind, weight, 0..y.width, to)? else { return Ok(false) };
    let path = path(cuda, &x.kind, weight);
    if path == Bf16Path::Library && (bias.is_some() || added.is_none()) {
        // A library knows no bias between a product and what it is added to.
        return Ok(false);
    }
    let device = cuda.device();
    let input = Input::new(device, x, weight)?;
    let bias = bias.map(|bias| table_of_floats(device, bias)).transpose()?;
    let epilogue = Epilogue { bias: bias.as_ref().map(|bias| D::address(bias)), added };
    let (tokens, rows) = (0..x.rows, 0..y.width);
    match path {
        Bf16Path::Library => {
            dense::product(cuda, &input, tokens, weight, rows, (to, Store::Added), dense::CHUNKS)?;
        }
        Bf16Path::Hopper => hopper::product(device, &input, tokens, &product, epilogue)?,
        Bf16Path::Fused => fused::product(device, &input, tokens, &product, epilogue)?,
    }
    Ok(true)
}

/// [`linear`] for each pair of an operand and a matrix, in one launch where they are of one shape and scheme. Operands of
/// bf16 always go through the fused kernels, for tokens of an expert are few: which experts come together depends on the
/// batch and must not show.
pub(crate) fn linear_experts<D: Device>(
    cuda: &Cuda<D>,
    x: &[&CudaOperand<D::Memory>],
    weights: &[&CudaMatrix<D::Memory>],
    biases: &[Option<&[f32]>],
    compute: Compute,
) -> Result<Vec<CudaBuffer<D::Memory>>, KernelError> {
    let device = cuda.device();
    if x.iter().all(|x| matches!(x.kind, OperandKind::Bf16)) {
        return together(device, x, weights, biases);
    }
    let expert = |index: usize| match x[index].kind {
        OperandKind::Bf16 => {
            let one = index..index + 1;
            let mut one = together(device, &x[one.clone()], &weights[one.clone()], &biases[one])?;
            Ok(one.remove(0))
        }
        OperandKind::F32
        | OperandKind::Codes { .. }
        | OperandKind::ScaledBf16 { .. }
        | OperandKind::ScaledF32 { .. } => linear(cuda, x[index], weights[index], biases[index], compute),
    };
    (0..x.len()).map(expert).collect()
}

/// Products of bf16 operands on the fused kernels, in one launch where matrices are of one shape and scheme.
fn together<D: Device>(
    device: &D,
    x: &[&CudaOperand<D::Memory>],
    weights: &[&CudaMatrix<D::Memory>],
    biases: &[Option<&[f32]>],
) -> Result<Vec<CudaBuffer<D::Memory>>, KernelError> {
    let inputs = x.iter().zip(weights).map(|(x, weight)| Input::new(device, x, weight));
    let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
    let outputs = x.iter().zip(weights).map(|(x, weight)| CudaBuffer::new(device, x.rows, weight.rows.len()));
    let outputs = outputs.collect::<Result<Vec<_>, _>>()?;
    let biases = biases.iter().map(|bias| bias.map(|bias| table_of_floats(device, bias)).transpose());
    let biases: Vec<Option<Arc<D::Memory>>> = biases.collect::<Result<_, _>>()?;
    let product = |index: usize| {
        let (weight, y): (_, &CudaBuffer<D::Memory>) = (weights[index], &outputs[index]);
        let y = Output::of::<D>(y);
        let product =
            FusedProduct { weight, rows: 0..weight.rows.len(), worth: Worth::Operand, divisor: 1.0, y };
        (product, Epilogue { bias: biases[index].as_ref().map(|bias| D::address(bias)), added: None })
    };
    if fused::is_one_launch(weights) {
        fused::grouped(device, &inputs, &(0..x.len()).map(product).collect::<Vec<_>>())?;
    } else {
        for (index, input) in inputs.iter().enumerate() {
            let (product, epilogue) = product(index);
            fused::product(device, input, 0..input.rows(), &product, epilogue)?;
        }
    }
    Ok(outputs)
}

/// Rows `rows` of `weight`, from its own first, for `tokens` of the input.
pub(crate) fn product<D: Device>(
    cuda: &Cuda<D>,
    x: &Input<'_, D::Memory>,
    tokens: Range<usize>,
    weight: &CudaMatrix<D::Memory>,
    rows: Range<usize>,
    y: Output,
) -> Result<(), KernelError> {
    let device = cuda.device();
    if rows.is_empty() || tokens.is_empty() {
        return check(x.kind(), weight);
    }
    if let Some(product) = codes::takes(x.kind(), weight)? {
        return codes::product(cuda, x, tokens, weight, rows, &product, y);
    }
    let Some(product) = fused_product(x.kind(), weight, rows.clone(), y)? else {
        return ordered::product(device, x, tokens, weight, rows, y);
    };
    match path(cuda, x.kind(), weight) {
        Bf16Path::Library => dense::product(cuda, x, tokens, weight, rows, (y, Store::Over), dense::CHUNKS),
        Bf16Path::Hopper => hopper::product(device, x, tokens, &product, Epilogue::default()),
        Bf16Path::Fused => fused::product(device, x, tokens, &product, Epilogue::default()),
    }
}

/// Refuses operands that have no exact product with `weight`.
fn check<M>(kind: &OperandKind<M>, weight: &CudaMatrix<M>) -> Result<(), KernelError> {
    match kind {
        OperandKind::Bf16 | OperandKind::F32 => Ok(()),
        OperandKind::ScaledBf16 { activation, .. } | OperandKind::ScaledF32 { activation, .. } => {
            weight.weights().scaled(*activation)
        }
        OperandKind::Codes { activation, segment, .. } => {
            weight.weights().codes(*activation, *segment).map(|_| ())
        }
    }
}

/// What a product is on the fused kernels; `None` for operands of f32.
pub(crate) fn fused_product<'a, M>(
    kind: &OperandKind<M>,
    weight: &'a CudaMatrix<M>,
    rows: Range<usize>,
    y: Output,
) -> Result<Option<FusedProduct<'a, M>>, KernelError> {
    let (worth, divisor) = match kind {
        OperandKind::Bf16 => (Worth::Operand, 1.0),
        OperandKind::ScaledBf16 { activation, global } => {
            weight.weights().scaled(*activation)?;
            (Worth::Scaled, weight.global_scale * global)
        }
        OperandKind::F32 | OperandKind::Codes { .. } | OperandKind::ScaledF32 { .. } => return Ok(None),
    };
    Ok(Some(FusedProduct { weight, rows, worth, divisor, y }))
}

/// Whether an operand was prepared for this compute mode.
fn agree<M>(kind: &OperandKind<M>, compute: Compute) -> bool {
    match kind {
        OperandKind::Bf16 | OperandKind::ScaledBf16 { .. } => compute == Compute::Bf16,
        OperandKind::F32 | OperandKind::ScaledF32 { .. } => compute == Compute::F32,
        OperandKind::Codes { compute: prepared, .. } => compute == *prepared,
    }
}

#[cfg(all(test, feature = "emulated"))]
#[path = "../tests/linear.rs"]
mod tests;
