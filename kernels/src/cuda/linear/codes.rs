//! Products of codes on tensor cores: `kernels/cuda/linear_codes.cu` and `linear_codes_hopper.cu`. Integers have the CPU
//! backend's bits on either; sums of fp8 are made here in bf16 compute only, in an order of their own.
//! Segments that are no whole steps are left to [`ordered`](super::ordered).
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;

use bytemuck::NoUninit;
use ctq_container::TILE;
use ctq_model::matrix::Code;

use crate::cuda::Cuda;
use crate::cuda::buffer::{CudaOperand, OperandKind, Stored};
use crate::cuda::device::{Address, Arguments, Device, Queue, TensorElement, TensorMap, TensorTile};
use crate::cuda::linear::{Input, LinearPath, Output};
use crate::cuda::matrix::{CodeClass, CudaMatrix, MatrixArgs, Worth};
use crate::exact_product::Sums;
use crate::{Compute, KernelError};

/// Rows and tokens that one block covers: `CODES_ROWS`, `CODES_TOKENS`.
const ROWS: usize = 128;
const TOKENS: usize = 128;
/// Sums that one block of `sum_codes` makes.
const SUMS: usize = 8;
/// Codes that one block of `widen_e4m3` takes.
const WIDENED: usize = 256 * 16;
/// Instructions of one stage of Hopper's kernels: `STAGE_STEPS`.
const STEPS: usize = 4;

/// `CodesArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct CodesArgs {
    matrix: MatrixArgs,
    x: Address,
    scales: Address,
    offsets: Address,
    input_sums: Address,
    y: Address,
    m: u32,
    y_stride: u32,
    step: u32,
    segment: u32,
}

// SAFETY: as the structure of that name in code_sums.cuh.
unsafe impl Arguments for CodesArgs {}

/// `CodesHopperArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct CodesHopperArgs {
    x: TensorMap,
    codes: CodesArgs,
    row_blocks: u32,
    token_blocks: u32,
    blocks: u32,
    padding: [u32; 9],
}

const _: () = assert!(size_of::<CodesHopperArgs>() == 320, "as the assertion in linear_codes_hopper.cu");

// SAFETY: as the structure of that name in linear_codes_hopper.cu.
unsafe impl Arguments for CodesHopperArgs {}

/// `WidenArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct WidenArgs {
    x: Address,
    out: Address,
    words: u64,
}

// SAFETY: as the structure of that name in linear_codes.cu.
unsafe impl Arguments for WidenArgs {}

/// `CodeSumArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct CodeSumArgs {
    x: Address,
    sums: Address,
    m: u32,
    row_bytes: u32,
    step: u32,
    segments: u32,
}

// SAFETY: as the structure of that name in linear_codes.cu.
unsafe impl Arguments for CodeSumArgs {}

/// Kernels that make the sums: `CodeArithmetic`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arithmetic {
    Integers,
    ShiftedIntegers,
    Halves,
}

/// Kernels that make a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernels {
    /// That of any tensor cores, and Hopper's where it has one.
    Any(&'static str, Option<Warpgroups>),
    /// Hopper's alone.
    Warpgroups(Warpgroups),
}

/// A kernel of Hopper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Warpgroups {
    pub(super) name: &'static str,
    /// Of its blocks.
    tokens: usize,
}

/// Fp8 by fp8 on tensor cores for them.
const FP8: Warpgroups = Warpgroups { name: "codes_hopper_fp8", tokens: 128 };
/// What [`FP8`] sums before it meets f32: a segment is a multiple of it, or all of k.
const FP8_STAGE: usize = STEPS * 32;

impl Arithmetic {
    /// k of one instruction.
    fn k(self) -> usize {
        match self {
            Arithmetic::Integers | Arithmetic::ShiftedIntegers => 32,
            Arithmetic::Halves => 16,
        }
    }

    /// `None` where no scheme has such weights.
    fn kernel(self, class: CodeClass) -> Option<&'static str> {
        match self {
            Arithmetic::Integers => of_integers(class, ["codes_int4", "codes_int8"]),
            Arithmetic::ShiftedIntegers => of_integers(class, ["codes_int4_shifted", "codes_int8_shifted"]),
            Arithmetic::Halves if class == CodeClass::E4m3 => Some("codes_half_e4m3"),
            Arithmetic::Halves => of_integers(class, ["codes_half_int4", "codes_half_int8"]),
        }
    }

    /// The kernel of Hopper; `None` where the others do it.
    fn hopper(self, class: CodeClass, step: usize, k: usize) -> Option<Warpgroups> {
        let (whole, stages) = (step >= k, step.is_multiple_of(STEPS * self.k()));
        let integers = |tokens, names| of_integers(class, names).map(|name| Warpgroups { name, tokens });
        match self {
            Arithmetic::Integers if whole => integers(256, ["codes_hopper_int4", "codes_hopper_int8"]),
            Arithmetic::ShiftedIntegers if whole => {
                integers(256, ["codes_hopper_int4_shifted", "codes_hopper_int8_shifted"])
            }
            Arithmetic::Integers if stages => {
                integers(128, ["codes_hopper_int4_segments", "codes_hopper_int8_segments"])
            }
            Arithmetic::Halves if class == CodeClass::E4m3 && whole => {
                Some(Warpgroups { name: "codes_hopper_e4m3", tokens: 256 })
            }
            Arithmetic::Halves if class == CodeClass::E4m3 && stages => {
                Some(Warpgroups { name: "codes_hopper_e4m3_segments", tokens: 128 })
            }
            Arithmetic::Integers | Arithmetic::ShiftedIntegers | Arithmetic::Halves => None,
        }
    }
}

