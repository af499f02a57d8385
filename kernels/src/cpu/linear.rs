//! `x * W^T` on packed weights: a row tile is decoded block by block along k, and each block is multiplied with all
//! rows before the next is decoded.

use std::ops::Range;

use ctq_container::TILE;
use rayon::prelude::*;

use crate::Compute;
use crate::backend::KernelError;
use crate::cpu::decode::{Decode, RowTile};
use crate::cpu::exact;
use crate::cpu::matrix::CpuMatrix;
use crate::cpu::panel::{Panel, Rows, multiply};
use crate::cpu::quantize::{CpuOperand, OperandKind};
use crate::cpu::{CpuBuffer, Isa};

/// k tiles decoded at a time: a panel of 64 KiB, which stays in the second-level cache.
const K_TILES: usize = 4;

/// Fewest rows that are worth decoding a panel for.
const MIN_ROWS: usize = 96;

/// Output rows `rows` (of the whole matrix) for every row of `x`.
pub(crate) fn linear(
    isa: Isa,
    x: &CpuOperand,
    weight: &CpuMatrix,
    rows: Range<usize>,
    compute: Compute,
) -> Result<CpuBuffer, KernelError> {
    let permuted;
    let x = match &weight.permutation {
        None => x,
        Some(permutation) => {
            permuted = permute(x, permutation);
            &permuted
        }
    };
    match &x.kind {
        OperandKind::Values => Ok(tiles(x, weight, rows, |tile, inputs, out| {
            let tile = RowTile::new(weight, tile, Decode::Operand(compute));
            chains(isa, &tile, x.k, x.range(inputs), out);
        })),
        OperandKind::Codes { .. } | OperandKind::Scaled { .. } => exact::linear(isa, x, weight, rows),
    }
}

/// One row tile times `x`: [count][64] chains over all of k.
pub(crate) fn chains(isa: Isa, tile: &RowTile<'_>, k: usize, x: Rows<'_, f32>, out: &mut [f32]) {
    let mut panel = vec![0.0; K_TILES * TILE * TILE];
    for first in (0..k).step_by(K_TILES * TILE) {
        let length = (k - first).min(K_TILES * TILE);
        let values = &mut panel[..length.div_ceil(TILE) * TILE * TILE];
        tile.panel(first / TILE, values);
        let panel = Panel { values, stride: TILE, width: TILE, k: length };
        multiply(isa, Rows { values: &x.values[first..], ..x }, panel, out, TILE);
    }
}

/// Runs `compute(row tile, input rows, out [input rows][64])` over row tiles and runs of input rows, and puts the
/// columns `rows` together.
pub(crate) fn tiles(
    x: &CpuOperand,
    weight: &CpuMatrix,
    rows: Range<usize>,
    compute: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
) -> CpuBuffer {
    let width = rows.len();
    let count = x.rows();
    if width == 0 || count == 0 {
        return CpuBuffer { width, values: Vec::new() };
    }
    debug_assert_eq!(x.k, weight.k());
    let first = rows.start / TILE;
    let row_tiles = rows.end.div_ceil(TILE) - first;
    // Enough tasks for all threads; how rows are cut cannot be seen in the result.
    let cuts = (4 * rayon::current_num_threads()).div_ceil(row_tiles).max(1);
    let run = count.div_ceil(cuts).max(MIN_ROWS);
    let runs = count.div_ceil(run);
    let blocks: Vec<Vec<f32>> = (0..row_tiles * runs)
        .into_par_iter()
        .map(|task| {
            let (tile, start) = (first + task / runs, (task % runs) * run);
            let length = run.min(count - start);
            let mut out = vec![0.0; length * TILE];
            compute(tile, start..start + length, &mut out);
            out
        })
        .collect();
    let mut values = vec![0.0; count * width];
    values.par_chunks_mut(width).enumerate().for_each(|(row, out)| {
        for tile in 0..row_tiles {
            let block = &blocks[tile * runs + row / run][(row % run) * TILE..][..TILE];
            let start = (first + tile) * TILE;
            let columns = rows.start.max(start)..rows.end.min(start + TILE);
            out[columns.start - rows.start..columns.end - rows.start]
                .copy_from_slice(&block[columns.start - start..columns.end - start]);
        }
    });
    CpuBuffer { width, values }
}

/// Columns in the order of the tiles: act-order.
fn permute(x: &CpuOperand, permutation: &[u32]) -> CpuOperand {
    let mut values = vec![0.0; x.values.len()];
    values.par_chunks_mut(x.k).zip(x.values.par_chunks(x.k)).for_each(|(out, row)| {
        for (out, input) in out.iter_mut().zip(permutation) {
            *out = row[*input as usize];
        }
    });
    CpuOperand { k: x.k, values, kind: x.kind.clone() }
}
