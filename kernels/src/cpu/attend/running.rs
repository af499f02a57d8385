//! Attention with a running maximum, over tiles of 64 keys that ascend from the window's start: bf16 operands.
//!
//! Scores are products of strips of keys and halves of queries, so that lanes are queries: maxima, exponentials and sums
//! over keys need nothing from their neighbours. Strips of keys do not end where tiles do; what is left of one stays for
//! the next tile.

use std::ops::Range;

use super::tile::{self, Tile, fold};
use super::{Block, KEYS, Method, cap_scores};
use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;
use crate::cpu::product::{
    Begin, HALF, Out, Product, STRIP, Strips, Unit, Words, multiply, pack_rows, transpose,
};

/// Keys after which strips end where tiles do: scores of a key lie at its position modulo this.
const RUN: usize = 192;

/// Queries of a block: whole strips and whole halves.
const QUERIES: usize = 96;

const HALVES: usize = QUERIES / HALF;

/// Running maximum and tiles of keys.
pub(super) struct Running;

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    rows: Vec<f32>,
    row_words: Vec<u32>,
    /// [half of queries][steps over dimensions][[`HALF`]].
    queries: Words,
    /// [half of queries][[`RUN`]][[`HALF`]].
    scores: Words,
    /// Strips of keys whose scores have been computed, for each half of queries.
    scored: [usize; HALVES],
    /// [strip][steps over keys][[`STRIP`]].
    probabilities: Words,
    /// [[`QUERIES`]][width].
    sums: Words,
    largest: Vec<f32>,
    total: Vec<f32>,
    /// What sums are multiplied with before a tile is added.
    shrink: Vec<f32>,
}

impl Method for Running {
    const QUERIES: usize = QUERIES;
    type Keys = Strips;
    type Scratch = Scratch;

    fn pack<'a>(
        isa: Isa,
        unit: Unit,
        (rows, dim): (usize, usize),
        key: impl Fn(usize) -> &'a [f32] + Sync,
    ) -> Strips {
        Strips::pack(isa, unit, (rows, dim), |rows, to| {
            rows.zip(to.chunks_exact_mut(dim)).for_each(|(row, to)| to.copy_from_slice(key(row)));
        })
    }

    fn block<'a>(block: &Block<'_, Strips>, scratch: &'a mut Scratch) -> &'a [f32] {
        block.begin(scratch);
        let seen = block.seen_by(block.first..block.first + QUERIES);
        for tile in seen.start / KEYS..seen.end.div_ceil(KEYS) {
            for half in 0..HALVES {
                block.weigh(tile, half, scratch);
            }
            block.mix(tile, scratch);
        }
        let width = block.values.width();
        let sums = &mut scratch.sums.as_mut_floats()[..QUERIES * width];
        divide(block.isa, sums, &scratch.total, width);
        sums
    }
}

