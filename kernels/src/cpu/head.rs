//! Logits of a run of the vocabulary, folded at once into partial log-sum-exps: the vocabulary is never whole.

use std::ops::Range;

use rayon::prelude::*;

use crate::backend::{HeadTiles, KernelError, VOCABULARY_TILE};
use crate::cpu::Isa;
use crate::cpu::linear::linear;
use crate::cpu::math::exp;
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
    let partials = rows().flat_map_iter(|row| row.chunks(VOCABULARY_TILE).map(partial)).collect();
    let target = |row: &[f32], target: &Option<u32>| {
        let target = (*target)? as usize;
        vocabulary.contains(&target).then(|| row[target - vocabulary.start])
    };
    let targets = rows().zip(targets).map(|(row, wanted)| target(row, wanted)).collect();
    Ok(HeadTiles { tiles, partials, targets })
}

/// Largest logit of a tile, and the sum of exponentials below it: exponentials f32, sum f64 in vocabulary order.
fn partial(logits: &[f32]) -> (f32, f64) {
    // `max` would drop a NaN; one in the logits must reach the score.
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a || b.is_nan() { *b } else { a });
    let sum = logits.iter().fold(0.0_f64, |sum, logit| sum + f64::from(exp(logit - largest)));
    (largest, sum)
}
