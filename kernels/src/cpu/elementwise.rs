//! Operations without a product of matrices: norms, rotation, gates, sums, gathers. Rows are independent, so they are
//! spread over threads; a sum inside a row has one fixed order.

use std::ops::Range;

use rayon::prelude::*;

use crate::Rotation;
use crate::cpu::CpuBuffer;
use crate::cpu::math::silu;

/// RMS norm: mean square and its root in f64, quotient and product in f32, as `LlamaRMSNorm` orders them.
pub(crate) fn norm(x: &CpuBuffer, weight: &[f32], epsilon: f32) -> CpuBuffer {
    let mut values = x.values.clone();
    values.par_chunks_mut(x.width.max(1)).for_each(|row| {
        for run in row.chunks_exact_mut(weight.len()) {
            let mean = square_sum(run) / run.len() as f64;
            let inverse = (1.0 / (mean + f64::from(epsilon)).sqrt()) as f32;
            for (value, weight) in run.iter_mut().zip(weight) {
                *value = (*value * inverse) * weight;
            }
        }
    });
    CpuBuffer { width: x.width, values }
}

/// Sum of squares in f64: eight interleaved chains, added up first to last.
fn square_sum(run: &[f32]) -> f64 {
    let mut chains = [0.0_f64; 8];
    for chunk in run.chunks(8) {
        for (chain, value) in chains.iter_mut().zip(chunk) {
            *chain += f64::from(*value) * f64::from(*value);
        }
    }
    chains.iter().sum()
}

/// Half-split rotation: `(a, b)` at `(i, i + d/2)` become `(a cos - b sin, b cos + a sin)`, products rounded first.
pub(crate) fn rotate(x: &mut CpuBuffer, rotation: &Rotation, windows: &[Range<usize>]) {
    let width = x.width;
    let half = rotation.head_dim() / 2;
    for window in windows {
        let rows = &mut x.values[window.start * width..window.end * width];
        rows.par_chunks_mut(width).enumerate().for_each(|(position, row)| {
            let (cos, sin) = rotation.at(position);
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

pub(crate) fn gate(gate: &CpuBuffer, up: &CpuBuffer) -> CpuBuffer {
    let values = gate.values.par_iter().zip(&up.values).map(|(gate, up)| silu(*gate) * up).collect();
    CpuBuffer { width: gate.width, values }
}

pub(crate) fn add(x: &mut CpuBuffer, y: &CpuBuffer) {
    x.values.par_iter_mut().zip(&y.values).for_each(|(x, y)| *x += y);
}

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

pub(crate) fn first_non_finite(x: &CpuBuffer) -> Option<usize> {
    let at = x.values.par_iter().position_first(|value| !value.is_finite())?;
    Some(at / x.width)
}

pub(crate) fn gather(x: &CpuBuffer, rows: &[u32]) -> CpuBuffer {
    let width = x.width;
    let row = |index: &u32| &x.values[*index as usize * width..(*index as usize + 1) * width];
    CpuBuffer { width, values: rows.iter().flat_map(row).copied().collect() }
}

pub(crate) fn scatter_add(x: &mut CpuBuffer, y: &CpuBuffer, rows: &[u32], weights: &[f32]) {
    let width = x.width;
    for ((row, weight), y) in rows.iter().zip(weights).zip(y.values.chunks_exact(width)) {
        let x = &mut x.values[*row as usize * width..(*row as usize + 1) * width];
        for (x, y) in x.iter_mut().zip(y) {
            *x += weight * y;
        }
    }
}

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
