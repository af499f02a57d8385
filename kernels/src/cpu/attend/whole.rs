//! Attention over whole rows of scores: f32 operands.
//!
//! A row's softmax is normalised before it meets the values, and the sum over keys starts again for each block of keys,
//! as in a linear: the order of eager attention in Hugging Face transformers, with which it mostly agrees in every bit
//! (`golden/torch_orders.py`).

use super::{Block, KEYS, Method, cap_scores};
use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;
use crate::cpu::math::exp;
use crate::cpu::product::{Begin, HALF, Out, Product, STRIP, Unit, Words, multiply, pack_rows, transpose};
use crate::cpu::row_tiles::block_length;

/// Queries of a block. All of them meet every key of the tiles that any of them sees, with zeros where they do not see
/// it; the CUDA kernel takes as many.
const QUERIES: usize = 24;

/// Whole rows.
pub(super) struct Whole;

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    rows: Vec<f32>,
    row_words: Vec<u32>,
    /// [strip][dimensions][[`STRIP`]].
    queries: Words,
    /// [[`QUERIES`]][keys].
    scores: Words,
    /// [strip][keys][[`STRIP`]].
    strips: Words,
    /// [[`QUERIES`]][width].
    sums: Words,
}

impl Method for Whole {
    const QUERIES: usize = QUERIES;
    /// [half of keys][dimensions][[`HALF`]], zeros up to the end of the last tile.
    type Keys = Words;
    type Scratch = Scratch;

    fn pack<'a>(
        isa: Isa,
        unit: Unit,
        (rows, dim): (usize, usize),
        key: impl Fn(usize) -> &'a [f32] + Sync,
    ) -> Words {
        let mut words = Words::default();
        words.grow(rows.next_multiple_of(KEYS) * dim);
        let mut row_words = vec![0; HALF * dim];
        for (half, to) in words.as_mut_slice().chunks_exact_mut(HALF * dim).enumerate() {
            let rows = half * HALF..rows.min((half + 1) * HALF);
            for (row, words) in rows.clone().zip(row_words.chunks_exact_mut(dim)) {
                pack_rows(isa, unit, key(row), dim, words, dim);
            }
            transpose(isa, (&row_words, dim), (to, HALF), rows.len(), dim);
        }
        words
    }

    fn block<'a>(block: &Block<'_, Words>, scratch: &'a mut Scratch) -> &'a [f32] {
        let seen = block.seen_by(block.first..block.first + QUERIES);
        let start = seen.start / KEYS * KEYS;
        let end = block.rows.min(seen.end.next_multiple_of(KEYS));
        let stride = (end - start).next_multiple_of(KEYS);
        block.begin(stride, scratch);
        block.score(start, seen.end, stride, scratch);
        for query in 0..QUERIES {
            let seen = block.seen(block.first + query);
            let seen = [seen.start.clamp(start, end) - start, seen.end.min(end) - start];
            let row = &mut scratch.scores.as_mut_floats()[query * stride..][..stride];
            if let Some(cap) = block.softcap {
                row.iter_mut().for_each(|score| *score *= block.scale());
                cap_scores(row, cap);
            }
            let scale = if block.softcap.is_some() { 1.0 } else { block.scale() };
            softmax(block.isa, row, seen, scale, block.sink);
        }
        block.mix(start, end, stride, scratch);
        &scratch.sums.as_floats()[..QUERIES * block.values.width()]
    }
}

