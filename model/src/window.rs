//! The currency between a protocol and the engine: windows of token ids going in, per-position scores coming out.
//!
//! Knows nothing of text, tokenizers, presets or models.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// One fresh forward pass: no cache, positions restart at 0.
///
/// Windows of one evaluation may have different lengths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Position in the protocol's list of windows, from 0.
    pub index: usize,
    /// Index in the token stream of `ids[0]`.
    pub start: usize,
    /// Token ids that are fed to the model.
    pub ids: Vec<u32>,
    /// Positions `p` whose token `ids[p]` is scored given `ids[..p]`. Never contains 0.
    pub scored: Range<usize>,
}

/// Negative log-likelihoods of one window's scored positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WindowScores {
    /// [`Window::index`] of the window these belong to.
    pub window: usize,
    /// First scored position; `nll[i]` belongs to position `first + i`.
    pub first: usize,
    /// `-ln p(ids[p] | ids[..p])` in nats.
    pub nll: Vec<f64>,
}
