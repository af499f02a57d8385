//! Attention over whole rows of scores: f32 operands.
//!
//! A row's softmax is normalised before it meets the values, and the sum over keys starts again for each block of keys,
//! as in a linear: the order of eager attention in Hugging Face transformers, with which it mostly agrees in every bit
//! (`golden/torch_orders.py`).

use super::{Head, KEYS};
use crate::cpu::math::exp;
use crate::cpu::panel::Order;
use crate::cpu::row_tiles::block_length;

/// Queries `first..` of one block: output [queries, dim], zero before.
pub(super) fn block(head: &Head<'_>, first: usize, output: &mut [f32]) {
    let dim = head.shape.head_dim;
    let queries = output.len() / dim;
    let tiles = head.tiles(first, queries);
    let start = tiles.start * KEYS;
    let stride = tiles.len() * KEYS;
    let mut scores = vec![0.0_f32; queries * stride];
    for tile in tiles.clone() {
        head.scores(Order::Ascending, first, queries, tile, &mut scores[tile * KEYS - start..], stride);
    }
    for (query, row) in scores.chunks_exact_mut(stride).enumerate() {
        let seen = head.seen(first + query);
        let seen = seen.start.max(start) - start..seen.end - start;
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
        softmax(&mut row[seen.clone()], (start + seen.start) % LANES, head.scale());
    }
    let end = head.rows.min(tiles.end * KEYS);
    let length = block_length(head.rows);
    let mut at = start;
    while at < end {
        let next = end.min((at / length + 1) * length);
        let mut sums = vec![0.0_f32; output.len()];
        head.mix(Order::Ascending, at..next, &scores[at - start..], stride, &mut sums);
        output.iter_mut().zip(sums).for_each(|(output, sum)| *output += sum);
        at = next;
    }
}

/// Interleaved chains of a softmax's denominator.
const LANES: usize = 16;

/// Softmax of the keys that a query sees; `lane` is the first key's position modulo [`LANES`].
///
/// The denominator is sixteen chains by key position, folded in halves; the quotient is a product with its
/// reciprocal.
fn softmax(row: &mut [f32], lane: usize, scale: f32) {
    row.iter_mut().for_each(|score| *score *= scale);
    let largest = row.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    row.iter_mut().for_each(|score| *score = exp(*score - largest));
    let mut chains = [0.0_f32; LANES];
    for (index, value) in row.iter().enumerate() {
        chains[(lane + index) % LANES] += value;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            chains[lane] += chains[lane + width];
        }
        width /= 2;
    }
    let reciprocal = 1.0 / chains[0];
    row.iter_mut().for_each(|value| *value *= reciprocal);
}
