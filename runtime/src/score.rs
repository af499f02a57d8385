//! From the last hidden states to negative log-likelihoods, without ever holding the vocabulary.

use ctq_kernels::{Backend, HeadTiles, VOCABULARY_TILE};

use crate::block::Context;
use crate::error::{Error, Result};
use crate::weights::LinearWeights;

/// Bytes of logits that are looked at together; changes nothing but memory.
const LOGITS_BYTES: usize = 128 << 20;

/// Rows of the head that are looked at together, at most.
pub const HEAD_ROWS: usize = 32 * VOCABULARY_TILE;

/// `-ln p(target)` of each row of normed hidden states, softmax over the first `vocabulary` rows of the head.
///
/// Partial sums of 128 logits are folded in vocabulary order, in f64.
pub(crate) fn score<B: Backend>(
    context: &Context<'_, B>,
    head: &LinearWeights<B>,
    hidden: &B::Buffer,
    targets: &[u32],
    vocabulary: usize,
) -> Result<Vec<f64>> {
    let backend = context.backend;
    let operand = backend.prepare(hidden, &head.input, context.compute, context.windows)?;
    let targets: Vec<Option<u32>> = targets.iter().map(|target| Some(*target)).collect();
    let block = (LOGITS_BYTES / 4 / targets.len().max(1)) / VOCABULARY_TILE * VOCABULARY_TILE;
    let block = block.clamp(VOCABULARY_TILE, HEAD_ROWS);
    let mut folds = vec![Fold::default(); targets.len()];
    for start in (0..vocabulary).step_by(block) {
        let rows = start..vocabulary.min(start + block);
        let tiles = backend
            .head(&operand, &head.matrix, rows, &targets, context.compute)
            .map_err(|source| Error::Kernel { module: head.module.clone(), source })?;
        fold(&mut folds, &tiles);
    }
    Ok(folds.iter().map(Fold::nll).collect())
}

fn fold(folds: &mut [Fold], tiles: &HeadTiles) {
    for (row, fold) in folds.iter_mut().enumerate() {
        for (largest, sum) in &tiles.partials[row * tiles.tiles..(row + 1) * tiles.tiles] {
            fold.add(*largest, *sum);
        }
        if let Some(target) = tiles.targets[row] {
            fold.target = f64::from(target);
        }
    }
}

/// Running log-sum-exp of one row.
#[derive(Clone, Copy, Debug)]
struct Fold {
    largest: f64,
    sum: f64,
    target: f64,
}

impl Default for Fold {
    fn default() -> Fold {
        Fold { largest: f64::NEG_INFINITY, sum: 0.0, target: f64::NAN }
    }
}

impl Fold {
    fn add(&mut self, largest: f32, sum: f64) {
        let largest = f64::from(largest);
        if largest > self.largest || largest.is_nan() {
            self.sum = self.sum * libm::exp(self.largest - largest) + sum;
            self.largest = largest;
        } else {
            self.sum += sum * libm::exp(largest - self.largest);
        }
    }

    fn nll(&self) -> f64 {
        self.largest + libm::log(self.sum) - self.target
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folding_tiles_is_the_log_sum_exp_of_all() {
        let mut fold = Fold::default();
        // Logits ln 1, ln 3 | ln 4, ln 8: the sum of exponentials is 16.
        let ln = |x: f64| libm::log(x) as f32;
        fold.add(ln(3.0), 1.0 / 3.0 + 1.0);
        fold.add(ln(8.0), 1.5);
        fold.target = f64::from(ln(4.0));
        assert!((fold.nll() - libm::log(4.0)).abs() < 1e-6, "{}", fold.nll());
    }

    #[test]
    fn a_nan_reaches_the_score() {
        let mut fold = Fold { target: 0.0, ..Fold::default() };
        fold.add(1.0, 1.0);
        fold.add(f32::NAN, f64::NAN);
        fold.add(2.0, 1.0);
        assert!(fold.nll().is_nan());
    }
}
