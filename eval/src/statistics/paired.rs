//! The difference of two score sets on the same positions.
//!
//! Two checkpoints find the same tokens hard, so the difference of their means is known far better than
//! either mean. Knows nothing of who made the scores.

use super::{ScoredToken, blocks, summarize};
use crate::{Error, Result};

/// How a score set differs from another on the same positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paired {
    /// `ln ppl - ln ppl_base`: the mean of `nll - nll_base`, in nats.
    pub difference: f64,
    /// Block standard error of `difference`; `None` with fewer than two blocks.
    pub difference_error: Option<f64>,
    /// `ppl / ppl_base = exp(difference)`.
    pub ratio: f64,
    /// `ratio * difference_error`.
    pub ratio_error: Option<f64>,
}

/// Compares `scores` with `base`, position by position.
///
/// # Errors
/// [`Error::NotComparable`] where they do not score the same positions; the errors of [`summarize`] for each.
pub fn paired(scores: &[ScoredToken], base: &[ScoredToken]) -> Result<Paired> {
    summarize(scores)?;
    summarize(base)?;
    if scores.len() != base.len() {
        let what = format!("one has {} scored positions, the other {}", scores.len(), base.len());
        return Err(Error::NotComparable { what });
    }
    let place = |scored: &ScoredToken| (scored.window, scored.position, scored.token);
    if let Some((one, other)) = scores.iter().zip(base).find(|(one, other)| place(one) != place(other)) {
        let what = format!(
            "(window, position, token) is {:?} in one and {:?} in the other",
            place(one),
            place(other)
        );
        return Err(Error::NotComparable { what });
    }
    let differences = || scores.iter().zip(base).map(|(one, other)| (one.token, one.nll - other.nll));
    let difference = differences().fold(0.0, |sum, (_, value)| sum + value) / scores.len() as f64;
    let difference_error = blocks::standard_error(differences());
    let ratio = libm::exp(difference);
    Ok(Paired {
        difference,
        difference_error,
        ratio,
        ratio_error: difference_error.map(|error| ratio * error),
    })
}
