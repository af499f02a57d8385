//! Inputs of products: strips of [`STRIP`] rows, one word of each row after the other, step by step along k.
#![expect(unsafe_code, reason = "floats are looked at as words")]

use std::ops::Range;

use rayon::prelude::*;

use super::{STRIP, Unit, transpose};
use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;
use crate::cpu::math::round_bf16;
use crate::cpu::recycle::WORDS;

/// Words that begin a cache line, so that no vector load crosses one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Words {
    lines: Vec<Line>,
}

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u32; 16]);

impl Words {
    /// At least `count` words, all zero where they are new.
    pub(crate) fn grow(&mut self, count: usize) {
        let lines = count.div_ceil(16);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 16]));
        }
    }

    pub(crate) fn as_slice(&self) -> &[u32] {
        // SAFETY: a line is 16 words.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), 16 * self.lines.len()) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u32] {
        // SAFETY: a line is 16 words.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), 16 * self.lines.len()) }
    }

    /// The words as the floats that they are the bits of.
    pub(crate) fn as_floats(&self) -> &[f32] {
        // SAFETY: as in `as_slice`; every word is a float.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), 16 * self.lines.len()) }
    }

    /// As [`Words::as_floats`].
    pub(crate) fn as_mut_floats(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_floats`.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), 16 * self.lines.len()) }
    }
}

/// Packed inputs, `rows` by `k`.
#[derive(Clone, Debug)]
pub(crate) struct Strips {
    pub(crate) unit: Unit,
    pub(crate) rows: usize,
    pub(crate) k: usize,
    /// [strip][steps][`STRIP`]; rows beyond the last are zero, and so is k.
    words: Vec<u32>,
}

impl Drop for Strips {
    fn drop(&mut self) {
        WORDS.give(std::mem::take(&mut self.words));
    }
}

impl Strips {
    /// Packs what `fill` writes: the rows that it is asked for, [rows, k] row-major, into anything. Integers come as
    /// floats, those of a [`Unit::Quad`] within 0..=255.
    pub(crate) fn pack(
        isa: Isa,
        unit: Unit,
        (rows, k): (usize, usize),
        fill: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) -> Strips {
        let mut nothing = vec![(); rows];
        Strips::pack_beside(isa, unit, (rows, k), &mut nothing, |row, out, _| fill(row..row + 1, out))
    }

    /// As [`Strips::pack`], row by row, for a `fill` that also writes what it finds of a row: `beside` holds as much for
    /// each of them.
    pub(crate) fn pack_beside<T: Send>(
        isa: Isa,
        unit: Unit,
        (rows, k): (usize, usize),
        beside: &mut [T],
        fill: impl Fn(usize, &mut [f32], &mut [T]) + Sync,
    ) -> Strips {
        let row_words = |row: usize, values: &mut [f32], words: &mut [u32], beside: &mut [T]| {
            fill(row, values, beside);
            pack_rows(isa, unit, values, k, words, unit.steps(k));
        };
        Strips::from_rows(isa, unit, (rows, k), beside, row_words)
    }

    /// Packs rows as they are, [rows, k] row-major.
    pub(crate) fn of(isa: Isa, unit: Unit, (rows, k): (usize, usize), values: &[f32]) -> Strips {
        let row_words = |row: usize, _: &mut [f32], words: &mut [u32], _: &mut [()]| {
            pack_rows(isa, unit, &values[row * k..(row + 1) * k], k, words, unit.steps(k));
        };
        Strips::from_rows(isa, unit, (rows, k), &mut vec![(); rows], row_words)
    }

    /// Strips of rows whose words `row_words` writes, by way of `k` values that it may use as it likes.
    fn from_rows<T: Send>(
        isa: Isa,
        unit: Unit,
        (rows, k): (usize, usize),
        beside: &mut [T],
        row_words: impl Fn(usize, &mut [f32], &mut [u32], &mut [T]) + Sync,
    ) -> Strips {
        let steps = unit.steps(k);
        let mut words = WORDS.take(rows.div_ceil(STRIP) * steps * STRIP);
        let per_row = (beside.len() / rows.max(1)).max(1);
        // One row of values at a time stays in the first-level cache until it is packed.
        let scratch = || (vec![0.0_f32; k], vec![0_u32; STRIP * steps]);
        let strips = words.par_chunks_mut((steps * STRIP).max(1)).zip(beside.par_chunks_mut(STRIP * per_row));
        strips.enumerate().for_each_init(scratch, |(values, by_row), (strip, (words, beside))| {
            let rows = by_row.chunks_exact_mut(steps).zip(beside.chunks_mut(per_row));
            let mut count = 0;
            for (row, (words, beside)) in rows.enumerate() {
                row_words(strip * STRIP + row, values, words, beside);
                count = row + 1;
            }
            if count < STRIP {
                words.fill(0);
            }
            transpose(isa, (by_row, steps), (words, STRIP), count, steps);
        });
        Strips { unit, rows, k, words }
    }

    /// Words along k.
    pub(crate) fn steps(&self) -> usize {
        self.unit.steps(self.k)
    }

    /// Words of one strip.
    pub(crate) fn strip_words(&self) -> usize {
        self.steps() * STRIP
    }

    /// Words from the strip of row `row` on, which begins one, and from step `step` on.
    pub(crate) fn from(&self, row: usize, step: usize) -> &[u32] {
        debug_assert!(row.is_multiple_of(STRIP));
        &self.words[row / STRIP * self.strip_words() + step * STRIP..]
    }

    /// The same inputs with k in another order: the new k `j` is the old `permutation[j]`.
    pub(crate) fn permuted(&self, permutation: &[u32]) -> Strips {
        let (unit, steps) = (self.unit, self.steps());
        let mut words = WORDS.take(self.words.len());
        words.fill(0);
        let strips = self.words.par_chunks((steps * STRIP).max(1));
        words.par_chunks_mut((steps * STRIP).max(1)).zip(strips).for_each(|(to, from)| {
            for (k, input) in permutation.iter().enumerate() {
                let (to_step, to_shift, mask) = place(unit, k);
                let (from_step, from_shift, _) = place(unit, *input as usize);
                let from = &from[from_step * STRIP..][..STRIP];
                for (to, from) in to[to_step * STRIP..][..STRIP].iter_mut().zip(from) {
                    *to |= (from >> from_shift & mask) << to_shift;
                }
            }
        });
        Strips { words, ..*self }
    }

    /// Sums of the integers of each run of `step` k: [rows, runs].
    pub(crate) fn sums(&self, step: usize) -> Vec<i32> {
        let runs = self.k.div_ceil(step);
        let mut sums = vec![0_i32; self.rows * runs];
        sums.par_chunks_mut((STRIP * runs).max(1)).enumerate().for_each(|(strip, sums)| {
            let words = self.from(strip * STRIP, 0);
            for k in 0..self.k {
                let (at, shift, mask) = place(self.unit, k);
                for (row, sums) in sums.chunks_exact_mut(runs).enumerate() {
                    let word = words[at * STRIP + row] >> shift & mask;
                    sums[k / step] += match self.unit {
                        Unit::Quad => word.cast_signed(),
                        Unit::Short => i32::from(word as u16 as i16),
                        Unit::Float | Unit::SwappedFloat | Unit::Pair => {
                            unreachable!("floats are not integers")
                        }
                    };
                }
            }
        });
        sums
    }

    /// The inputs as they were packed, [rows, k] row-major; integers as floats.
    #[cfg(test)]
    pub(crate) fn values(&self) -> Vec<f32> {
        let at = |row: usize, k: usize| {
            let (step, shift, mask) = place(self.unit, k);
            let word = self.from(row - row % STRIP, step)[row % STRIP] >> shift & mask;
            match self.unit {
                Unit::Float | Unit::SwappedFloat => f32::from_bits(word),
                Unit::Pair => f32::from_bits(word << 16),
                Unit::Quad => word as f32,
                Unit::Short => f32::from(word as u16 as i16),
            }
        };
        (0..self.rows).flat_map(|row| (0..self.k).map(move |k| at(row, k))).collect()
    }
}

/// Where an element of k is: its step, and the shift and mask inside the word.
const fn place(unit: Unit, k: usize) -> (usize, u32, u32) {
    match unit {
        Unit::Float => (k, 0, u32::MAX),
        Unit::SwappedFloat => (k ^ 1, 0, u32::MAX),
        Unit::Pair | Unit::Short => (k / 2, 16 * (k as u32 % 2), 0xffff),
        Unit::Quad => (k / 4, 8 * (k as u32 % 4), 0xff),
    }
}

/// Rows of values, [rows, k], as words, [rows, steps].
pub(crate) fn pack_rows(isa: Isa, unit: Unit, values: &[f32], k: usize, words: &mut [u32], steps: usize) {
    for (values, words) in values.chunks_exact(k.max(1)).zip(words.chunks_exact_mut(steps.max(1))) {
        match unit {
            Unit::Float => pack_floats(isa, values, words),
            Unit::SwappedFloat => pack_swapped(isa, values, words),
            Unit::Pair => pack_pairs(isa, values, words),
            Unit::Quad => pack_quads(isa, values, words),
            Unit::Short => pack_shorts(isa, values, words),
        }
    }
}

for_each_isa! {
    /// Words of [`Unit::Float`].
    fn pack_floats(values: &[f32], words: &mut [u32]) floats
}

for_each_isa! {
    /// Words of [`Unit::SwappedFloat`]; a last k without a partner comes after a zero.
    fn pack_swapped(values: &[f32], words: &mut [u32]) swapped
}

for_each_isa! {
    /// Words of [`Unit::Pair`], rounded to bf16.
    fn pack_pairs(values: &[f32], words: &mut [u32]) pairs
}

for_each_isa! {
    /// Words of [`Unit::Quad`].
    fn pack_quads(values: &[f32], words: &mut [u32]) quads
}

for_each_isa! {
    /// Words of [`Unit::Short`].
    fn pack_shorts(values: &[f32], words: &mut [u32]) shorts
}

#[inline(always)]
fn floats(values: &[f32], words: &mut [u32]) {
    words.iter_mut().zip(values).for_each(|(word, value)| *word = value.to_bits());
}

#[inline(always)]
fn swapped(values: &[f32], words: &mut [u32]) {
    let (pairs, last) = values.as_chunks::<2>();
    for ([even, odd], words) in pairs.iter().zip(words.chunks_exact_mut(2)) {
        words[0] = round_bf16(*odd).to_bits();
        words[1] = round_bf16(*even).to_bits();
    }
    if let ([last], [.., before, word]) = (last, words) {
        *before = 0;
        *word = round_bf16(*last).to_bits();
    }
}

#[inline(always)]
fn pairs(values: &[f32], words: &mut [u32]) {
    let (pairs, last) = values.as_chunks::<2>();
    for ([even, odd], word) in pairs.iter().zip(words.iter_mut()) {
        *word = round_bf16(*even).to_bits() >> 16 | round_bf16(*odd).to_bits() & 0xffff_0000;
    }
    if let ([last], [.., word]) = (last, words) {
        *word = round_bf16(*last).to_bits() >> 16;
    }
}

/// A whole number of at most 2^22 in magnitude, in two's complement: the low bits of the sum with 1.5 * 2^23. Unlike a
/// conversion it needs no care of what is out of range.
#[inline(always)]
fn whole(value: f32) -> u32 {
    (value + 12_582_912.0).to_bits()
}

#[inline(always)]
fn quads(values: &[f32], words: &mut [u32]) {
    let byte = |value: f32| whole(value) & 0xff;
    let (quads, last) = values.as_chunks::<4>();
    for ([a, b, c, d], word) in quads.iter().zip(words.iter_mut()) {
        *word = byte(*a) | byte(*b) << 8 | byte(*c) << 16 | byte(*d) << 24;
    }
    if let ([_, ..], [.., word]) = (last, words) {
        *word = last.iter().rev().fold(0, |word, value| word << 8 | byte(*value));
    }
}

#[inline(always)]
fn shorts(values: &[f32], words: &mut [u32]) {
    let short = |value: f32| whole(value) & 0xffff;
    let (pairs, last) = values.as_chunks::<2>();
    for ([even, odd], word) in pairs.iter().zip(words.iter_mut()) {
        *word = short(*even) | short(*odd) << 16;
    }
    if let ([last], [.., word]) = (last, words) {
        *word = short(*last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_found_again_in_any_order_of_k() {
        let units = [Unit::Float, Unit::SwappedFloat, Unit::Pair, Unit::Quad, Unit::Short];
        for (unit, rows, k) in
            units.into_iter().flat_map(|unit| [(unit, 1, 1), (unit, 12, 16), (unit, 29, 37)])
        {
            // Small whole numbers are exact in every unit.
            let value = |row: usize, k: usize| ((row * 31 + k * 7) % 200) as f32;
            let fill = |rows: Range<usize>, out: &mut [f32]| {
                let places = rows.flat_map(|row| (0..k).map(move |k| (row, k)));
                out.iter_mut().zip(places).for_each(|(out, (row, k))| *out = value(row, k));
            };
            for isa in Isa::here() {
                let strips = Strips::pack(isa, unit, (rows, k), fill);
                let expected = |order: &dyn Fn(usize) -> usize| -> Vec<f32> {
                    (0..rows)
                        .flat_map(|row| (0..k).map(move |k| (row, k)))
                        .map(|(row, k)| value(row, order(k)))
                        .collect()
                };
                assert_eq!(strips.values(), expected(&|k| k), "{isa:?} {unit:?} {rows} x {k}");
                let reversed: Vec<u32> = (0..k as u32).rev().collect();
                assert_eq!(
                    strips.permuted(&reversed).values(),
                    expected(&|at| k - 1 - at),
                    "{isa:?} {unit:?}"
                );
            }
        }
    }
}
