//! Products on tensor cores straight from packed tiles: `kernels/cuda/linear_bf16.cu`. An output's bits depend on its
//! row of the matrix and of the input alone.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;

use bytemuck::NoUninit;
use ctq_container::TILE;

use crate::KernelError;
use crate::cuda::decode;
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::cuda::linear::format::{Format, format};
use crate::cuda::linear::{Epilogue, Input, Output};
use crate::cuda::matrix::{CodeClass, CudaMatrix, MatrixArgs, Worth};

/// Rows and tokens that one block covers: `PRODUCT_ROWS`, `PRODUCT_TOKENS`.
const ROWS: usize = 128;
const TOKENS: usize = 128;

/// Most bytes of tiles that are made again for weights whose scales change inside a k16 slice.
pub(super) const RETILED_BYTES: usize = 64 << 20;

const KERNELS: [&str; 7] =
    ["fused_int4", "fused_e2m1", "fused_int8", "fused_e4m3", "fused_bf16", "fused_f16", "fused_f32"];

/// The kernel of a product of whole slices: one that knows the scheme, where there is one.
fn kernel<M>(weight: &CudaMatrix<M>, worth: Worth) -> &'static str {
    match format(weight, worth) {
        Some(Format::Int4) => "fused_int4_bf16",
        Some(Format::E2m1) => "fused_e2m1_table",
        Some(Format::Int8) => "fused_int8_bf16",
        Some(Format::E4m3) => "fused_e4m3_bf16",
        Some(Format::Int4F32 | Format::Int8F32 | Format::E4m3F32 | Format::Bf16) | None => {
            weight.class().pick(&KERNELS)
        }
    }
}

/// `Problem`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct ProblemArgs {
    matrix: MatrixArgs,
    x: Address,
    y: Address,
    bias: Address,
    added: Address,
    m: u32,
    first_block: u32,
    y_stride: u32,
    divisor: f32,
    added_stride: u32,
    padding: u32,
}

const _: () = assert!(size_of::<ProblemArgs>() == 144, "as the assertion in linear_bf16.cu");

/// `FusedArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct FusedArgs {
    single: ProblemArgs,
    problems: Address,
    count: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in linear_bf16.cu.
unsafe impl Arguments for FusedArgs {}

/// What is multiplied, and where the result goes.
pub(crate) struct FusedProduct<'a, M> {
    pub(crate) weight: &'a CudaMatrix<M>,
    /// Of the matrix, from its own first.
    pub(crate) rows: Range<usize>,
    pub(crate) worth: Worth,
    /// Of all sums.
    pub(crate) divisor: f32,
    pub(crate) y: Output,
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
    let run = |rows: Range<usize>, retiled: Option<Address>, kernel: &'static str| {
        let column = rows.start - product.rows.start;
        let matrix = weight.args::<D>(rows, *worth);
        let matrix = retiled.map_or(matrix, |tiles| matrix.retiled(tiles));
        let (y, added) = (y.from(0, column), epilogue.added.map(|added| added.from(0, column)));
        let single = ProblemArgs {
            matrix,
            x: x.values::<D>(tokens.start),
            y: y.address,
            bias: epilogue.bias.map_or(Address::NULL, |bias| bias.offset(column * 4)),
            added: added.map_or(Address::NULL, |added| added.address),
            m: tokens.len() as u32,
            first_block: 0,
            y_stride: y.stride as u32,
            divisor: *divisor,
            added_stride: added.map_or(0, |added| added.stride as u32),
            padding: 0,
        };
        let args = FusedArgs { single, problems: Address::NULL, count: 0, padding: 0 };
        let blocks = [(matrix.row_tiles as usize * TILE).div_ceil(ROWS), tokens.len().div_ceil(TOKENS), 1];
        device.launch(Queue::Compute, kernel, blocks, &args)
    };
    if weight.has_whole_slices() {
        return run(rows.clone(), None, kernel(weight, *worth));
    }
    // Scales that change anywhere: operands first, in tiles of their own, a part of the rows at a time.
    let row_tile_bytes = weight.stride() * TILE * 2;
    let part = (RETILED_BYTES / row_tile_bytes).max(2) - 1;
    for start in rows.clone().step_by(part * TILE) {
        let rows = start..rows.end.min(start + part * TILE);
        let args = weight.args::<D>(rows.clone(), *worth);
        let tiles = device.allocate(args.row_tiles as usize * row_tile_bytes)?;
        decode::operand_tiles(device, weight, args, D::address(&tiles))?;
        run(rows, Some(D::address(&tiles)), CodeClass::Bf16.pick(&KERNELS))?;
    }
    Ok(())
}

/// Whether one launch of [`grouped`] can take all of `weights`.
pub(super) fn is_one_launch<M>(weights: &[&CudaMatrix<M>]) -> bool {
    let [first, rest @ ..] = weights else { return true };
    let same = |weight: &&CudaMatrix<M>| {
        (weight.k, weight.rows.len(), weight.class()) == (first.k, first.rows.len(), first.class())
            && kernel(weight, Worth::Operand) == kernel(first, Worth::Operand)
            && weight.rows.start % TILE == first.rows.start % TILE
    };
    rest.iter().all(same) && weights.iter().all(|weight| weight.has_whole_slices())
}

/// Products of one shape in one launch, all of each input.
pub(super) fn grouped<D: Device>(
    device: &D,
    inputs: &[Input<'_, D::Memory>],
    products: &[(FusedProduct<'_, D::Memory>, Epilogue)],
) -> Result<(), KernelError> {
    let mut blocks = 0;
    let mut problems = Vec::new();
    for (x, (product, epilogue)) in inputs.iter().zip(products) {
        if x.rows() == 0 || product.rows.is_empty() {
            continue;
        }
        problems.push(ProblemArgs {
            matrix: product.weight.args::<D>(product.rows.clone(), product.worth),
            x: x.values::<D>(0),
            y: product.y.address,
            bias: epilogue.bias.unwrap_or(Address::NULL),
            added: epilogue.added.map_or(Address::NULL, |added| added.address),
            m: x.rows() as u32,
            first_block: blocks as u32,
            y_stride: product.y.stride as u32,
            divisor: product.divisor,
            added_stride: epilogue.added.map_or(0, |added| added.stride as u32),
            padding: 0,
        });
        blocks += x.rows().div_ceil(TOKENS);
    }
    let (Some(single), Some((product, _))) = (problems.first(), products.first()) else { return Ok(()) };
    let table = device.upload(bytes_of(&problems))?;
    let args =
        FusedArgs { single: *single, problems: D::address(&table), count: problems.len() as u32, padding: 0 };
    let columns = (single.matrix.row_tiles as usize * TILE).div_ceil(ROWS);
    device.launch(Queue::Compute, kernel(product.weight, product.worth), [columns, blocks, 1], &args)
}

fn bytes_of(problems: &[ProblemArgs]) -> &[u8] {
    // SAFETY: the structure holds numbers without padding between them: its size is the sum of theirs.
    unsafe { std::slice::from_raw_parts(problems.as_ptr().cast(), size_of_val(problems)) }
}
