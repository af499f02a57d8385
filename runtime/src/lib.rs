//! A packed model, a backend and windows of tokens make per-position scores.
//!
//! [`Engine`] is the layer loop: for each layer load, run all windows of a group, drop; the next layer is read
//! meanwhile. There is no other path, so memory is two layers and the hidden states of a group, and each weight is
//! read once a group. The scores do not depend on groups, threads, shards or interruptions.
//!
//! Knows blocks and their order; knows neither files, tokenizers nor protocols, and leaves arithmetic to the kernels.

mod block;
mod engine;
mod error;
mod groups;
mod route;
mod score;
mod snapshot;
mod treatment;
mod weights;

pub use engine::{Engine, Lockstep, Observer, Settings};
pub use error::{Error, Result};
pub use groups::{bytes_per_token, groups};
pub use snapshot::Snapshot;
pub use treatment::Acts;
