//! `--acts kernel`: products of codes, exact where the arithmetic is, scales applied to the sums.
//!
//! * integers: sums of a segment of k are exact (f64 chains hold them), rounded once to f32;
//! * fp8: products are exact, sums are f32 chains;
//! * NVFP4 and MX: code times local scale is exact on both sides, sums are one f32 chain, global scales come last.
//!
//! A segment is the longest run of k in which neither side changes its scale.

use std::ops::Range;

use ctq_container::TILE;

use crate::backend::KernelError;
use crate::cpu::decode::{Decode, RowTile};
use crate::cpu::matrix::{CpuMatrix, ScaleUse};
use crate::cpu::panel::{Order, Panel, Rows, multiply, multiply_exact};
use crate::cpu::quantize::{CpuOperand, OperandKind};
use crate::cpu::row_tiles::{chains, tiles};
use crate::cpu::{CpuBuffer, Isa};
use crate::exact_product::{CodeProduct, Sums, Weights};

/// Output rows `rows` (of the whole matrix) for every row of `x`, without the bias: [count, rows].
pub(crate) fn linear(
    isa: Isa,
    x: &CpuOperand,
    weight: &CpuMatrix,
    rows: Range<usize>,
) -> Result<CpuBuffer, KernelError> {
    match &x.kind {
        OperandKind::Values => unreachable!("plain operands take the other path"),
        OperandKind::Scaled { activation, global } => {
            weights(weight).scaled(*activation)?;
            let divisor = weight.global_scale() * global;
            Ok(tiles(x, weight, rows, |tile, inputs, out| {
                let tile = RowTile::new(weight, tile, Decode::Scaled);
                chains(isa, &tile, x.k, x.range(inputs), out);
                out.iter_mut().for_each(|value| *value /= divisor);
            }))
        }
        OperandKind::Codes { activation, segment, scales } => {
            let CodeProduct { sums, step } = weights(weight).codes(*activation, *segment)?;
            let integers = sums == Sums::Integers;
            let per_row = x.k / segment;
            Ok(tiles(x, weight, rows, |tile, inputs, out| {
                let scales = &scales[inputs.start * per_row..inputs.end * per_row];
                let task = Task { isa, weight, tile, step, segment: *segment, scales, integers };
                task.run(x.range(inputs), out);
            }))
        }
    }
}

fn weights(weight: &CpuMatrix) -> Weights {
    Weights {
        code: weight.tiled.code,
        formula: weight.tiled.formula,
        k: weight.k(),
        group: weight.group_size(),
        permuted: weight.permutation.is_some(),
    }
}

/// One row tile times some rows of codes.
struct Task<'a> {
    isa: Isa,
    weight: &'a CpuMatrix,
    tile: usize,
    /// k of one segment.
    step: usize,
    /// k that share an activation scale.
    segment: usize,
    /// [count, k / segment].
    scales: &'a [f32],
    /// Whether both sides are integers, whose sums are exact.
    integers: bool,
}

impl Task<'_> {
    fn run(&self, x: Rows<'_, f32>, out: &mut [f32]) {
        let k = self.weight.k();
        let mut panel = vec![0.0; k.div_ceil(TILE) * TILE * TILE];
        RowTile::new(self.weight, self.tile, Decode::Codes).panel(0, &mut panel);
        let weight_scales = self.weight.row_scales(self.tile, ScaleUse::Stored);
        let group = self.weight.group_size();
        let single = self.segment >= k;
        for start in (0..k).step_by(self.step) {
            let length = self.step.min(k - start);
            let sums = self.sums(x, &panel[start * TILE..(start + length) * TILE], start, length);
            let weight_scales = &weight_scales[start / group * TILE..][..TILE];
            for row in 0..x.count {
                // A scale that does not change along k is applied once, at the end.
                let scale =
                    if single { 1.0 } else { self.scales[row * (k / self.segment) + start / self.segment] };
                for column in 0..TILE {
                    let term = sums[row * TILE + column] * (weight_scales[column] * scale);
                    out[row * TILE + column] += term;
                }
            }
        }
        if single {
            for (row, out) in out.chunks_exact_mut(TILE).enumerate() {
                out.iter_mut().for_each(|value| *value *= self.scales[row]);
            }
        }
    }

    /// Sums of products of codes over one segment, [count][64].
    fn sums(&self, x: Rows<'_, f32>, panel: &[f32], start: usize, length: usize) -> Vec<f32> {
        let mut sums = vec![0.0; x.count * TILE];
        if !self.integers {
            let panel = Panel { values: panel, stride: TILE, width: TILE, k: length };
            multiply(
                self.isa,
                Order::Pairs,
                Rows { values: &x.values[start..], ..x },
                panel,
                &mut sums,
                TILE,
            );
            return sums;
        }
        let wide: Vec<f64> = panel.iter().map(|code| f64::from(*code)).collect();
        let inputs: Vec<f64> = (0..x.count)
            .flat_map(|row| &x.values[row * x.stride + start..][..length])
            .map(|code| f64::from(*code))
            .collect();
        let mut exact = vec![0.0_f64; x.count * TILE];
        let panel = Panel { values: &wide, stride: TILE, width: TILE, k: length };
        multiply_exact(
            self.isa,
            Rows { values: &inputs, stride: length, count: x.count },
            panel,
            &mut exact,
            TILE,
        );
        for (sum, exact) in sums.iter_mut().zip(exact) {
            *sum = exact as f32;
        }
        sums
    }
}
