//! From scores to a perplexity with honest error bars.
//!
//! Knows negative log-likelihoods and where in the stream they belong; refuses to know models, protocols and
//! text. Every sum is one chain of f64 additions in window order, then position order; `exp` and `sqrt` are
//! the `libm` crate's, so that equal scores give equal bits on every platform.

mod blocks;
mod paired;

use ctq_model::window::{Window, WindowScores};

use crate::{Error, Result};

pub use blocks::BLOCK_TOKENS;
pub use paired::{Paired, paired};

/// One scored token of one window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredToken {
    /// Index of the window.
    pub window: usize,
    /// Position in the window.
    pub position: usize,
    /// Index in the token stream; overlapping windows score one token several times.
    pub token: usize,
    /// `-ln p` in nats.
    pub nll: f64,
}

/// Lays scores out token by token, in window order, then position order.
///
/// # Errors
/// [`Error::ScoresMismatch`] if `scores` are not those of `windows`, one for one; [`Error::NonFiniteScore`]
/// for the first score that is NaN or infinite.
pub fn scored_tokens(windows: &[Window], scores: &[WindowScores]) -> Result<Vec<ScoredToken>> {
    if windows.len() != scores.len() {
        let what = format!("{} windows, {} score lists", windows.len(), scores.len());
        return Err(Error::ScoresMismatch { what });
    }
    let mut tokens = Vec::new();
    for (window, scores) in windows.iter().zip(scores) {
        check_fit(window, scores)?;
        for (offset, &nll) in scores.nll.iter().enumerate() {
            let position = scores.first + offset;
            tokens.push(ScoredToken { window: window.index, position, token: window.start + position, nll });
        }
    }
    check_finite(&tokens)?;
    Ok(tokens)
}

fn check_fit(window: &Window, scores: &WindowScores) -> Result<()> {
    let found = scores.first..scores.first + scores.nll.len();
    if window.index == scores.window && window.scored == found {
        return Ok(());
    }
    let what = format!(
        "window {} scores positions {:?}, but the list beside it is of window {}, positions {found:?}",
        window.index, window.scored, scores.window
    );
    Err(Error::ScoresMismatch { what })
}

fn check_finite(tokens: &[ScoredToken]) -> Result<()> {
    match tokens.iter().find(|scored| !scored.nll.is_finite()) {
        None => Ok(()),
        Some(&ScoredToken { window, position, token, nll }) => {
            Err(Error::NonFiniteScore { window, position, token, value: nll })
        }
    }
}

/// A perplexity with its sums and its errors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Sum of `-ln p` in nats.
    pub total_nll: f64,
    /// Number of scored positions, repeats included.
    pub count: u64,
    /// `exp(total_nll / count)`.
    pub perplexity: f64,
    /// Standard error of the perplexity, `perplexity * SE(mean)`, where tokens within [`BLOCK_TOKENS`] of the
    /// stream may depend on one another; `None` with fewer than two blocks.
    pub block_error: Option<f64>,
    /// Standard error as llama.cpp prints it, `perplexity * sqrt((E[nll^2] - E[nll]^2) / (n - 1))`: it takes
    /// positions for independent, which they are not, and is too small. `None` for a single position.
    pub iid_error: Option<f64>,
}

/// Perplexity and errors of laid-out scores.
///
/// # Errors
/// [`Error::ScoresMismatch`] if there are none; [`Error::NonFiniteScore`] and [`Error::PerplexityOverflow`]:
/// the result is INVALID and has no perplexity.
pub fn summarize(tokens: &[ScoredToken]) -> Result<Summary> {
    check_finite(tokens)?;
    if tokens.is_empty() {
        return Err(Error::ScoresMismatch { what: "there are no scores at all".to_owned() });
    }
    let total_nll: f64 = tokens.iter().fold(0.0, |sum, scored| sum + scored.nll);
    let count = tokens.len() as f64;
    let mean = total_nll / count;
    let perplexity = libm::exp(mean);
    if !perplexity.is_finite() {
        return Err(Error::PerplexityOverflow { mean });
    }
    let values = || tokens.iter().map(|scored| (scored.token, scored.nll));
    Ok(Summary {
        total_nll,
        count: tokens.len() as u64,
        perplexity,
        block_error: blocks::standard_error(values()).map(|error| perplexity * error),
        iid_error: iid_standard_error(values().map(|(_, nll)| nll)).map(|error| perplexity * error),
    })
}

/// `sqrt((E[x^2] - E[x]^2) / (n - 1))`: llama.cpp, `tools/perplexity/perplexity.cpp`.
fn iid_standard_error(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum, squares) =
        values.fold((0.0, 0.0, 0.0), |(count, sum, squares), x| (count + 1.0, sum + x, squares + x * x));
    if count < 2.0 {
        return None;
    }
    let variance = (squares / count - (sum / count) * (sum / count)).max(0.0);
    Some(libm::sqrt(variance / (count - 1.0)))
}