impl Block<'_, Words> {
    /// Packs the queries; nothing is summed yet.
    fn begin(&self, stride: usize, scratch: &mut Scratch) {
        let dim = self.shape.head_dim;
        scratch.rows.resize(QUERIES * dim, 0.0);
        scratch.row_words.resize(QUERIES * dim, 0);
        scratch.queries.grow(QUERIES * dim);
        scratch.scores.grow(QUERIES * stride);
        scratch.strips.grow(QUERIES * stride);
        scratch.sums.grow(QUERIES * self.values.width());
        self.copy_queries(self.first..self.first + QUERIES, &mut scratch.rows);
        pack_rows(self.isa, self.unit, &scratch.rows, dim, &mut scratch.row_words, dim);
        for strip in 0..QUERIES / STRIP {
            let from = &scratch.row_words[strip * STRIP * dim..];
            let to = &mut scratch.queries.as_mut_slice()[strip * STRIP * dim..];
            transpose(self.isa, (from, dim), (to, STRIP), STRIP, dim);
        }
        scratch.sums.as_mut_floats()[..QUERIES * self.values.width()].fill(0.0);
    }

    /// Unscaled scores of the keys `start..end`, or a few more.
    fn score(&self, start: usize, end: usize, stride: usize, scratch: &mut Scratch) {
        let dim = self.shape.head_dim;
        for half in start / HALF..end.div_ceil(HALF) {
            let product = Product {
                inputs: scratch.queries.as_slice(),
                strip_words: dim * STRIP,
                weights: &self.keys.as_slice()[half * HALF * dim..],
                steps: dim,
            };
            let to = &mut scratch.scores.as_mut_floats()[half * HALF - start..];
            multiply(self.isa, self.unit, product, Begin::Zero, Out::of(to, stride, QUERIES, HALF));
        }
    }

    /// Sums over the values of the keys `start..end`.
    fn mix(&self, start: usize, end: usize, stride: usize, scratch: &mut Scratch) {
        let width = self.values.width();
        for strip in 0..QUERIES / STRIP {
            let from = &scratch.scores.as_slice()[strip * STRIP * stride..];
            let to = &mut scratch.strips.as_mut_slice()[strip * STRIP * stride..];
            transpose(self.isa, (from, stride), (to, STRIP), STRIP, stride);
        }
        let length = block_length(self.rows);
        let sums = scratch.sums.as_mut_floats();
        for half in 0..width / HALF {
            let mut at = start;
            while at < end {
                let next = end.min((at / length + 1) * length);
                let product = Product {
                    inputs: &scratch.strips.as_slice()[(at - start) * STRIP..],
                    strip_words: stride * STRIP,
                    weights: self.values.from(half, at),
                    steps: next - at,
                };
                let out = Out::of(&mut sums[half * HALF..], width, QUERIES, HALF);
                multiply(self.isa, self.unit, product, Begin::ZeroThenAdd, out);
                at = next;
            }
        }
    }
}

/// Interleaved chains of a softmax's denominator.
const LANES: usize = 16;

for_each_isa! {
    /// Softmax of a row of scores, of which the query sees the keys from `seen[0]` to before `seen[1]`; zeros elsewhere.
    /// The row begins at a multiple of [`LANES`] keys. A sink takes part without a value.
    ///
    /// The denominator is sixteen chains by key position, folded in halves; the quotient is a product with its
    /// reciprocal.
    fn softmax(row: &mut [f32], seen: [usize; 2], scale: f32, sink: Option<f32>) softmax_of_row
}

#[inline(always)]
fn softmax_of_row(row: &mut [f32], [start, end]: [usize; 2], scale: f32, sink: Option<f32>) {
    let lines = start / LANES..end.div_ceil(LANES);
    row[..start].fill(0.0);
    row[end..].fill(0.0);
    row[lines.start * LANES..start].fill(f32::NEG_INFINITY);
    row[end..lines.end * LANES].fill(f32::NEG_INFINITY);
    let lines = &mut row.as_chunks_mut::<LANES>().0[lines];
    let mut most = [f32::NEG_INFINITY; LANES];
    for line in lines.iter_mut() {
        for (score, most) in line.iter_mut().zip(&mut most) {
            *score *= scale;
            // A NaN is passed over; the sum of exponentials has it.
            *most = if *score > *most { *score } else { *most };
        }
    }
    let largest = most.iter().copied().chain(sink).fold(f32::NEG_INFINITY, f32::max);
    let mut chains = [0.0_f32; LANES];
    for line in lines.iter_mut() {
        for (score, chain) in line.iter_mut().zip(&mut chains) {
            *score = exp(*score - largest);
            *chain += *score;
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            chains[lane] += chains[lane + width];
        }
        width /= 2;
    }
    let reciprocal = 1.0 / sink.map_or(chains[0], |sink| chains[0] + exp(sink - largest));
    lines.as_flattened_mut().iter_mut().for_each(|value| *value *= reciprocal);
}
