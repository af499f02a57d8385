//! Scores of one tile of keys to probabilities under a running maximum, for [`HALF`] queries side by side. Lanes are
//! queries; knows neither products nor where a tile lies.
//!
//! Maxima, exponentials and denominators are f32. Probabilities are rounded to bf16 as operands, the denominator sums the
//! unrounded ones.

use super::KEYS;
use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;
use crate::cpu::math::exp_fast;
use crate::cpu::product::{HALF, Unit};

/// Chains of a tile's part of the denominator: keys go round them.
const CHAINS: usize = 16;

/// One tile of keys and [`HALF`] queries.
pub(super) struct Tile<'a> {
    /// [[`KEYS`]][[`HALF`]], lost afterwards.
    pub(super) scores: &'a mut [f32],
    pub(super) scale: f32,
    /// For each query the first key that it sees and how many; `None` where every query sees every key.
    pub(super) seen: Option<[[u32; 2]; HALF]>,
    /// Largest score so far, and the sum of exponentials under it.
    pub(super) largest: &'a mut [f32],
    pub(super) total: &'a mut [f32],
    /// What sums made so far are to be multiplied with.
    pub(super) shrink: &'a mut [f32],
    /// Words of inputs, a step every `stride`.
    pub(super) probabilities: &'a mut [u32],
    pub(super) stride: usize,
}

/// Turns scores into probabilities, and moves maxima and denominators on.
pub(super) fn fold(isa: Isa, unit: Unit, tile: Tile<'_>) {
    match unit {
        Unit::Pair => fold_pairs(isa, tile),
        Unit::SwappedFloat => fold_swapped(isa, tile),
        Unit::Float | Unit::Quad | Unit::Short => unreachable!("a running maximum is for bf16 operands"),
    }
}

for_each_isa! {
    /// [`fold`] to [`Unit::Pair`].
    fn fold_pairs(tile: Tile<'_>) body::<true>
}

for_each_isa! {
    /// [`fold`] to [`Unit::SwappedFloat`].
    fn fold_swapped(tile: Tile<'_>) body::<false>
}

type Lanes = [f32; HALF];

#[inline(always)]
fn body<const PAIRS: bool>(tile: Tile<'_>) {
    let Tile { scores, scale, seen, largest, total, shrink, probabilities, stride } = tile;
    let scores = scores.as_chunks_mut::<HALF>().0;
    let (scores, _) = scores.as_chunks_mut::<KEYS>();
    let [scores] = scores else { unreachable!("one tile of scores") };
    let first = <&mut Lanes>::try_from(largest).expect("one lane a query");
    let total = <&mut Lanes>::try_from(total).expect("one lane a query");
    let shrink = <&mut Lanes>::try_from(shrink).expect("one lane a query");
    if let Some(seen) = seen {
        hide(scores, &seen);
    }
    let new = most(scores, scale, first);
    let mut origin = new;
    for lane in 0..HALF {
        // A query that has seen no key yet: its exponentials must be 0.
        origin[lane] = if new[lane] == f32::NEG_INFINITY { 0.0 } else { new[lane] };
        shrink[lane] = exp_fast(first[lane] - origin[lane]);
        // Not moved, be it infinite.
        shrink[lane] = if first[lane] == new[lane] { 1.0 } else { shrink[lane] };
    }
    *first = new;
    let sum = exponentials::<PAIRS>(scores, &origin, probabilities, stride);
    for lane in 0..HALF {
        total[lane] = total[lane] * shrink[lane] + sum[lane];
    }
}

/// Minus infinity where a query does not see a key, whatever is there.
#[inline(always)]
fn hide(scores: &mut [Lanes; KEYS], seen: &[[u32; 2]; HALF]) {
    let start: [u32; HALF] = std::array::from_fn(|lane| seen[lane][0]);
    let count: [u32; HALF] = std::array::from_fn(|lane| seen[lane][1]);
    for (key, scores) in scores.iter_mut().enumerate() {
        for lane in 0..HALF {
            let hidden = (key as u32).wrapping_sub(start[lane]) >= count[lane];
            scores[lane] = if hidden { f32::NEG_INFINITY } else { scores[lane] };
        }
    }
}

/// The larger; `b` where `a` is NaN. A NaN among scores shows in the sum of exponentials.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Scales scores; the largest of them and of those before.
#[inline(always)]
fn most(scores: &mut [Lanes; KEYS], scale: f32, before: &Lanes) -> Lanes {
    let mut largest = *before;
    for [a, b, c, d] in scores.as_chunks_mut::<4>().0 {
        for lane in 0..HALF {
            a[lane] *= scale;
            b[lane] *= scale;
            c[lane] *= scale;
            d[lane] *= scale;
            let four = larger(larger(a[lane], b[lane]), larger(c[lane], d[lane]));
            largest[lane] = larger(four, largest[lane]);
        }
    }
    largest
}

/// Writes exponentials as operands and returns their sum: sixteen interleaved chains, added up first to last.
#[inline(always)]
fn exponentials<const PAIRS: bool>(
    scores: &[Lanes; KEYS],
    origin: &Lanes,
    to: &mut [u32],
    stride: usize,
) -> Lanes {
    let mut sum = [0.0_f32; HALF];
    for chain in (0..CHAINS).step_by(2) {
        let mut even_chain = [0.0_f32; HALF];
        let mut odd_chain = [0.0_f32; HALF];
        for key in (chain..KEYS).step_by(CHAINS) {
            let (even, odd) = (&scores[key], &scores[key + 1]);
            let mut words = [[0_u32; HALF]; 2];
            for lane in 0..HALF {
                let even = exp_fast(even[lane] - origin[lane]);
                let odd = exp_fast(odd[lane] - origin[lane]);
                even_chain[lane] += even;
                odd_chain[lane] += odd;
                let (even, odd) = (rounded(even), rounded(odd));
                if PAIRS {
                    words[0][lane] = even >> 16 | odd & 0xffff_0000;
                } else {
                    words[0][lane] = odd & 0xffff_0000;
                    words[1][lane] = even & 0xffff_0000;
                }
            }
            if PAIRS {
                to[key / 2 * stride..][..HALF].copy_from_slice(&words[0]);
            } else {
                to[key * stride..][..HALF].copy_from_slice(&words[0]);
                to[(key + 1) * stride..][..HALF].copy_from_slice(&words[1]);
            }
        }
        for lane in 0..HALF {
            sum[lane] += even_chain[lane];
            sum[lane] += odd_chain[lane];
        }
    }
    sum
}

/// Bits of the nearest bf16 in the upper half. A NaN may become anything: the denominator has it too.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1))
}
