//! Both linears of a gated feed-forward part and what joins them in one launch, where Hopper's warpgroups multiply:
//! `kernels/cuda/gate_hopper.cu`. Gives the bits of the operations that it stands for.
#![expect(unsafe_code, reason = "arguments of kernels")]

use bytemuck::NoUninit;
use ctq_container::TILE;

use super::format::{Format, format};
use super::hopper::{self, ProductArgs, Staged};
use super::{Bf16Path, Input, path};
use crate::KernelError;
use crate::backend::GatePair;
use crate::cuda::Cuda;
use crate::cuda::buffer::{CudaOperand, OperandKind, upload_floats};
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::cuda::matrix::{CudaMatrix, Worth};

/// `GateHopperArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct GateHopperArgs {
    product: ProductArgs,
    out: Address,
    gate_bias: Address,
    up_bias: Address,
    padding: [u32; 10],
}

const _: () = assert!(size_of::<GateHopperArgs>() == 448, "as the assertion in gate_hopper.cu");

// SAFETY: as the structure of that name in gate_hopper.cu.
unsafe impl Arguments for GateHopperArgs {}

const KERNELS: [&str; 8] = [
    "gate_hopper_int4",
    "gate_hopper_int4_f32",
    "gate_hopper_e2m1",
    "gate_hopper_int8",
    "gate_hopper_int8_f32",
    "gate_hopper_e4m3",
    "gate_hopper_e4m3_f32",
    "gate_hopper_bf16",
];

/// The bf16 operand that follows the gate; `None` where the pair has no launch of its own: matrices that take another
/// path or differ in more than their numbers, rows that begin inside a tile, inputs in an order of their own.
pub(crate) fn gated<D: Device>(
    cuda: &Cuda<D>,
    x: &CudaOperand<D::Memory>,
    pair: GatePair<'_, CudaMatrix<D::Memory>>,
) -> Result<Option<CudaOperand<D::Memory>>, KernelError> {
    let GatePair { gate, up, biases } = pair;
    let Some(format) = common_format(cuda, x, gate, up) else { return Ok(None) };
    let (device, n) = (cuda.device(), gate.rows.len());
    let values = device.allocate(x.rows * n.next_multiple_of(TILE) * 2)?;
    if x.rows > 0 && n > 0 {
        let staged = |weight: &CudaMatrix<D::Memory>| {
            Staged::new(device, weight, weight.args::<D>(0..n, Worth::Operand), format)
        };
        let (gate_staged, up_staged) = (staged(gate)?, staged(up)?);
        let upload = |bias: Option<&[f32]>, rows: &CudaMatrix<D::Memory>| {
            bias.map(|bias| upload_floats(device, &bias[rows.rows.clone()])).transpose()
        };
        let (gate_bias, up_bias) = (upload(biases[0], gate)?, upload(biases[1], up)?);
        let address = |bias: &Option<D::Memory>| bias.as_ref().map_or(Address::NULL, D::address);
        let input = Input::new(device, x, gate)?;
        let args = GateHopperArgs {
            product: hopper::pair_args(device, &input, gate.stride(), &gate_staged, &up_staged)?,
            out: D::address(&values),
            gate_bias: address(&gate_bias),
            up_bias: address(&up_bias),
            padding: [0; 10],
        };
        let blocks = [args.product.blocks as usize, 1, 1];
        device.launch(Queue::Compute, format.pick(&KERNELS), blocks, &args)?;
    }
    Ok(Some(CudaOperand { rows: x.rows, k: n, kind: OperandKind::Bf16, values }))
}

fn common_format<D: Device>(
    cuda: &Cuda<D>,
    x: &CudaOperand<D::Memory>,
    gate: &CudaMatrix<D::Memory>,
    up: &CudaMatrix<D::Memory>,
) -> Option<Format> {
    let on_warpgroups = matches!(x.kind, OperandKind::Bf16)
        && [gate, up].iter().all(|weight| path(cuda, &x.kind, weight) == Bf16Path::Hopper);
    let shape = |weight: &CudaMatrix<D::Memory>| (weight.k, weight.rows.clone(), weight.n);
    let scheme = |weight: &CudaMatrix<D::Memory>| {
        (weight.code, weight.group_size(), weight.scale_dtype, weight.rounding(), weight.zeros.is_some())
    };
    let alike = shape(gate) == shape(up) && scheme(gate) == scheme(up);
    let in_order = gate.permutation.is_none() && up.permutation.is_none();
    if !(on_warpgroups && alike && in_order && gate.rows.start.is_multiple_of(TILE)) {
        return None;
    }
    let common = format(gate, Worth::Operand)?;
    (format(up, Worth::Operand)? == common).then_some(common)
}
