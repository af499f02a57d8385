//! Causal attention with a running maximum, over tiles of 64 keys that ascend from the window's start.
//!
//! Scores, maxima, exponentials and denominators are f32; with bf16 compute q, k, v and the unnormalised
//! probabilities are rounded as operands, the denominator sums the unrounded ones. Both products go through the same
//! register-blocked kernel as linears, so their sums have the same order.

use std::ops::Range;

use rayon::prelude::*;

use crate::Compute;
use crate::backend::AttentionShape;
use crate::cpu::math::{exp, round_bf16};
use crate::cpu::panel::{Order, Panel, Rows, multiply};
use crate::cpu::{CpuBuffer, Isa};

/// Keys of one tile.
const KEYS: usize = 64;
/// Queries that go over a tile together; blocks start at the window's first row.
const QUERIES: usize = 24;

pub(crate) fn attend(
    isa: Isa,
    [q, k, v]: [&CpuBuffer; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    compute: Compute,
    windows: &[Range<usize>],
) -> CpuBuffer {
    let dim = shape.head_dim;
    let width = heads.len() * dim;
    let rows = q.rows();
    let tasks: Vec<(&Range<usize>, usize)> =
        windows.iter().flat_map(|window| heads.clone().map(move |head| (window, head))).collect();
    let outputs: Vec<Vec<f32>> = tasks
        .par_iter()
        .map(|(window, head)| {
            let kv_head = head / (shape.heads / shape.kv_heads);
            let q = slice(q, window, *head, dim, compute);
            let keys = transpose(&slice(k, window, kv_head, dim, compute), dim);
            let values = slice(v, window, kv_head, dim, compute);
            Head { isa, shape, compute, rows: window.len(), q, keys, values }.run()
        })
        .collect();
    let mut values = vec![0.0; rows * width];
    for ((window, head), output) in tasks.iter().zip(&outputs) {
        for (row, output) in (*window).clone().zip(output.chunks_exact(dim)) {
            let at = row * width + (head - heads.start) * dim;
            values[at..at + dim].copy_from_slice(output);
        }
    }
    CpuBuffer { width, values }
}

/// One head of a window, [rows, dim], rounded to the compute mode.
fn slice(x: &CpuBuffer, window: &Range<usize>, head: usize, dim: usize, compute: Compute) -> Vec<f32> {
    let row = |row: usize| &x.values[row * x.width + head * dim..][..dim];
    let values = window.clone().flat_map(row);
    match compute {
        Compute::F32 => values.copied().collect(),
        Compute::Bf16 => values.map(|value| round_bf16(*value)).collect(),
    }
}

/// Keys as panels: [tile][dim][64], zero beyond the last.
fn transpose(keys: &[f32], dim: usize) -> Vec<f32> {
    let rows = keys.len() / dim;
    let mut panels = vec![0.0; rows.div_ceil(KEYS) * KEYS * dim];
    for row in 0..rows {
        for d in 0..dim {
            panels[(row / KEYS) * KEYS * dim + d * KEYS + row % KEYS] = keys[row * dim + d];
        }
    }
    panels
}

struct Head<'a> {
    isa: Isa,
    shape: &'a AttentionShape,
    compute: Compute,
    rows: usize,
    /// [rows, dim].
    q: Vec<f32>,
    /// [tile][dim][64].
    keys: Vec<f32>,
    /// [rows, dim].
    values: Vec<f32>,
}

impl Head<'_> {
    fn order(&self) -> Order {
        match self.compute {
            Compute::F32 => Order::Ascending,
            Compute::Bf16 => Order::Pairs,
        }
    }

    fn run(&self) -> Vec<f32> {
        let dim = self.shape.head_dim;
        let mut output = vec![0.0; self.rows * dim];
        for (block, output) in output.chunks_mut(QUERIES * dim).enumerate() {
            self.block(block * QUERIES, output);
        }
        output
    }

    /// Queries `first..` of one block: output [queries, dim].
    fn block(&self, first: usize, output: &mut [f32]) {
        let dim = self.shape.head_dim;
        let queries = output.len() / dim;
        let window = self.shape.window.unwrap_or(usize::MAX);
        let mut largest = [f32::NEG_INFINITY; QUERIES];
        let mut total = [0.0_f32; QUERIES];
        let oldest = first.saturating_sub(window.saturating_sub(1)) / KEYS;
        for tile in oldest..=(first + queries - 1) / KEYS {
            let mut scores = [0.0_f32; QUERIES * KEYS];
            let q = Rows { values: &self.q[first * dim..], stride: dim, count: queries };
            let keys = Panel { values: &self.keys[tile * KEYS * dim..], stride: KEYS, width: KEYS, k: dim };
            multiply(self.isa, self.order(), q, keys, &mut scores, KEYS);
            for query in 0..queries {
                let position = first + query;
                let seen = visible(position, window, tile);
                let scores = &mut scores[query * KEYS..(query + 1) * KEYS];
                let state = (&mut largest[query], &mut total[query]);
                self.fold(scores, seen, state, &mut output[query * dim..(query + 1) * dim]);
            }
            let keys = (self.rows - tile * KEYS).min(KEYS);
            let probabilities = Rows { values: &scores, stride: KEYS, count: queries };
            let values =
                Panel { values: &self.values[tile * KEYS * dim..], stride: dim, width: dim, k: keys };
            multiply(self.isa, self.order(), probabilities, values, output, dim);
        }
        for (output, total) in output.chunks_exact_mut(dim).zip(total) {
            output.iter_mut().for_each(|value| *value /= total);
        }
    }

    /// Turns one query's scores of a tile into probabilities under the running maximum, and rescales what it has
    /// summed so far.
    fn fold(&self, scores: &mut [f32], seen: Range<usize>, state: (&mut f32, &mut f32), output: &mut [f32]) {
        let (largest, total) = state;
        if seen.is_empty() {
            scores.fill(0.0);
            return;
        }
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        scores.iter_mut().for_each(|score| *score *= scale);
        let here = scores[seen.clone()].iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let new = largest.max(here);
        let shrink = exp(*largest - new);
        *largest = new;
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        scores[seen].iter_mut().for_each(|score| *score = exp(*score - new));
        *total = *total * shrink + sum(scores);
        output.iter_mut().for_each(|value| *value *= shrink);
        match self.compute {
            Compute::F32 => {}
            Compute::Bf16 => scores.iter_mut().for_each(|score| *score = round_bf16(*score)),
        }
    }
}

/// Keys of a tile that a position sees, counted from the tile's first.
fn visible(position: usize, window: usize, tile: usize) -> Range<usize> {
    let start = (position + 1).saturating_sub(window).max(tile * KEYS) - tile * KEYS;
    let end = (position + 1).clamp(tile * KEYS, (tile + 1) * KEYS) - tile * KEYS;
    start.min(KEYS)..end.max(start.min(KEYS))
}

/// Sum of a tile: sixteen interleaved chains, added up first to last.
fn sum(values: &[f32]) -> f32 {
    let mut chains = [0.0_f32; 16];
    for chunk in values.chunks_exact(16) {
        for (chain, value) in chains.iter_mut().zip(chunk) {
            *chain += value;
        }
    }
    chains.iter().sum()
}
