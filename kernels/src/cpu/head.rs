//! Logits of a run of the vocabulary, folded at once into partial log-sum-exps: the vocabulary is never whole.
#![expect(unsafe_code, reason = "lines need their instruction set")]

use std::ops::Range;

use rayon::prelude::*;

use crate::backend::{HeadTiles, KernelError, VOCABULARY_TILE};
use crate::cpu::Isa;
use crate::cpu::exponential::{LINES, Wide, exp};
use crate::cpu::isa::for_each_isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::line::{Avx2, Avx512};
use crate::cpu::line::{LINE, Portable};
use crate::cpu::linear::linear;
use crate::cpu::matrix::CpuMatrix;
use crate::cpu::quantize::CpuOperand;

/// Partial log-sum-exps over rows `vocabulary` of `head`, counted from its own first row, as `targets` are.
pub(crate) fn head(
    isa: Isa,
    x: &CpuOperand,
    head: &CpuMatrix,
    vocabulary: Range<usize>,
    targets: &[Option<u32>],
) -> Result<HeadTiles, KernelError> {
    let first = head.rows.start;
    let rows = first + vocabulary.start..first + vocabulary.end;
    let logits = linear(isa, x, head, rows)?;
    let tiles = vocabulary.len().div_ceil(VOCABULARY_TILE);
    let rows = || logits.values.par_chunks_exact(vocabulary.len().max(1));
    let mut partials = vec![(0.0, 0.0); logits.rows() * tiles];
    let found = partials.par_chunks_mut(tiles.max(1)).zip(rows());
    found.for_each(|(partials, row)| partials_of(isa, row, partials));
    let target = |row: &[f32], target: &Option<u32>| {
        let target = (*target)? as usize;
        vocabulary.contains(&target).then(|| row[target - vocabulary.start])
    };
    let targets = rows().zip(targets).map(|(row, wanted)| target(row, wanted)).collect();
    Ok(HeadTiles { tiles, partials, targets })
}

for_each_isa! {
    /// Of each tile of a row the largest logit, and the sum of exponentials below it: exponentials f32, sum f64 in
    /// vocabulary order.
    fn partials_of(logits: &[f32], partials: &mut [(f32, f64)]) {
        avx512bf16: partials_in_blocks::<Avx512>,
        avx512: partials_in_blocks::<Avx512>,
        avx2: partials_in_blocks::<Avx2>,
        portable: partials_in_blocks::<Portable>,
    }
}

/// Tiles whose sums, each one chain, are added up side by side.
const BLOCK: usize = 8;

#[inline(always)]
fn partials_in_blocks<L: Wide>(logits: &[f32], partials: &mut [(f32, f64)]) {
    let blocks = logits.chunks(BLOCK * VOCABULARY_TILE).zip(partials.chunks_mut(BLOCK));
    let mut powers = [[0.0_f32; VOCABULARY_TILE]; BLOCK];
    for (logits, partials) in blocks {
        let tiles = logits.chunks(VOCABULARY_TILE);
        for ((tile, powers), (largest, _)) in tiles.zip(&mut powers).zip(partials.iter_mut()) {
            *largest = largest_of(tile);
            // Of a last tile that is not full, e^-infinity: adding +0 changes no sum.
            powers.fill(f32::NEG_INFINITY);
            for (power, logit) in powers.iter_mut().zip(tile) {
                *power = logit - *largest;
            }
            raise::<L>(powers);
        }
        let mut sums = [0.0_f64; BLOCK];
        for at in 0..VOCABULARY_TILE {
            for (sum, powers) in sums.iter_mut().zip(&powers) {
                *sum += f64::from(powers[at]);
            }
        }
        partials.iter_mut().zip(sums).for_each(|((_, partial), sum)| *partial = sum);
    }
}

/// `e^x` of each of a tile.
#[inline(always)]
fn raise<L: Wide>(powers: &mut [f32; VOCABULARY_TILE]) {
    let (lines, _) = powers.as_chunks_mut::<LINE>();
    for first in (0..lines.len()).step_by(LINES) {
        // SAFETY: these bodies are inlined where the instruction set of `L` is there.
        unsafe {
            let mut x = [L::splat(0.0); LINES];
            for at in 0..LINES {
                x[at] = L::load(&lines[first + at]);
            }
            let x = exp(x);
            for at in 0..LINES {
                x[at].store(&mut lines[first + at]);
            }
        }
    }
}

/// Largest logit. `max` would drop a NaN; one in the logits must reach the score.
#[inline(always)]
fn largest_of(logits: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut nan = [0_u32; LANES];
    for line in logits.chunks(LANES) {
        for ((lane, nan), logit) in lanes.iter_mut().zip(&mut nan).zip(line) {
            *lane = if logit > lane { *logit } else { *lane };
            *nan |= u32::from(logit.is_nan());
        }
    }
    if nan.iter().any(|nan| *nan != 0) {
        return f32::NAN;
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partials_are_sums_in_vocabulary_order() {
        for count in [1, 127, 128, 129, 1024, 128 * 19 + 5] {
            let logit = |at: usize| ((at * 7919 % 1009) as f32 - 500.0) / 17.0 + at as f32 / 1e4;
            let mut logits: Vec<f32> = (0..count).map(logit).collect();
            logits[count - 1 - count / 2] = if count > 1 { f32::NEG_INFINITY } else { 3.0 };
            let nan = (count > 600).then_some(513);
            if let Some(nan) = nan {
                logits[nan] = f32::NAN;
            }
            for isa in Isa::here() {
                let mut found = vec![(7.0, 7.0); count.div_ceil(VOCABULARY_TILE)];
                partials_of(isa, &logits, &mut found);
                for (tile, (largest, sum)) in logits.chunks(VOCABULARY_TILE).zip(found) {
                    if tile.iter().any(|logit| logit.is_nan()) {
                        assert!(largest.is_nan() && sum.is_nan(), "{isa:?} {count}");
                        continue;
                    }
                    let expected = tile.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let expected_sum = tile.iter().fold(0.0_f64, |sum, logit| {
                        sum + f64::from(libm::exp(f64::from(logit - expected)) as f32)
                    });
                    assert_eq!(
                        (largest, sum.to_bits()),
                        (expected, expected_sum.to_bits()),
                        "{isa:?} {count}"
                    );
                }
            }
        }
    }
}
