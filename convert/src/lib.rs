//! Checkpoint to tiles, and back. Moves bits, never rounds: no line here does arithmetic on a weight or a scale.
//!
//! The way through it: a [`codec`] makes a [`ctq_model::QuantMatrix`] of a linear's tensors; `tiles` brings it into
//! the container's order; [`convert()`] writes all parts to a container, [`TiledCheckpoint`] hands them to a runtime
//! without writing anything, with the same bits. And the way back: [`RestoredSource`] regenerates the original
//! tensors from a container, [`restore()`] writes them as a checkpoint, [`check_round_trip`] holds them against the
//! hashes that were taken of the originals.
#![deny(clippy::float_arithmetic)]

pub mod codec;
mod convert;
mod error;
mod loss;
mod original;
mod part;
mod plan;
mod restore;
mod restored;
mod round_trip;
mod tiled_checkpoint;
mod tiles;

pub use convert::{Options, Progress, convert};
pub use error::{Error, Result};
pub use plan::source_record;
pub use restore::{Restored, restore};
pub use restored::RestoredSource;
pub use round_trip::{Mismatch, RoundTrip, check_round_trip};
pub use tiled_checkpoint::TiledCheckpoint;
pub use tiles::{tile, untile};
