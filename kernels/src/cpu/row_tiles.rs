//! One row tile after another: decoded panel by panel along k, multiplied with all input rows, put side by side.
//!
//! Knows how work is cut and how sums are blocked along k; not what the products mean.

use std::ops::Range;

use ctq_container::TILE;
use rayon::prelude::*;

use crate::cpu::decode::RowTile;
use crate::cpu::matrix::CpuMatrix;
use crate::cpu::panel::{Order, Panel, Rows, multiply};
use crate::cpu::quantize::CpuOperand;
use crate::cpu::{CpuBuffer, Isa};

/// k tiles decoded at a time: a panel of 96 KiB, which stays in the second-level cache, and two blocks of an f32 sum.
const K_TILES: usize = 6;

/// Fewest rows that are worth decoding a panel for.
const MIN_ROWS: usize = 96;

/// One row tile times `x`, [count][64]: one chain over all of k, in pairs.
pub(crate) fn chains(isa: Isa, tile: &RowTile<'_>, k: usize, x: Rows<'_, f32>, out: &mut [f32]) {
    panels(tile, k, |first, panel| {
        multiply(isa, Order::Pairs, Rows { values: &x.values[first..], ..x }, panel, out, TILE);
    });
}

/// One row tile times `x`, [count][64]: an ascending chain for each block of k, block sums added in order.
pub(crate) fn blocked_chains(isa: Isa, tile: &RowTile<'_>, k: usize, x: Rows<'_, f32>, out: &mut [f32]) {
    let block = block_length(k);
    let mut sums = vec![0.0; out.len()];
    panels(tile, k, |first, panel| {
        let mut at = first;
        while at < first + panel.k {
            // Up to the end of this panel or of this block, whichever comes first.
            let end = (first + panel.k).min((at / block + 1) * block);
            let rows = Panel { values: &panel.values[(at - first) * TILE..], k: end - at, ..panel };
            multiply(isa, Order::Ascending, Rows { values: &x.values[at..], ..x }, rows, &mut sums, TILE);
            if end.is_multiple_of(block) || end == k {
                out.iter_mut().zip(&mut sums).for_each(|(out, sum)| *out += std::mem::take(sum));
            }
            at = end;
        }
    });
}

/// k of one block of an f32 sum: all up to 192, halves up to 384, else 192 with the rest last.
///
/// Restarting a chain keeps its rounding error small. These lengths are those that torch 2.14 with MKL was measured to
/// use at eleven of twelve widths, not at k = 193 (`golden/torch_orders.py`).
pub(crate) fn block_length(k: usize) -> usize {
    const LONGEST: usize = 192;
    if k > LONGEST && k <= 2 * LONGEST { k.div_ceil(2) } else { LONGEST.min(k.max(1)) }
}

/// Decodes a row tile panel by panel along k.
fn panels(tile: &RowTile<'_>, k: usize, mut visit: impl FnMut(usize, Panel<'_, f32>)) {
    let mut panel = vec![0.0; K_TILES * TILE * TILE];
    for first in (0..k).step_by(K_TILES * TILE) {
        let length = (k - first).min(K_TILES * TILE);
        let values = &mut panel[..length.div_ceil(TILE) * TILE * TILE];
        tile.panel(first / TILE, values);
        visit(first, Panel { values, stride: TILE, width: TILE, k: length });
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