/// The kernel for integers of 4 or 8 bits.
fn of_integers(class: CodeClass, [int4, int8]: [&'static str; 2]) -> Option<&'static str> {
    match class {
        CodeClass::Int4 => Some(int4),
        CodeClass::Int8 => Some(int8),
        CodeClass::E2m1 | CodeClass::E4m3 | CodeClass::Bf16 | CodeClass::F16 | CodeClass::F32 => None,
    }
}

/// A product of codes that tensor cores take.
pub(super) struct CodesProduct<'a, M> {
    pub(super) kernels: Kernels,
    /// What activations are to the copy engine: bytes, or any 16 bits.
    element: TensorElement,
    /// Whether sums of inputs are wanted.
    input_sums: bool,
    /// k of one segment.
    step: usize,
    /// k that share an activation scale.
    segment: usize,
    scales: &'a M,
    offsets: Option<&'a M>,
}

/// How `weight` is multiplied with an operand of this kind; `None` where that is not for tensor cores. Decided by
/// the kind and the whole matrix alone, never by rows or tokens.
///
/// # Errors
/// Where the product is not defined.
pub(super) fn takes<'a, M>(
    kind: &'a OperandKind<M>,
    weight: &CudaMatrix<M>,
) -> Result<Option<CodesProduct<'a, M>>, KernelError> {
    let OperandKind::Codes { activation, segment, scales, offsets, compute, .. } = kind else {
        return Ok(None);
    };
    let product = weight.weights().codes(*activation, *segment)?;
    let (step, segment, offsets) = (product.step, *segment, offsets.as_ref());
    if is_fp8(kind, weight)? {
        let (kernels, element) = (Kernels::Warpgroups(FP8), TensorElement::Byte);
        let product = CodesProduct { kernels, element, input_sums: false, step, segment, scales, offsets };
        return Ok(Some(product));
    }
    let arithmetic = match (product.sums, compute) {
        (Sums::Integers, _) if offsets.is_some() || weight.zeros.is_some() => Arithmetic::ShiftedIntegers,
        (Sums::Integers, _) => Arithmetic::Integers,
        (Sums::Floats, Compute::Bf16) => Arithmetic::Halves,
        (Sums::Floats, Compute::F32) => return Ok(None),
    };
    let whole = step >= weight.k || step.is_multiple_of(arithmetic.k());
    Ok(arithmetic.kernel(weight.class()).filter(|_| whole).map(|kernel| CodesProduct {
        kernels: Kernels::Any(kernel, arithmetic.hopper(weight.class(), step, weight.k)),
        element: match arithmetic {
            Arithmetic::Integers | Arithmetic::ShiftedIntegers => TensorElement::Byte,
            Arithmetic::Halves => TensorElement::Bf16,
        },
        input_sums: arithmetic == Arithmetic::ShiftedIntegers && weight.zeros.is_some(),
        step,
        segment,
        scales,
        offsets,
    }))
}

/// Whether an operand is codes of fp8 numbers as bytes.
fn has_fp8_bytes<M>(kind: &OperandKind<M>) -> bool {
    match kind {
        OperandKind::Codes { activation, stored: Stored::Bytes, .. } => activation.code == Code::E4m3,
        OperandKind::Codes { stored: Stored::Halves, .. }
        | OperandKind::Bf16
        | OperandKind::F32
        | OperandKind::ScaledBf16 { .. }
        | OperandKind::ScaledF32 { .. } => false,
    }
}

/// Whether [`FP8`] makes a product.
fn is_fp8<M>(kind: &OperandKind<M>, weight: &CudaMatrix<M>) -> Result<bool, KernelError> {
    let OperandKind::Codes { activation, segment, .. } = kind else { return Ok(false) };
    let step = weight.weights().codes(*activation, *segment)?.step;
    let stages = step >= weight.k || step.is_multiple_of(FP8_STAGE);
    Ok(has_fp8_bytes(kind) && weight.class() == CodeClass::E4m3 && stages)
}

