//! Scores of one tile of keys to probabilities under a running maximum, for [`HALF`] queries side by side. Lanes are
//! queries; knows neither products nor where a tile lies.
//!
//! Maxima, exponentials and denominators are f32. Probabilities are rounded to bf16 as operands, the denominator sums the
//! unrounded ones.

use super::KEYS;
use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;
use crate::cpu::math::{exp_fast, round_bf16};
use crate::cpu::product::{HALF, STRIP, Unit};

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
    /// Strips of inputs, [strip][steps][[`STRIP`]] from the strip on that the first query lies in.
    pub(super) probabilities: &'a mut [u32],
    /// The first query's row of its strip, a multiple of [`RUN`].
    pub(super) row: usize,
}

/// Queries that no strip and no tile divides.
pub(super) const RUN: usize = 4;

/// Turns scores into probabilities, and moves maxima and denominators on.
pub(super) fn fold(isa: Isa, unit: Unit, tile: Tile<'_>) {
    match unit {
        Unit::Pair => fold_pairs(isa, tile),
        Unit::SwappedFloat => fold_swapped(isa, tile),
        Unit::Float | Unit::Quad | Unit::Short => unreachable!("a running maximum is for bf16 operands"),
    }
}

for_each_isa! {
    /// [`fold`] to [`Unit::Pair`], which the other instruction sets have no operands of.
    fn fold_pairs(tile: Tile<'_>) {
        avx512bf16: body::<true>,
        avx512: no_such_unit,
        avx2: no_such_unit,
        portable: no_such_unit,
    }
}

fn no_such_unit(_: Tile<'_>) {
    unreachable!("operands are packed for the instruction set that multiplies them");
}

for_each_isa! {
    /// [`fold`] to [`Unit::SwappedFloat`].
    fn fold_swapped(tile: Tile<'_>) body::<false>
}

type Lanes = [f32; HALF];

#[inline(always)]
fn body<const PAIRS: bool>(tile: Tile<'_>) {
    let Tile { scores, scale, seen, largest, total, shrink, probabilities, row } = tile;
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
    let sum = exponentials::<PAIRS>(scores, &origin, probabilities, row);
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
    row: usize,
) -> Lanes {
    const { assert!(HALF.is_multiple_of(RUN) && STRIP.is_multiple_of(RUN)) };
    let to = to.as_chunks_mut::<RUN>().0;
    let steps = if PAIRS { KEYS / 2 } else { KEYS };
    // Where each run of queries lies at the first step.
    let places: [usize; HALF / RUN] = std::array::from_fn(|run| {
        let row = row + run * RUN;
        (row / STRIP * steps * STRIP + row % STRIP) / RUN
    });
    let mut sum = [0.0_f32; HALF];
    for chain in (0..CHAINS).step_by(2) {
        let mut even_chain = [0.0_f32; HALF];
        let mut odd_chain = [0.0_f32; HALF];
        for key in (chain..KEYS).step_by(CHAINS) {
            let (even, odd) = (&scores[key], &scores[key + 1]);
            let (mut even_powers, mut odd_powers) = ([0.0_f32; HALF], [0.0_f32; HALF]);
            for lane in 0..HALF {
                even_powers[lane] = exp_fast(even[lane] - origin[lane]);
                odd_powers[lane] = exp_fast(odd[lane] - origin[lane]);
                even_chain[lane] += even_powers[lane];
                odd_chain[lane] += odd_powers[lane];
            }
            let words = words::<PAIRS>(&even_powers, &odd_powers);
            let step = if PAIRS { key / 2 } else { key };
            for (run, place) in places.iter().enumerate() {
                let at = place + step * (STRIP / RUN);
                to[at].copy_from_slice(&words[0][run * RUN..][..RUN]);
                if !PAIRS {
                    to[at + STRIP / RUN].copy_from_slice(&words[1][run * RUN..][..RUN]);
                }
            }
        }
        for lane in 0..HALF {
            sum[lane] += even_chain[lane];
            sum[lane] += odd_chain[lane];
        }
    }
    sum
}

/// Words of two keys: the pairs and nothing, or the odd one and the even one.
#[inline(always)]
fn words<const PAIRS: bool>(even: &Lanes, odd: &Lanes) -> [[u32; HALF]; 2] {
    let mut words = [[0; HALF]; 2];
    if PAIRS {
        words[0] = pairs(even, odd);
    } else {
        words[0].iter_mut().zip(odd).for_each(|(word, odd)| *word = round_bf16(*odd).to_bits());
        words[1].iter_mut().zip(even).for_each(|(word, even)| *word = round_bf16(*even).to_bits());
    }
    words
}

/// Words of [`Unit::Pair`], rounded as by `round_bf16`; no exponential is subnormal.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[expect(unsafe_code, reason = "vector instructions need their instruction set")]
fn pairs(even: &Lanes, odd: &Lanes) -> [u32; HALF] {
    use std::arch::x86_64::*;
    let mut words = [0_u32; HALF];
    // SAFETY: pairs are for processors that multiply them; a vector is 16 lanes, of which there are two in each array.
    unsafe {
        // All even ones lie before all odd ones.
        let order: [u16; HALF] = std::array::from_fn(|half| half as u16 / 2 + half as u16 % 2 * 16);
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        for lane in (0..HALF).step_by(16) {
            let even = _mm512_loadu_ps(even.as_ptr().add(lane));
            let odd = _mm512_loadu_ps(odd.as_ptr().add(lane));
            let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
            let pairs = _mm512_permutexvar_epi16(order, halves);
            _mm512_storeu_si512(words.as_mut_ptr().add(lane).cast(), pairs);
        }
    }
    words
}

/// Nobody has such operands.
#[cfg(not(target_arch = "x86_64"))]
fn pairs(_: &Lanes, _: &Lanes) -> [u32; HALF] {
    unreachable!("operands are packed for the instruction set that multiplies them");
}
