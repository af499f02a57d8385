//! Products against their definition, one chain per output, on every instruction set that this machine has.

use super::*;
use crate::random::Random;

/// Inputs and weights of `k`, whole numbers where the unit is one of integers.
struct Sides {
    unit: Unit,
    k: usize,
    /// [rows][k].
    x: Vec<f32>,
    /// [outputs][k].
    w: Vec<f32>,
}

const ROWS: usize = 29;

impl Sides {
    fn of(unit: Unit, k: usize) -> Sides {
        let bf16 = |values: Vec<f32>| values.into_iter().map(crate::cpu::math::round_bf16).collect();
        let whole = |values: Vec<f32>, low: f32, high: f32| {
            values.iter().map(|x| (low + (x.abs() * 2.0).fract() * (high - low)).round()).collect()
        };
        let (x, w) = (Random::new(5).floats(ROWS * k), Random::new(6).floats(HALF * k));
        let (x, w) = match unit {
            Unit::Float => (x, w),
            Unit::SwappedFloat | Unit::Pair => (bf16(x), bf16(w)),
            Unit::Quad => (whole(x, 0.0, 255.0), whole(w, -128.0, 127.0)),
            Unit::Short => (whole(x, -512.0, 512.0), whole(w, -512.0, 512.0)),
        };
        Sides { unit, k, x, w }
    }

    /// Weights as a half: outputs are rows that are turned.
    fn half(&self, isa: Isa) -> Vec<u32> {
        let steps = self.unit.steps(self.k);
        let mut rows = vec![0; HALF * steps];
        pack_rows(isa, self.unit, &self.w, self.k, &mut rows, steps);
        let mut half = vec![0; steps * HALF];
        transpose(isa, (&rows, steps), (&mut half, HALF), HALF, steps);
        half
    }

    /// Bits of `columns` outputs of each row, cut into runs of k, beginning from `start`.
    fn multiply(&self, isa: Isa, begin: Begin, cuts: &[usize], columns: usize, start: f32) -> Vec<u32> {
        let fill = |rows: std::ops::Range<usize>, out: &mut [f32]| {
            out.copy_from_slice(&self.x[rows.start * self.k..rows.end * self.k]);
        };
        let strips = Strips::pack(isa, self.unit, (ROWS, self.k), fill);
        let half = self.half(isa);
        let stride = columns + 3;
        let mut out = vec![start; ROWS * stride];
        for run in cuts.windows(2) {
            let step = self.unit.steps(run[0]);
            let product = Product {
                inputs: strips.from(0, step),
                strip_words: strips.strip_words(),
                weights: &half[step * HALF..],
                steps: self.unit.steps(run[1] - run[0]),
            };
            multiply(isa, self.unit, product, begin, Out::of(&mut out, stride, ROWS, columns));
        }
        assert!(
            out.chunks(stride)
                .all(|row| row[columns..].iter().all(|value| value.to_bits() == start.to_bits()))
        );
        out.chunks(stride).flat_map(|row| &row[..columns]).map(|value| value.to_bits()).collect()
    }

    /// The definition: a fused multiply-add for each k in the unit's order, or an integer sum.
    fn chain(&self, row: usize, column: usize, k: std::ops::Range<usize>, start: f32) -> u32 {
        let (x, w) = (&self.x[row * self.k..][..self.k], &self.w[column * self.k..][..self.k]);
        let mut order: Vec<usize> = k.collect();
        match self.unit {
            Unit::Float => {}
            Unit::SwappedFloat | Unit::Pair => {
                order.chunks_exact_mut(2).for_each(|pair| pair.swap(0, 1));
            }
            Unit::Quad | Unit::Short => {
                let products = order.iter().map(|k| x[*k] as i32 * w[*k] as i32);
                return products.sum::<i32>().wrapping_add(start.to_bits().cast_signed()).cast_unsigned();
            }
        }
        order.into_iter().fold(start, |sum, k| x[k].mul_add(w[k], sum)).to_bits()
    }
}

/// Units that an instruction set multiplies, and the instruction sets that there are.
fn cases() -> impl Iterator<Item = (Isa, Unit)> {
    let units = |isa: Isa| {
        let mut units = vec![Unit::Float, Unit::SwappedFloat, Unit::Short];
        if isa == Isa::Avx512Bf16 {
            units.extend([Unit::Pair, Unit::Quad]);
        }
        units.into_iter().map(move |unit| (isa, unit))
    };
    Isa::here().flat_map(units)
}

