//! Attention with a running maximum, over tiles of 64 keys that ascend from the window's start: bf16 operands.
//!
//! Scores, maxima, exponentials and denominators are f32; the unnormalised probabilities are rounded to bf16 as
//! operands, the denominator sums the unrounded ones.

use std::ops::Range;

use super::{Head, KEYS, QUERIES};
use crate::cpu::math::{exp, round_bf16};
use crate::cpu::panel::Order;

/// Queries `first..` of one block: output [queries, dim].
pub(super) fn block(head: &Head<'_>, first: usize, output: &mut [f32]) {
    let dim = head.shape.head_dim;
    let queries = output.len() / dim;
    let mut largest = [f32::NEG_INFINITY; QUERIES];
    let mut total = [0.0_f32; QUERIES];
    for tile in head.tiles(first, queries) {
        let mut scores = [0.0_f32; QUERIES * KEYS];
        head.scores(Order::Pairs, first, queries, tile, &mut scores, KEYS);
        for query in 0..queries {
            let seen = inside(&head.seen(first + query), tile);
            let scores = &mut scores[query * KEYS..(query + 1) * KEYS];
            scores.iter_mut().for_each(|score| *score *= head.scale());
            let state = (&mut largest[query], &mut total[query]);
            fold(scores, seen, state, &mut output[query * dim..(query + 1) * dim]);
        }
        let keys = tile * KEYS..head.rows.min((tile + 1) * KEYS);
        head.mix(Order::Pairs, keys, &scores, KEYS, output);
    }
    for (output, total) in output.chunks_exact_mut(dim).zip(total) {
        output.iter_mut().for_each(|value| *value /= total);
    }
}

/// Turns one query's scores of a tile into probabilities under the running maximum, and rescales what it has summed
/// so far.
fn fold(scores: &mut [f32], seen: Range<usize>, state: (&mut f32, &mut f32), output: &mut [f32]) {
    let (largest, total) = state;
    if seen.is_empty() {
        scores.fill(0.0);
        return;
    }
    let here = scores[seen.clone()].iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let new = largest.max(here);
    let shrink = exp(*largest - new);
    *largest = new;
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    scores[seen].iter_mut().for_each(|score| *score = exp(*score - new));
    *total = *total * shrink + sum(scores);
    output.iter_mut().for_each(|value| *value *= shrink);
    scores.iter_mut().for_each(|score| *score = round_bf16(*score));
}

/// The part of `seen` in a tile, counted from the tile's first key.
fn inside(seen: &Range<usize>, tile: usize) -> Range<usize> {
    let start = seen.start.clamp(tile * KEYS, (tile + 1) * KEYS) - tile * KEYS;
    let end = seen.end.clamp(tile * KEYS, (tile + 1) * KEYS) - tile * KEYS;
    start..end.max(start)
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
