//! Products on Hopper's warpgroups straight from packed tiles: `kernels/cuda/linear_hopper.cu`. An output's bits depend
//! on its row of the matrix and of the input alone.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;

use bytemuck::NoUninit;
use ctq_container::TILE;
use ctq_model::DType;
use ctq_model::matrix::Sharing;

use crate::KernelError;
use crate::cuda::decode;
use crate::cuda::device::{Address, Arguments, Device, Queue, TensorElement, TensorMap, TensorTile};
use crate::cuda::linear::format::{Format, format};
use crate::cuda::linear::fused::{FusedProduct, RETILED_BYTES};
use crate::cuda::linear::{Epilogue, Input};
use crate::cuda::matrix::{CudaMatrix, MatrixArgs};

/// Tokens that one block covers: `HOPPER_TOKENS`.
const TOKENS: usize = 256;

/// `HopperProduct`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
pub(crate) struct ProductArgs {
    x: TensorMap,
    /// Of each consumer.
    first: MatrixArgs,
    second: MatrixArgs,
    tokens: u32,
    token_blocks: u32,
    row_blocks: u32,
    row_tiles_apart: u32,
    /// Of the launch.
    pub(crate) blocks: u32,
    padding: [u32; 15],
}

const _: () = assert!(size_of::<ProductArgs>() == 384, "as the assertion in hopper_product.cuh");

/// `HopperArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct HopperArgs {
    product: ProductArgs,
    y: Address,
    bias: Address,
    added: Address,
    y_stride: u32,
    added_stride: u32,
    runs: u32,
    divisor: f32,
    padding: [u32; 6],
}

const _: () = assert!(size_of::<HopperArgs>() == 448, "as the assertion in linear_hopper.cu");

// SAFETY: as the structure of that name in linear_hopper.cu.
unsafe impl Arguments for HopperArgs {}

/// `SpreadArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct SpreadArgs {
    matrix: MatrixArgs,
    scales: Address,
    zeros: Address,
    as_f32: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in linear_hopper.cu.
unsafe impl Arguments for SpreadArgs {}

const KERNELS: [&str; 8] = [
    "hopper_int4",
    "hopper_int4_f32",
    "hopper_e2m1",
    "hopper_int8",
    "hopper_int8_f32",
    "hopper_e4m3",
    "hopper_e4m3_f32",
    "hopper_bf16",
];

/// A matrix as stages take it, and what it takes beside the packed one.
pub(crate) struct Staged<M> {
    args: MatrixArgs,
    /// Read by the product, which is queued while this is held.
    _made: Vec<M>,
}

impl<M> Staged<M> {
    /// Scales of each row and group: those that there are, or copies of them.
    pub(crate) fn new<D: Device<Memory = M>>(
        device: &D,
        weight: &CudaMatrix<M>,
        args: MatrixArgs,
        format: Format,
    ) -> Result<Staged<M>, KernelError> {
        let by_row = matches!(weight.sharing, Some(Sharing::Channel | Sharing::Group { .. }) | None);
        let as_f32 = format.scale_bytes() == 4;
        let is_f32 = weight.scale_dtype == Some(DType::F32) && weight.divisor() == 1.0;
        if format == Format::Bf16 || (by_row && (!as_f32 || is_f32)) {
            return Ok(Staged { args: args.as_stored(), _made: Vec::new() });
        }
        let count = args.row_tiles as usize * args.groups() * TILE;
        let scales = device.allocate(count * format.scale_bytes())?;
        let zeros = weight.zeros.as_ref().map(|_| device.allocate(count)).transpose()?;
        let zeros_address = zeros.as_ref().map_or(Address::NULL, D::address);
        let spread = SpreadArgs {
            matrix: args,
            scales: D::address(&scales),
            zeros: zeros_address,
            as_f32: u32::from(as_f32),
            padding: 0,
        };
        device.launch(
            Queue::Compute,
            "spread_scales",
            [args.groups(), args.row_tiles as usize, 1],
            &spread,
        )?;
        let args = args.by_row(D::address(&scales), zeros_address);
        Ok(Staged { args, _made: std::iter::once(scales).chain(zeros).collect() })
    }
}