/// Whether an operand has bytes and its product with `weight` wants f16.
///
/// # Errors
/// Where the product is not defined.
pub(super) fn wants_halves<M>(kind: &OperandKind<M>, weight: &CudaMatrix<M>) -> Result<bool, KernelError> {
    Ok(has_fp8_bytes(kind) && !is_fp8(kind, weight)?)
}

/// The values of an operand of fp8 bytes as f16.
pub(super) fn widened<D: Device>(device: &D, x: &CudaOperand<D::Memory>) -> Result<D::Memory, KernelError> {
    let codes = x.rows * x.k.next_multiple_of(TILE);
    let out = device.allocate(codes * 2)?;
    let args = WidenArgs { x: D::address(&x.values), out: D::address(&out), words: (codes / 16) as u64 };
    device.launch(Queue::Compute, "widen_e4m3", [codes.div_ceil(WIDENED), 1, 1], &args)?;
    Ok(out)
}

/// Rows `rows` of `weight` for `tokens` of an operand of codes.
pub(super) fn product<D: Device>(
    cuda: &Cuda<D>,
    x: &Input<'_, D::Memory>,
    tokens: Range<usize>,
    weight: &CudaMatrix<D::Memory>,
    rows: Range<usize>,
    product: &CodesProduct<'_, D::Memory>,
    y: Output,
) -> Result<(), KernelError> {
    let device = cuda.device();
    let (m, k) = (tokens.len(), weight.k);
    let values = x.values::<D>(tokens.start);
    let input_sums =
        if product.input_sums { Some(input_sums(device, values, m, k, product.step)?) } else { None };
    let of_tokens = |memory: &D::Memory| D::address(memory).offset(tokens.start * (k / product.segment) * 4);
    let matrix = weight.args::<D>(rows, Worth::Scaled);
    let args = CodesArgs {
        matrix,
        x: values,
        scales: of_tokens(product.scales),
        offsets: product.offsets.map_or(Address::NULL, of_tokens),
        input_sums: input_sums.as_ref().map_or(Address::NULL, D::address),
        y: y.address,
        m: m as u32,
        y_stride: y.stride as u32,
        step: product.step as u32,
        segment: product.segment as u32,
    };
    let row_blocks = (matrix.row_tiles as usize * TILE).div_ceil(ROWS);
    let asked = cuda.linears == Some(LinearPath::Hopper) && device.has_warpgroups();
    match product.kernels {
        Kernels::Any(_, Some(kernel)) if asked => {
            on_warpgroups(device, kernel, row_blocks, product.element, k, args)
        }
        Kernels::Any(kernel, _) => {
            device.launch(Queue::Compute, kernel, [row_blocks, m.div_ceil(TOKENS), 1], &args)
        }
        Kernels::Warpgroups(kernel) => on_warpgroups(device, kernel, row_blocks, product.element, k, args),
    }
}

/// The same by a kernel whose blocks stay for several tiles of 128 rows and the kernel's tokens.
fn on_warpgroups<D: Device>(
    device: &D,
    kernel: Warpgroups,
    row_blocks: usize,
    element: TensorElement,
    k: usize,
    codes: CodesArgs,
) -> Result<(), KernelError> {
    let (columns, token_blocks) = (k.next_multiple_of(TILE), (codes.m as usize).div_ceil(kernel.tokens));
    let x = device.tensor_map(&TensorTile {
        address: codes.x,
        rows: codes.m as usize,
        columns,
        row_bytes: columns * element.bytes(),
        box_rows: kernel.tokens,
        element,
    })?;
    let blocks = device.multiprocessors().min(row_blocks * token_blocks);
    let args = CodesHopperArgs {
        x,
        codes,
        row_blocks: row_blocks as u32,
        token_blocks: token_blocks as u32,
        blocks: blocks as u32,
        padding: [0; 9],
    };
    device.launch(Queue::Compute, kernel.name, [blocks, 1, 1], &args)
}

/// Sums of the integers of each segment: i32 [m, segments].
fn input_sums<D: Device>(
    device: &D,
    x: Address,
    m: usize,
    k: usize,
    step: usize,
) -> Result<D::Memory, KernelError> {
    let (row_bytes, segments) = (k.next_multiple_of(TILE), k.div_ceil(step));
    let sums = device.allocate(m * segments * 4)?;
    let args = CodeSumArgs {
        x,
        sums: D::address(&sums),
        m: m as u32,
        row_bytes: row_bytes as u32,
        // One segment is all of the row, whose end is zeros.
        step: if segments == 1 { row_bytes } else { step } as u32,
        segments: segments as u32,
    };
    device.launch(Queue::Compute, "sum_codes", [(m * segments).div_ceil(SUMS), 1, 1], &args)?;
    Ok(sums)
}
