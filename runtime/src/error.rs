//! What can go wrong while a model runs.

use std::path::PathBuf;

use ctq_container::SourceError;
use ctq_kernels::KernelError;
use ctq_model::inventory::Part;

use crate::plan::TooSmall;

/// A run that cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A part of the model could not be read.
    #[error("{part}: {source}")]
    Source {
        /// The part.
        part: Part,
        /// Why, with what to do.
        source: SourceError,
    },
    /// The backend cannot multiply what the checkpoint asks for.
    #[error("`{module}`: {source}")]
    Kernel {
        /// The module.
        module: String,
        /// Why, with what to do.
        source: KernelError,
    },
    /// The device failed, or had no room, at something that belongs to no one module.
    #[error("{0}")]
    Device(#[from] KernelError),
    /// No way of cutting the work fits the memory.
    #[error(transparent)]
    TooSmall(#[from] TooSmall),
    /// The device had no room, even with as little at a time as there can be.
    #[error(
        "{device} has no room for {wanted} more bytes with one window at a time, which takes about {needed} bytes in all: free the device, give a shorter --ctx, or take --device cpu"
    )]
    NoRoom {
        /// The device.
        device: String,
        /// Bytes of the allocation that failed.
        wanted: u64,
        /// Bytes that the plan foresees.
        needed: u64,
    },
    /// A hidden state became infinite or NaN.
    #[error(
        "the hidden state is not finite after `{module}` at window {window}, position {position}: the result is INVALID; look at the scales of this module, or score the unquantized model to see whether it is sound"
    )]
    NonFinite {
        /// Module whose output made it so.
        module: String,
        /// Window, counted from 0.
        window: usize,
        /// Position in the window, counted from 0.
        position: usize,
    },
    /// A token that the model has no embedding for.
    #[error(
        "token id {id} in window {window} is not below the vocabulary of {vocabulary}: use the tokenizer that belongs to this model"
    )]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Window, counted from 0.
        window: usize,
        /// Rows of the embedding.
        vocabulary: usize,
    },
    /// The observer asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// Scores could not be kept.
    #[error("{0}")]
    Scores(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A snapshot could not be written.
    #[error("{}: {source}; free some space or set CTQ_CACHE to another folder", path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

impl Error {
    /// The device without room and the bytes it was asked for, where that is what went wrong.
    pub(crate) fn out_of_memory(&self) -> Option<(&str, u64)> {
        match self {
            Error::Kernel { source: KernelError::OutOfMemory { device, wanted }, .. }
            | Error::Device(KernelError::OutOfMemory { device, wanted }) => Some((device, *wanted)),
            Error::Kernel { .. }
            | Error::Device(_)
            | Error::Source { .. }
            | Error::TooSmall(_)
            | Error::NoRoom { .. }
            | Error::NonFinite { .. }
            | Error::TokenOutOfRange { .. }
            | Error::Interrupted
            | Error::Scores(_)
            | Error::Snapshot { .. } => None,
        }
    }
}

/// Result of running a model.
pub type Result<T, E = Error> = std::result::Result<T, E>;