#[test]
fn every_instruction_set_gives_the_bits_of_one_chain() {
    for ((isa, unit), k) in cases().flat_map(|case| [1, 2, 16, 64, 131].map(|k| (case, k))) {
        let sides = Sides::of(unit, k);
        // Whole and cut at a multiple of every word; whole and partial halves.
        let cut = k / 2 / 4 * 4;
        for (cuts, columns) in [(vec![0, k], HALF), (vec![0, cut, k], HALF), (vec![0, cut, k], 7)] {
            let found = sides.multiply(isa, Begin::Output, &cuts, columns, 0.25);
            for (at, found) in found.into_iter().enumerate() {
                let expected = sides.chain(at / columns, at % columns, 0..k, 0.25);
                assert_eq!(found, expected, "{isa:?} {unit:?} k {k} cut {cuts:?} at {at}");
            }
        }
    }
}

#[test]
fn a_chain_of_its_own_is_added_at_the_end() {
    for (isa, unit) in
        cases().filter(|(_, unit)| matches!(unit, Unit::Float | Unit::Pair | Unit::SwappedFloat))
    {
        let sides = Sides::of(unit, 48);
        let found = sides.multiply(isa, Begin::ZeroThenAdd, &[0, 32, 48], HALF, 3.0);
        for (at, found) in found.into_iter().enumerate() {
            let part = |k| f32::from_bits(sides.chain(at / HALF, at % HALF, k, 0.0));
            let expected = (3.0 + part(0..32)) + part(32..48);
            assert_eq!(found, expected.to_bits(), "{isa:?} {unit:?} at {at}");
        }
    }
}

/// `vdpbf16ps` is the one instruction that departs from the definition: it takes subnormal numbers, inputs, sums and
/// results, for zero. Everything else it rounds as a pair of fused multiply-adds.
#[test]
fn bf16_pairs_flush_subnormal_sums_and_nothing_else() {
    let tiny = f32::from_bits(0x1f80_0000); // 2^-64
    for isa in Isa::here() {
        let unit = Unit::floats(isa, Compute::Bf16);
        let sums = |x: f32, w: f32| {
            let sides = Sides { unit, k: 2, x: vec![x; 2 * ROWS], w: vec![w; 2 * HALF] };
            f32::from_bits(sides.multiply(isa, Begin::Zero, &[0, 2], HALF, 0.0)[0])
        };
        // 2 * 2^-126 is normal; 2 * 2^-128 is not.
        assert_eq!(sums(tiny, tiny * 4.0), f32::MIN_POSITIVE * 2.0, "{isa:?}");
        let subnormal = f32::MIN_POSITIVE / 2.0;
        let expected = if unit == Unit::Pair { 0.0 } else { subnormal };
        assert_eq!(sums(tiny, tiny), expected, "{isa:?}");
    }
}

/// Large operands lie in blocks that others have left full of anything: what is padding must be zero again.
#[test]
fn what_a_block_held_before_does_not_reach_a_sum() {
    const K: usize = 1003;
    const MANY: usize = 601;
    for (isa, unit) in cases() {
        let steps = unit.steps(K);
        let words = MANY.next_multiple_of(STRIP) * steps;
        // NaN as floats and as pairs, and no zero as integers.
        let mut stale = crate::cpu::recycle::WORDS.take(words);
        stale.fill(0xffff_ffff);
        crate::cpu::recycle::WORDS.give(stale);
        let strips = Strips::pack(isa, unit, (MANY, K), |_, out| out.fill(1.0));
        let reversed: Vec<u32> = (0..K as u32).rev().collect();
        for strips in [&strips, &strips.permuted(&reversed)] {
            let ones = Sides { unit, k: K, x: Vec::new(), w: vec![1.0; HALF * K] };
            let half = ones.half(isa);
            let product = Product {
                inputs: strips.from(0, 0),
                strip_words: strips.strip_words(),
                weights: &half,
                steps,
            };
            // Rows beyond the last are there as well, of zeros.
            let rows = MANY.next_multiple_of(STRIP);
            let mut out = vec![0.0_f32; rows * HALF];
            multiply(isa, unit, product, Begin::Zero, Out::of(&mut out, HALF, rows, HALF));
            for (at, found) in out.iter().enumerate() {
                let sum = if at / HALF < MANY { K } else { 0 };
                let found = match unit {
                    Unit::Quad | Unit::Short => found.to_bits() as usize,
                    Unit::Float | Unit::SwappedFloat | Unit::Pair => *found as usize,
                };
                assert_eq!(found, sum, "{isa:?} {unit:?} at {at}");
            }
        }
    }
}
