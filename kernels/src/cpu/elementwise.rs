//! Operations without a product of matrices: norms, rotation, gates, sums, gathers. Rows are independent, so they are
//! spread over threads; a sum inside a row has one fixed order.

use rayon::prelude::*;

use crate::Rotation;
use crate::backend::Span;
use crate::cpu::CpuBuffer;
use crate::cpu::math::silu;

/// RMS norm in f32, as `LlamaRMSNorm` orders it: `(x * (1 / sqrt(mean + epsilon))) * weight`.
pub(crate) fn norm(x: &CpuBuffer, weight: &[f32], epsilon: f32) -> CpuBuffer {
    let mut values = x.values.clone();
    values.par_chunks_mut(x.width.max(1)).for_each(|row| {
        for run in row.chunks_exact_mut(weight.len()) {
            let mean = square_sum(run) / run.len() as f32;
            let inverse = 1.0 / (mean + epsilon).sqrt();
            for (value, weight) in run.iter_mut().zip(weight) {
                *value = (*value * inverse) * weight;
            }
        }
    });
    CpuBuffer { width: x.width, values }
}

/// Lanes of one chain of [`square_sum`].
const LANES: usize = 8;
/// Chains that run side by side.
const CHAINS: usize = 4;
/// Additions before a chain's sum moves up a level.
const STEP: usize = 16;

/// Sum of squares in f32 by levels, which keeps the error of long rows small.
///
/// Four chains of eight lanes walk the row side by side; every 16 additions a chain's sum moves up a level. torch 2.14
/// was measured to have the same bits (`golden/torch_orders.py`).
fn square_sum(run: &[f32]) -> f32 {
    let whole = run.len() / (LANES * CHAINS);
    let mut lanes = [[0.0_f32; LANES]; CHAINS];
    for (chain, lanes) in lanes.iter_mut().enumerate() {
        let line = |row: usize| &run[(row * CHAINS + chain) * LANES..][..LANES];
        *lanes = square_levels(whole, line);
    }
    let [mut first, rest @ ..] = lanes;
    let mut tail = run[whole * LANES * CHAINS..].chunks_exact(LANES);
    for line in tail.by_ref() {
        first.iter_mut().zip(line).for_each(|(sum, value)| *sum += value * value);
    }
    for lanes in rest {
        first.iter_mut().zip(lanes).for_each(|(sum, lane)| *sum += lane);
    }
    let sum = tail.remainder().iter().fold(0.0, |sum, value| sum + value * value);
    first.iter().fold(sum, |sum, lane| sum + lane)
}

/// Sums of squares of `rows` lines, lane by lane, over four levels.
fn square_levels<'a>(rows: usize, line: impl Fn(usize) -> &'a [f32]) -> [f32; LANES] {
    let mut levels = [[0.0_f32; LANES]; 4];
    for row in 0..rows {
        levels[0].iter_mut().zip(line(row)).for_each(|(sum, value)| *sum += value * value);
        let done = row + 1;
        let mut span = STEP;
        for level in 1..levels.len() {
            if !done.is_multiple_of(span) {
                break;
            }
            let below = std::mem::take(&mut levels[level - 1]);
            levels[level].iter_mut().zip(below).for_each(|(sum, below)| *sum += below);
            span *= STEP;
        }
    }
    let [mut sum, rest @ ..] = levels;
    for level in rest {
        sum.iter_mut().zip(level).for_each(|(sum, level)| *sum += level);
    }
    sum
}

/// Half-split rotation: `(a, b)` at `(i, i + d/2)` become `(a cos - b sin, b cos + a sin)`, products rounded first.
pub(crate) fn rotate(x: &mut CpuBuffer, rotation: &Rotation, spans: &[Span]) {
    let width = x.width;
    let half = rotation.head_dim() / 2;
    for span in spans {
        let rows = &mut x.values[span.rows.start * width..span.rows.end * width];
        rows.par_chunks_mut(width).enumerate().for_each(|(index, row)| {
            let (cos, sin) = rotation.at(span.first + index);
            for head in row.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (first[i], second[i]);
                    first[i] = a * cos[i] - b * sin[i];
                    second[i] = b * cos[i] + a * sin[i];
                }
            }
        });
    }
}

/// `silu(gate) * up`, written over the gate.
pub(crate) fn gate(mut gate: CpuBuffer, up: &CpuBuffer) -> CpuBuffer {
    gate.values.par_iter_mut().zip(&up.values).for_each(|(gate, up)| *gate = silu(*gate) * up);
    gate
}

/// `x += y`.
pub(crate) fn add(x: &mut CpuBuffer, y: &CpuBuffer) {
    x.values.par_iter_mut().zip(&y.values).for_each(|(x, y)| *x += y);
}

/// Adds `bias` to every row.
pub(crate) fn add_bias(x: &mut CpuBuffer, bias: &[f32]) {
    if x.width == 0 {
        return;
    }
    x.values.par_chunks_mut(x.width).for_each(|row| {
        for (value, bias) in row.iter_mut().zip(bias) {
            *value += bias;
        }
    });
}

/// First row that holds a NaN or an infinity.
pub(crate) fn first_non_finite(x: &CpuBuffer) -> Option<usize> {
    let at = x.values.par_iter().position_first(|value| !value.is_finite())?;
    Some(at / x.width)
}

/// Rows `rows` of `x`, in that order.
pub(crate) fn gather(x: &CpuBuffer, rows: &[u32]) -> CpuBuffer {
    let width = x.width;
    let row = |index: &u32| &x.values[*index as usize * width..(*index as usize + 1) * width];
    CpuBuffer { width, values: rows.iter().flat_map(row).copied().collect() }
}

/// `x[rows[i]] += weights[i] * y[i]`, product and sum rounded one after the other.
pub(crate) fn scatter_add(x: &mut CpuBuffer, y: &CpuBuffer, rows: &[u32], weights: &[f32]) {
    let width = x.width;
    for ((row, weight), y) in rows.iter().zip(weights).zip(y.values.chunks_exact(width)) {
        let x = &mut x.values[*row as usize * width..(*row as usize + 1) * width];
        for (x, y) in x.iter_mut().zip(y) {
            *x += weight * y;
        }
    }
}

/// Columns of several buffers side by side.
pub(crate) fn concatenate(parts: &[&CpuBuffer]) -> CpuBuffer {
    let width: usize = parts.iter().map(|part| part.width).sum();
    let rows = parts.iter().map(|part| part.rows()).max().unwrap_or(0);
    let mut values = vec![0.0; rows * width];
    values.par_chunks_mut(width.max(1)).enumerate().for_each(|(row, out)| {
        let mut at = 0;
        for part in parts {
            out[at..at + part.width].copy_from_slice(&part.values[row * part.width..(row + 1) * part.width]);
            at += part.width;
        }
    });
    CpuBuffer { width, values }
}
