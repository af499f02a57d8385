//! What one of several independent runs earns of an evaluation: a partial record and every score of its windows.
//!
//! Knows what a part holds and what makes two parts of one run; refuses to know who made the scores. A part is a JSON
//! file ([`write()`], [`read()`]), and all parts together are the records of one run, bit for bit ([`merge()`]): scores
//! travel as decimal numbers that are read back to the same bits, and every sum is made from the scores again.

mod belonging;
mod file;
mod merge;

use serde::{Deserialize, Serialize};

use crate::record::Record;
use crate::shard::Shard;
use crate::statistics::ScoredToken;

pub use file::{read, write};
pub use merge::{Merged, MergedModel, NamedPart, merge};

/// The version of the JSON object; raised when a field changes its meaning or goes.
pub const PART_VERSION: u32 = 1;

/// All that one run of a shard has to say: its share of the windows of every model that it was given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// [`PART_VERSION`].
    pub part_version: u32,
    /// Which part, and of how many.
    pub shard: Shard,
    /// One for each model of the command, in its order.
    pub models: Vec<PartModel>,
}

/// One model of a part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartModel {
    /// Hash of the model's contents, equal wherever a copy of it lies; `null` where it could not be opened.
    pub model_id: Option<String>,
    /// One for each mode of activation quantization.
    pub results: Vec<PartResult>,
}

/// One evaluation, as far as this part goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartResult {
    /// Everything that does not depend on scores. Its status is `partial`, or `invalid` or `failed` with the reason;
    /// its time, memory and ranks are those of this part.
    pub record: Record,
    /// Tokens that this run fed to the model; those of an earlier, killed one are not among them.
    pub tokens_fed: u64,
    /// The scores: one for each window of the part, in order; none where the status is not `partial`.
    pub windows: Vec<PartWindow>,
}

/// The scores of one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartWindow {
    /// Its place in the protocol's list of windows, from 0.
    pub window: usize,
    /// Index in the token stream of its first id.
    pub start: usize,
    /// First scored position; `nll[i]` belongs to position `first + i`.
    pub first: usize,
    /// `-ln p` in nats.
    pub nll: Vec<f64>,
}

impl PartWindow {
    /// Scores that were laid out token by token, window by window again.
    pub fn of(tokens: &[ScoredToken]) -> Vec<PartWindow> {
        let windows = tokens.chunk_by(|one, next| one.window == next.window);
        let first = |window: &[ScoredToken]| window.first().copied();
        windows
            .filter_map(|window| first(window).map(|first| (first, window)))
            .map(|(first, window)| PartWindow {
                window: first.window,
                start: first.token - first.position,
                first: first.position,
                nll: window.iter().map(|scored| scored.nll).collect(),
            })
            .collect()
    }

    /// The inverse of [`Self::of`] for one window.
    fn tokens(&self) -> impl Iterator<Item = ScoredToken> + '_ {
        self.nll.iter().enumerate().map(|(offset, &nll)| {
            let position = self.first + offset;
            ScoredToken { window: self.window, position, token: self.start + position, nll }
        })
    }
}
