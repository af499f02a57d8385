//! From a row of logits to the negative log-likelihood of a token. Knows no windows and no protocols.

use ndarray::ArrayView1;

use crate::{Error, Result};

/// `-ln p(target)` in nats under the softmax of one row of logits, one a vocabulary entry.
///
/// # Errors
/// Where the target is outside the vocabulary.
pub fn nll(logits: ArrayView1<'_, f64>, target: u32) -> Result<f64> {
    let chosen = logits.get(target as usize).ok_or(Error::TokenOutsideVocabulary {
        id: target,
        position: 0,
        vocab: logits.len(),
    })?;
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| libm::exp(logit - largest)).sum();
    Ok(libm::log(sum) + largest - chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn equal_logits_share_the_probability() {
        let logits = array![1e4, 1e4, 1e4, 1e4];
        assert!((nll(logits.view(), 2).unwrap() - libm::log(4.0)).abs() < 1e-12);
        assert!(nll(logits.view(), 4).is_err());
    }
}
