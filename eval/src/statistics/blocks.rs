//! The standard error of a mean over tokens that depend on their neighbours.
//!
//! The stream is cut into blocks of [`BLOCK_TOKENS`] consecutive tokens; every score belongs to the block of
//! its token, so that the scores which overlapping windows give one token stay together. The mean is then a
//! ratio of two sums over blocks, `m = sum S_b / sum n_b` with `S_b` the sum of scores and `n_b` their number
//! in block b, and its standard error is that of the ratio estimator for clusters of unequal size:
//!
//! ```text
//! SE(m)^2 = B / (B - 1) * sum_b (S_b - m n_b)^2 / (sum_b n_b)^2
//! ```
//!
//! W. G. Cochran, Sampling Techniques, 3rd ed. (1977), chapter 9A (ratio-to-size estimate), without the
//! finite-population correction; it is the cluster-robust variance of a mean (K.-Y. Liang and S. L. Zeger,
//! Biometrika 73, 1986). Knows nothing of perplexity.

use std::collections::BTreeMap;

/// Consecutive stream tokens in a block.
pub const BLOCK_TOKENS: usize = 512;

/// `SE(m)` of pairs (stream index, value); `None` with fewer than two blocks.
pub(super) fn standard_error(values: impl Iterator<Item = (usize, f64)>) -> Option<f64> {
    let mut blocks: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
    for (token, value) in values {
        let (sum, count) = blocks.entry(token / BLOCK_TOKENS).or_default();
        *sum += value;
        *count += 1.0;
    }
    if blocks.len() < 2 {
        return None;
    }
    let (total, count) =
        blocks.values().fold((0.0, 0.0), |(total, count), (sum, size)| (total + sum, count + size));
    let mean = total / count;
    let squares: f64 = blocks.values().fold(0.0, |squares, (sum, size)| {
        let residual = sum - mean * size;
        squares + residual * residual
    });
    let number = blocks.len() as f64;
    Some(libm::sqrt(number / (number - 1.0) * squares) / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cochran's formula worked by hand: blocks of 2 and 3 scores with sums 2 and 8, mean 2, residuals -2 and
    /// 2.
    #[test]
    fn ratio_estimator_by_hand() {
        let values = [(0, 1.0), (511, 1.0), (512, 2.0), (600, 3.0), (1023, 3.0)];
        let error = standard_error(values.into_iter()).expect("two blocks");
        assert!((error - (2.0_f64 / 1.0 * 8.0).sqrt() / 5.0).abs() < 1e-15);
    }

    #[test]
    fn repeating_every_score_does_not_shrink_the_error() {
        let once: Vec<(usize, f64)> = (0..4096).map(|token| (token, f64::from(token as u32 % 97))).collect();
        let four_times: Vec<(usize, f64)> = once.iter().flat_map(|&value| [value; 4]).collect();
        let (one, four) = (standard_error(once.into_iter()), standard_error(four_times.into_iter()));
        assert!((one.expect("blocks") - four.expect("blocks")).abs() < 1e-12);
    }

    #[test]
    fn one_block_has_no_error() {
        assert_eq!(standard_error([(0, 1.0), (511, 2.0)].into_iter()), None);
    }
}
