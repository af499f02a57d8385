//! Products in f32 with the CPU backend's bits: `kernels/cuda/linear_f32.cu`.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;

use bytemuck::NoUninit;

use crate::KernelError;
use crate::cpu::row_tiles::block_length;
use crate::cuda::buffer::OperandKind;
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::cuda::linear::{Input, Output};
use crate::cuda::matrix::{CudaMatrix, MatrixArgs, Worth};
use crate::exact_product::Sums;

/// Tokens that one block covers: `ORDERED_TOKENS`.
const TOKENS: usize = 128;

/// `OrderedArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct OrderedArgs {
    matrix: MatrixArgs,
    stored: MatrixArgs,
    x: Address,
    scales: Address,
    offsets: Address,
    y: Address,
    m: u32,
    y_stride: u32,
    step: u32,
    segment: u32,
    divisor: f32,
    padding: u32,
}

// SAFETY: as the structure of that name in linear_f32.cu.
unsafe impl Arguments for OrderedArgs {}

/// `PermuteArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct PermuteArgs {
    x: Address,
    out: Address,
    permutation: Address,
    k: u32,
    stride: u32,
}

// SAFETY: as the structure of that name in linear_f32.cu.
unsafe impl Arguments for PermuteArgs {}

/// How the sums of a product are made.
struct Plan {
    kernel: &'static str,
    worth: Worth,
    /// k of one run.
    step: usize,
    scales: Address,
    offsets: Address,
    /// k that share an activation scale.
    segment: usize,
    divisor: f32,
}

/// Rows `rows` of `weight` for `tokens` of an operand of f32.
pub(super) fn product<D: Device>(
    device: &D,
    x: &Input<'_, D::Memory>,
    tokens: Range<usize>,
    weight: &CudaMatrix<D::Memory>,
    rows: Range<usize>,
    y: Output,
) -> Result<(), KernelError> {
    let plan = plan::<D>(x.kind(), weight, tokens.start)?;
    let matrix = weight.args::<D>(rows.clone(), plan.worth);
    let args = OrderedArgs {
        matrix,
        stored: weight.args::<D>(rows, Worth::Scaled),
        x: x.values::<D>(tokens.start),
        scales: plan.scales,
        offsets: plan.offsets,
        y: y.address,
        m: tokens.len() as u32,
        y_stride: y.stride as u32,
        step: plan.step as u32,
        segment: plan.segment as u32,
        divisor: plan.divisor,
        padding: 0,
    };
    let blocks = [matrix.row_tiles as usize, tokens.len().div_ceil(TOKENS), 1];
    device.launch(Queue::Compute, plan.kernel, blocks, &args)
}

fn plan<D: Device>(
    kind: &OperandKind<D::Memory>,
    weight: &CudaMatrix<D::Memory>,
    first_token: usize,
) -> Result<Plan, KernelError> {
    let k = weight.k;
    let plain = Plan {
        kernel: "linear_blocks",
        worth: Worth::Operand,
        step: block_length(k),
        scales: Address::NULL,
        offsets: Address::NULL,
        segment: k,
        divisor: 1.0,
    };
    match kind {
        OperandKind::F32 => Ok(plain),
        OperandKind::ScaledF32 { activation, global } => {
            weight.weights().scaled(*activation)?;
            let divisor = weight.global_scale * global;
            Ok(Plan { kernel: "linear_scaled", worth: Worth::Scaled, step: k, divisor, ..plain })
        }
        OperandKind::Codes { activation, segment, scales, offsets, .. } => {
            let product = weight.weights().codes(*activation, *segment)?;
            let kernel = match product.sums {
                Sums::Floats => "linear_floats",
                Sums::Integers => "linear_integers",
            };
            let passed = first_token * (k / segment) * 4;
            Ok(Plan {
                kernel,
                worth: Worth::Codes,
                step: product.step,
                scales: D::address(scales).offset(passed),
                offsets: offsets.as_ref().map_or(Address::NULL, |offsets| D::address(offsets).offset(passed)),
                segment: *segment,
                ..plain
            })
        }
        OperandKind::Bf16 | OperandKind::ScaledBf16 { .. } => {
            unreachable!("bf16 operands take the fused kernels")
        }
    }
}

/// The values of `x` with their columns in the order of act-ordered tiles.
pub(super) fn permute<D: Device>(
    device: &D,
    x: &Input<'_, D::Memory>,
    permutation: &D::Memory,
) -> Result<D::Memory, KernelError> {
    let out = device.allocate(x.rows() * x.row.bytes())?;
    let kernel = match x.row.width {
        1 => "permute_8",
        2 => "permute_16",
        _ => "permute_32",
    };
    let args = PermuteArgs {
        x: x.values::<D>(0),
        out: D::address(&out),
        permutation: D::address(permutation),
        k: x.operand.k as u32,
        stride: x.row.elements as u32,
    };
    device.launch(Queue::Compute, kernel, [x.rows(), 1, 1], &args)?;
    Ok(out)
}
