//! Causal attention, one head of one window a task.
//!
//! With bf16 compute the softmax keeps a running maximum over tiles of keys ([`running`]), with f32 it sees whole rows
//! of scores ([`whole`]). Both products go through the same register-blocked kernel as linears.

mod running;
mod whole;

use std::ops::Range;

use rayon::prelude::*;

use crate::Compute;
use crate::backend::{AttentionShape, Span};
use crate::cpu::math::round_bf16;
use crate::cpu::panel::{Order, Panel, Rows, multiply};
use crate::cpu::{CpuBuffer, Isa};

/// Keys of one tile.
const KEYS: usize = 64;
/// Queries that go over a tile together; blocks start at the window's first row.
const QUERIES: usize = 24;

/// Attention of the query heads `heads`, whose columns are all that `q` holds, each window by itself and for the
/// positions that `queries` says: [rows of q, heads.len() * head_dim].
pub(crate) fn attend(
    isa: Isa,
    [q, k, v]: [&CpuBuffer; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    compute: Compute,
    queries: &[Span],
    windows: &[Range<usize>],
) -> CpuBuffer {
    let dim = shape.head_dim;
    let width = heads.len() * dim;
    let rows = q.rows();
    let tasks: Vec<(&Span, &Range<usize>, usize)> = queries
        .iter()
        .zip(windows)
        .flat_map(|(span, window)| heads.clone().map(move |head| (span, window, head)))
        .collect();
    let outputs: Vec<Vec<f32>> = tasks
        .par_iter()
        .map(|(span, window, head)| {
            let kv_head = head / (shape.heads / shape.kv_heads);
            // Zeros stand for the queries that are not asked for: blocks begin where they do with all of them.
            let mut all = vec![0.0; window.len() * dim];
            let asked = span.first * dim..(span.first + span.rows.len()) * dim;
            all[asked].copy_from_slice(&slice(q, &span.rows, head - heads.start, dim, compute));
            let keys = transpose(&slice(k, window, kv_head, dim, compute), dim);
            let values = slice(v, window, kv_head, dim, compute);
            Head { isa, shape, compute, rows: window.len(), q: all, keys, values }.run(&span.positions())
        })
        .collect();
    let mut values = vec![0.0; rows * width];
    for ((span, _, head), output) in tasks.iter().zip(&outputs) {
        for (row, output) in span.rows.clone().zip(output[span.first * dim..].chunks_exact(dim)) {
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

/// One query head over one window of tokens, with the keys and values of its group.
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
    /// Outputs of all positions, [rows, dim]; those of blocks without any of the positions `asked` are zero.
    fn run(&self, asked: &Range<usize>) -> Vec<f32> {
        let dim = self.shape.head_dim;
        let mut output = vec![0.0; self.rows * dim];
        let blocks = asked.start / QUERIES..asked.end.div_ceil(QUERIES);
        for (block, output) in output.chunks_mut(QUERIES * dim).enumerate() {
            if !blocks.contains(&block) {
                continue;
            }
            match self.compute {
                Compute::Bf16 => running::block(self, block * QUERIES, output),
                Compute::F32 => whole::block(self, block * QUERIES, output),
            }
        }
        output
    }

    /// Positions that `position` sees.
    fn seen(&self, position: usize) -> Range<usize> {
        let window = self.shape.window.unwrap_or(usize::MAX);
        (position + 1).saturating_sub(window)..position + 1
    }

    /// Tiles of keys that any of the queries `first..first + queries` sees.
    fn tiles(&self, first: usize, queries: usize) -> Range<usize> {
        self.seen(first).start / KEYS..(first + queries - 1) / KEYS + 1
    }

    /// Unscaled scores of queries `first..` against one tile, added to `scores`, one row every `stride`.
    fn scores(
        &self,
        order: Order,
        first: usize,
        queries: usize,
        tile: usize,
        scores: &mut [f32],
        stride: usize,
    ) {
        let dim = self.shape.head_dim;
        let q = Rows { values: &self.q[first * dim..], stride: dim, count: queries };
        let keys = Panel { values: &self.keys[tile * KEYS * dim..], stride: KEYS, width: KEYS, k: dim };
        multiply(self.isa, order, q, keys, scores, stride);
    }

    /// `output += probabilities * values` over the keys `keys`; probabilities have one row every `stride`.
    fn mix(
        &self,
        order: Order,
        keys: Range<usize>,
        probabilities: &[f32],
        stride: usize,
        output: &mut [f32],
    ) {
        let dim = self.shape.head_dim;
        let rows = Rows { values: probabilities, stride, count: output.len() / dim };
        let values =
            Panel { values: &self.values[keys.start * dim..], stride: dim, width: dim, k: keys.len() };
        multiply(self.isa, order, rows, values, output, dim);
    }

    /// `1 / sqrt(head_dim)`.
    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }
}