/// Tiles of `tokens` of the input, 128 rows of a matrix each, on as many blocks as run at once.
pub(crate) fn product_args<D: Device>(
    device: &D,
    x: &Input<'_, D::Memory>,
    tokens: &Range<usize>,
    stride: usize,
    staged: &Staged<D::Memory>,
) -> Result<ProductArgs, KernelError> {
    let x = device.tensor_map(&TensorTile {
        address: x.values::<D>(tokens.start),
        rows: tokens.len(),
        columns: stride,
        row_bytes: stride * 2,
        box_rows: TOKENS,
        element: TensorElement::Bf16,
    })?;
    let (token_blocks, row_blocks) = (tokens.len().div_ceil(TOKENS), staged.args.row_tiles.div_ceil(2));
    Ok(ProductArgs {
        x,
        first: staged.args,
        second: staged.args,
        tokens: tokens.len() as u32,
        token_blocks: token_blocks as u32,
        row_blocks,
        row_tiles_apart: 2,
        blocks: (token_blocks * row_blocks as usize).min(device.multiprocessors()) as u32,
        padding: [0; 15],
    })
}

/// All tokens of the input, the same 64 rows of two matrices each.
pub(super) fn pair_args<D: Device>(
    device: &D,
    x: &Input<'_, D::Memory>,
    stride: usize,
    first: &Staged<D::Memory>,
    second: &Staged<D::Memory>,
) -> Result<ProductArgs, KernelError> {
    let args = product_args(device, x, &(0..x.rows()), stride, first)?;
    let row_blocks = first.args.row_tiles;
    let blocks = (args.token_blocks * row_blocks).min(device.multiprocessors() as u32);
    Ok(ProductArgs { second: second.args, row_blocks, row_tiles_apart: 1, blocks, ..args })
}

/// `tokens` of `x` times the rows of `product`.
pub(super) fn product<D: Device>(
    device: &D,
    x: &Input<'_, D::Memory>,
    tokens: Range<usize>,
    product: &FusedProduct<'_, D::Memory>,
    epilogue: Epilogue,
) -> Result<(), KernelError> {
    let FusedProduct { weight, rows, worth, divisor, y } = product;
    let run = |rows: Range<usize>, staged: &Staged<D::Memory>, format: Format| {
        let column = rows.start - product.rows.start;
        let (y, added) = (y.from(0, column), epilogue.added.map(|added| added.from(0, column)));
        let runs = [y.address.0 / 4, y.stride as u64, u64::from(staged.args.first), u64::from(staged.args.n)];
        let product = product_args(device, x, &tokens, weight.stride(), staged)?;
        let args = HopperArgs {
            product,
            y: y.address,
            bias: epilogue.bias.map_or(Address::NULL, |bias| bias.offset(column * 4)),
            added: added.map_or(Address::NULL, |added| added.address),
            y_stride: y.stride as u32,
            added_stride: added.map_or(0, |added| added.stride as u32),
            runs: u32::from(runs.iter().all(|number| number.is_multiple_of(4))),
            divisor: *divisor,
            padding: [0; 6],
        };
        device.launch(Queue::Compute, format.pick(&KERNELS), [product.blocks as usize, 1, 1], &args)
    };
    if let Some(format) = format(weight, *worth) {
        let staged = Staged::new(device, weight, weight.args::<D>(rows.clone(), *worth), format)?;
        return run(rows.clone(), &staged, format);
    }
    // Operands first, in tiles of their own, a part of the rows at a time.
    let row_tile_bytes = weight.stride() * TILE * 2;
    let part = (RETILED_BYTES / row_tile_bytes).max(2) - 1;
    for start in rows.clone().step_by(part * TILE) {
        let rows = start..rows.end.min(start + part * TILE);
        let args = weight.args::<D>(rows.clone(), *worth);
        let tiles = device.allocate(args.row_tiles as usize * row_tile_bytes)?;
        decode::operand_tiles(device, weight, args, D::address(&tiles))?;
        let staged = Staged { args: args.retiled(D::address(&tiles)).as_stored(), _made: vec![tiles] };
        run(rows, &staged, Format::Bf16)?;
    }
    Ok(())
}

#[cfg(all(test, feature = "emulated"))]
#[path = "../tests/linear_hopper.rs"]
mod tests;
