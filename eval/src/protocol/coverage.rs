//! How much of a text a list of windows scores.
//!
//! Knows indices only. A number that covers 3 % of a text is another number than one that covers all of it.

use ctq_model::window::Window;
use serde::{Deserialize, Serialize};

/// The part of the token stream that is scored at least once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    /// Stream index of the first scored token.
    pub first: usize,
    /// Stream index of the last scored token.
    pub last: usize,
    /// Tokens in the stream.
    pub of: usize,
    /// Distinct stream tokens that are scored, in percent of `of`.
    pub percent: f64,
}

impl Coverage {
    /// The coverage of `windows` on a stream of `tokens` ids; `None` if nothing is scored.
    pub fn of(windows: &[Window], tokens: usize) -> Option<Coverage> {
        let mut scored = vec![false; tokens];
        for window in windows {
            let range = window.start + window.scored.start..window.start + window.scored.end;
            scored.get_mut(range)?.fill(true);
        }
        let first = scored.iter().position(|&is_scored| is_scored)?;
        let last = scored.iter().rposition(|&is_scored| is_scored)?;
        let distinct = scored.iter().filter(|&&is_scored| is_scored).count();
        Some(Coverage { first, last, of: tokens, percent: 100.0 * distinct as f64 / tokens as f64 })
    }
}