impl Block<'_, Strips> {
    /// Packs the queries; nothing is summed yet. A sink is a score whose value is 0.
    fn begin(&self, scratch: &mut Scratch) {
        let dim = self.shape.head_dim;
        let steps = self.unit.steps(dim);
        scratch.rows.resize(HALF * dim, 0.0);
        scratch.row_words.resize(HALF * steps, 0);
        scratch.queries.grow(QUERIES * steps);
        scratch.scores.grow(HALVES * RUN * HALF);
        scratch.probabilities.grow(self.unit.steps(KEYS) * QUERIES);
        scratch.sums.grow(QUERIES * self.values.width());
        for half in 0..HALVES {
            self.copy_queries(self.half(half), &mut scratch.rows);
            pack_rows(self.isa, self.unit, &scratch.rows, dim, &mut scratch.row_words, steps);
            let to = &mut scratch.queries.as_mut_slice()[half * steps * HALF..];
            transpose(self.isa, (&scratch.row_words, steps), (to, HALF), HALF, steps);
        }
        scratch.scored = [0; HALVES];
        scratch.sums.as_mut_floats()[..QUERIES * self.values.width()].fill(0.0);
        let (largest, total) = self.sink.map_or((f32::NEG_INFINITY, 0.0), |sink| (sink, 1.0));
        scratch.largest.clear();
        scratch.largest.resize(QUERIES, largest);
        scratch.total.clear();
        scratch.total.resize(QUERIES, total);
        scratch.shrink.resize(QUERIES, 1.0);
    }

    /// Positions of a half of the queries.
    fn half(&self, half: usize) -> Range<usize> {
        self.first + half * HALF..self.first + (half + 1) * HALF
    }

    /// Probabilities of a tile for one half of the queries.
    fn weigh(&self, index: usize, half: usize, scratch: &mut Scratch) {
        let positions = self.half(half);
        let seen = self.seen_by(positions.clone());
        let first = index * KEYS;
        let keys = seen.start.max(first)..seen.end.min(first + KEYS);
        let columns = half * HALF..(half + 1) * HALF;
        let steps = self.unit.steps(KEYS);
        if keys.is_empty() || !self.any(&positions) {
            self.clear(columns, scratch);
            return;
        }
        self.score(&keys, half, scratch);
        let scores = &mut scratch.scores.as_mut_floats()[(half * RUN + first % RUN) * HALF..][..KEYS * HALF];
        if let Some(cap) = self.softcap {
            scores.iter_mut().for_each(|score| *score *= self.scale());
            cap_scores(scores, cap);
        }
        let all = first + KEYS <= positions.start + 1 && self.seen(positions.end - 1).start <= first;
        let part = Tile {
            scores,
            scale: if self.softcap.is_some() { 1.0 } else { self.scale() },
            seen: (!all).then(|| std::array::from_fn(|lane| self.seen_inside(positions.start + lane, first))),
            largest: &mut scratch.largest[columns.clone()],
            total: &mut scratch.total[columns.clone()],
            shrink: &mut scratch.shrink[columns.clone()],
            probabilities: &mut scratch.probabilities.as_mut_slice()[columns.start / STRIP * steps * STRIP..],
            row: columns.start % STRIP,
        };
        fold(self.isa, self.unit, part);
    }

    /// Some queries see nothing of a tile: their probabilities are zero, for others may lie in their strips.
    fn clear(&self, columns: Range<usize>, scratch: &mut Scratch) {
        let words = self.unit.steps(KEYS) * STRIP;
        scratch.shrink[columns.clone()].fill(1.0);
        for query in columns.step_by(tile::RUN) {
            let strip = &mut scratch.probabilities.as_mut_slice()[query / STRIP * words..][..words];
            let (runs, first) = (strip.as_chunks_mut::<{ tile::RUN }>().0, query % STRIP / tile::RUN);
            runs.iter_mut().skip(first).step_by(STRIP / tile::RUN).for_each(|run| *run = [0; tile::RUN]);
        }
    }

    /// The part of a tile that a position sees: how many keys of the tile come before it, and how many it has.
    fn seen_inside(&self, position: usize, first: usize) -> [u32; 2] {
        let inside = |key: usize| key.clamp(first, first + KEYS) - first;
        let seen = self.seen(position);
        let (start, end) = (inside(seen.start), inside(seen.end.min(self.rows)));
        [start as u32, end.saturating_sub(start) as u32]
    }

    /// Unscaled scores of the keys `keys` of a tile, and of what else is in their strips, against one half of the
    /// queries.
    fn score(&self, keys: &Range<usize>, half: usize, scratch: &mut Scratch) {
        let strips = scratch.scored[half].max(keys.start / STRIP)..keys.end.div_ceil(STRIP);
        if strips.is_empty() {
            return;
        }
        scratch.scored[half] = strips.end;
        let steps = self.keys.steps();
        let product = Product {
            inputs: self.keys.from(strips.start * STRIP, 0),
            strip_words: self.keys.strip_words(),
            weights: &scratch.queries.as_slice()[half * steps * HALF..],
            steps,
        };
        let to = &mut scratch.scores.as_mut_floats()[(half * RUN + strips.start * STRIP % RUN) * HALF..];
        multiply(self.isa, self.unit, product, Begin::Zero, Out::of(to, HALF, strips.len() * STRIP, HALF));
    }

    /// Adds the products of a tile's probabilities with its values.
    fn mix(&self, tile: usize, scratch: &mut Scratch) {
        let width = self.values.width();
        let steps = self.unit.steps(KEYS);
        let sums = &mut scratch.sums.as_mut_floats()[..QUERIES * width];
        rescale(self.isa, sums, &scratch.shrink, width);
        for (strips, keys) in self.strip_runs(tile) {
            for half in 0..width / HALF {
                let product = Product {
                    inputs: &scratch.probabilities.as_slice()[strips.start * steps * STRIP..],
                    strip_words: steps * STRIP,
                    weights: self.values.from(half, tile * KEYS),
                    steps: self.unit.steps(keys),
                };
                let to = &mut sums[strips.start * STRIP * width + half * HALF..];
                let out = Out::of(to, width, strips.len() * STRIP, HALF);
                multiply(self.isa, self.unit, product, Begin::Output, out);
            }
        }
    }

    /// Strips of queries that see the same keys of a tile, as far as whole strips go, and how many keys from its first on
    /// those are.
    fn strip_runs(&self, tile: usize) -> Vec<(Range<usize>, usize)> {
        let first = tile * KEYS;
        let mut runs: Vec<(Range<usize>, usize)> = Vec::new();
        for strip in 0..QUERIES / STRIP {
            let positions = self.first + strip * STRIP..self.first + (strip + 1) * STRIP;
            let seen = self.seen_by(positions.clone());
            if !self.any(&positions) || seen.end <= first || seen.start >= first + KEYS {
                continue;
            }
            let keys = (seen.end - first).min(KEYS);
            match runs.last_mut() {
                Some((strips, same)) if strips.end == strip && *same == keys => strips.end += 1,
                Some(_) | None => runs.push((strip..strip + 1, keys)),
            }
        }
        runs
    }
}

for_each_isa! {
    /// Multiplies each row of sums with its factor.
    fn rescale(sums: &mut [f32], factors: &[f32], width: usize) multiply_rows
}

#[inline(always)]
fn multiply_rows(sums: &mut [f32], factors: &[f32], width: usize) {
    for (sums, factor) in sums.chunks_exact_mut(width).zip(factors) {
        // Most maxima stay, and a product with 1 changes nothing.
        if *factor != 1.0 {
            sums.iter_mut().for_each(|sum| *sum *= factor);
        }
    }
}

for_each_isa! {
    /// Divides each row of sums by its total.
    fn divide(sums: &mut [f32], totals: &[f32], width: usize) divide_rows
}

#[inline(always)]
fn divide_rows(sums: &mut [f32], totals: &[f32], width: usize) {
    for (sums, total) in sums.chunks_exact_mut(width).zip(totals) {
        sums.iter_mut().for_each(|sum| *sum /= total);
    }
}
