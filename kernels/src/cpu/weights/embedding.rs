//! Rows of a matrix as f32: what an embedding looks up.

use ctq_container::TILE;
use rayon::prelude::*;

use super::{Decode, RowTile, Scratch};
use crate::cpu::matrix::CpuMatrix;
use crate::cpu::{CpuBuffer, Isa};

/// Rows `ids` as f32, in the order of the inputs: the weight bit for bit as compressed-tensors yields it.
pub(crate) fn rows(isa: Isa, table: &CpuMatrix, ids: &[u32]) -> CpuBuffer {
    let width = table.k();
    // Rows of one row tile are decoded together: each tile once.
    let mut order: Vec<(usize, usize)> =
        ids.iter().map(|id| table.rows.start + *id as usize).enumerate().collect();
    order.sort_by_key(|(_, row)| *row);
    let runs: Vec<&[(usize, usize)]> = order.chunk_by(|a, b| a.1 / TILE == b.1 / TILE).collect();
    let decoded: Vec<(usize, Vec<f32>)> =
        runs.par_iter().flat_map_iter(|run| tile_rows(isa, table, run)).collect();
    let mut values = vec![0.0; ids.len() * width];
    for (index, row) in decoded {
        values[index * width..(index + 1) * width].copy_from_slice(&row);
    }
    CpuBuffer { width, values }
}

/// `(index, row)` of one row tile, decoded.
fn tile_rows(isa: Isa, table: &CpuMatrix, run: &[(usize, usize)]) -> Vec<(usize, Vec<f32>)> {
    let tile = RowTile::new(isa, table, run[0].1 / TILE, Decode::Operand);
    let mut rows: Vec<(usize, Vec<f32>)> =
        run.iter().map(|(index, _)| (*index, vec![0.0; table.k()])).collect();
    let mut scratch = Scratch::default();
    for (k_tile, first) in (0..table.k()).step_by(TILE).enumerate() {
        tile.values(k_tile, None, &mut scratch);
        for ((_, row), (_, out)) in run.iter().zip(&mut rows) {
            let values = &scratch.values[row % TILE * TILE..];
            for column in first..table.k().min(first + TILE) {
                let input =
                    table.permutation.as_ref().map_or(column, |permutation| permutation[column] as usize);
                out[input] = values[column - first];
            }
        }
    }
    rows
}
