//! Values of a head as one side of a product: halves of [`HALF`] dimensions, steps over keys. Knows no softmax.

use super::KEYS;
use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;
use crate::cpu::math::round_bf16;
use crate::cpu::product::{HALF, Unit, Words};

/// Values of one head of a window.
pub(super) struct Values {
    unit: Unit,
    /// [half of dimensions][steps][[`HALF`]], zeros beyond the last dimension and up to the end of the last tile of keys.
    words: Words,
    /// Steps over all keys.
    steps: usize,
    /// Dimensions with those that fill the last half.
    width: usize,
}

impl Values {
    /// Packs `rows` values of `dim` dimensions; `value` says each.
    pub(super) fn pack<'a>(
        isa: Isa,
        unit: Unit,
        (rows, dim): (usize, usize),
        value: impl Fn(usize) -> &'a [f32] + Sync,
    ) -> Values {
        let steps = unit.steps(rows.next_multiple_of(KEYS));
        let width = dim.next_multiple_of(HALF);
        let mut words = Words::default();
        words.grow(width * steps);
        let step = unit.steps(2);
        let nothing = vec![0.0; dim];
        for pair in 0..rows.div_ceil(2) {
            let odd = if 2 * pair + 1 < rows { value(2 * pair + 1) } else { &nothing };
            let to = &mut words.as_mut_slice()[pair * step * HALF..];
            interleave(isa, unit, [value(2 * pair), odd], to, steps * HALF);
        }
        Values { unit, words, steps, width }
    }

    /// Dimensions with those that fill the last half: elements from one row of sums to the next.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Words of one half of the dimensions from key `key` on, which begins a pair.
    pub(super) fn from(&self, half: usize, key: usize) -> &[u32] {
        &self.words.as_slice()[(half * self.steps + self.unit.steps(key)) * HALF..]
    }
}

for_each_isa! {
    /// Words of two keys' values, a half of the dimensions every `stride`.
    fn interleave(unit: Unit, pair: [&[f32]; 2], to: &mut [u32], stride: usize) halves
}

#[inline(always)]
fn halves(unit: Unit, [even, odd]: [&[f32]; 2], to: &mut [u32], stride: usize) {
    for (half, (even, odd)) in even.chunks(HALF).zip(odd.chunks(HALF)).enumerate() {
        let (first, second) = to[half * stride..].split_at_mut(HALF);
        let words = first.iter_mut().zip(even.iter().zip(odd));
        match unit {
            Unit::Pair => words.for_each(|(word, (even, odd))| {
                *word = round_bf16(*even).to_bits() >> 16 | round_bf16(*odd).to_bits() & 0xffff_0000;
            }),
            Unit::SwappedFloat => words.zip(second).for_each(|((first, (even, odd)), second)| {
                *first = round_bf16(*odd).to_bits();
                *second = round_bf16(*even).to_bits();
            }),
            Unit::Float => words.zip(second).for_each(|((first, (even, odd)), second)| {
                *first = even.to_bits();
                *second = odd.to_bits();
            }),
            Unit::Quad | Unit::Short => unreachable!("values are floats"),
        }
    }
}
