//! Decompressed weights: `kernels/cuda/decode.cu`.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;

use bytemuck::NoUninit;
use ctq_container::TILE;

use crate::KernelError;
use crate::cuda::Cuda;
use crate::cuda::buffer::{CudaBuffer, upload_integers};
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::cuda::linear::format::{Format, format};
use crate::cuda::matrix::{CudaMatrix, MatrixArgs, Worth};

/// `DecodeArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct DecodeArgs {
    matrix: MatrixArgs,
    out: Address,
    rows: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in decode.cu.
unsafe impl Arguments for DecodeArgs {}

/// `LookUpArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct LookUpArgs {
    matrix: MatrixArgs,
    ids: Address,
    permutation: Address,
    out: Address,
}

// SAFETY: as the structure of that name in decode.cu.
unsafe impl Arguments for LookUpArgs {}

/// For schemes that have a short way to operands; bf16 codes are copied by the kernel of any.
const QUICK: [&str; 8] = [
    "decode_quick_int4",
    "decode_quick_int4_f32",
    "decode_quick_e2m1",
    "decode_quick_int8",
    "decode_quick_int8_f32",
    "decode_quick_e4m3",
    "decode_quick_e4m3_f32",
    "decode_rows_bf16",
];

/// Tiles along k that a block of these kernels decodes, `QUICK_COLUMNS`; of the others.
const QUICK_COLUMNS: usize = 8;
const COLUMNS: usize = 2;

const ROWS: [&str; 7] = [
    "decode_rows_int4",
    "decode_rows_e2m1",
    "decode_rows_int8",
    "decode_rows_e4m3",
    "decode_rows_bf16",
    "decode_rows_f16",
    "decode_rows_f32",
];
const TILES: [&str; 7] = [
    "decode_tiles_int4",
    "decode_tiles_e2m1",
    "decode_tiles_int8",
    "decode_tiles_e4m3",
    "decode_tiles_bf16",
    "decode_tiles_f16",
    "decode_tiles_f32",
];

/// Rows `rows` of `matrix`, from its own first, as bf16 operands: `out` is [padded, stride] row-major, columns in the
/// order of the tiles; what lies beyond the matrix is zero.
pub(crate) fn operand_rows<D: Device>(
    device: &D,
    queue: Queue,
    matrix: &CudaMatrix<D::Memory>,
    rows: Range<usize>,
    padded: usize,
    out: Address,
) -> Result<(), KernelError> {
    let args = matrix.args::<D>(rows, Worth::Operand);
    let row_tiles = (args.first as usize + padded).div_ceil(TILE);
    let quick = format(matrix, Worth::Operand).filter(|format| *format != Format::Bf16);
    let (kernel, columns) = match quick {
        Some(format) => (format.pick(&QUICK), QUICK_COLUMNS),
        None => (matrix.class().pick(&ROWS), COLUMNS),
    };
    let blocks = [matrix.stride().div_ceil(columns * TILE), row_tiles, 1];
    let args = DecodeArgs { matrix: args, out, rows: padded as u32, padding: 0 };
    device.launch(queue, kernel, blocks, &args)
}

/// The row tiles of `args` as bf16 operands in the order of 16-bit tiles: [row tiles][k tiles][4096].
pub(crate) fn operand_tiles<D: Device>(
    device: &D,
    matrix: &CudaMatrix<D::Memory>,
    args: MatrixArgs,
    out: Address,
) -> Result<(), KernelError> {
    let blocks = [matrix.stride().div_ceil(2 * TILE), args.row_tiles as usize, 1];
    device.launch(
        Queue::Compute,
        matrix.class().pick(&TILES),
        blocks,
        &DecodeArgs { matrix: args, out, rows: 0, padding: 0 },
    )
}

/// Rows `ids` as f32 in the order of the inputs: [ids, k], bit for bit as the CPU backend yields them.
pub(crate) fn rows<D: Device>(
    device: &D,
    table: &CudaMatrix<D::Memory>,
    ids: &[u32],
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    let out = CudaBuffer::new(device, ids.len(), table.k)?;
    let places = upload_integers(device, ids)?;
    let args = LookUpArgs {
        matrix: table.args::<D>(0..table.rows.len(), Worth::Operand),
        ids: D::address(&places),
        permutation: table.permutation.as_ref().map_or(Address::NULL, D::address),
        out: out.address::<D>(),
    };
    device.launch(Queue::Compute, "look_up", [ids.len(), 1, 1], &args)?;
    Ok(out)
}

impl<D: Device> Cuda<D> {
    /// Decodes a whole matrix as a large product would, and drops what came of it: for measuring.
    ///
    /// # Errors
    /// Where the device fails, for want of memory among others.
    pub fn decode_operands(&self, matrix: &CudaMatrix<D::Memory>) -> Result<(), KernelError> {
        let n = matrix.rows.len();
        let operands = self.device().allocate(n * matrix.stride() * 2)?;
        operand_rows(self.device(), Queue::Compute, matrix, 0..n, n, D::address(&operands))
    }
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/decode.rs"]
mod tests;
