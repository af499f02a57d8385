//! What can go wrong while a model runs.

use std::path::PathBuf;

use ctq_container::SourceError;
use ctq_kernels::KernelError;
use ctq_model::inventory::Part;

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
    /// A snapshot could not be written.
    #[error("{}: {source}; free some space or set CTQ_CACHE to another folder", path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// Result of running a model.
pub type Result<T, E = Error> = std::result::Result<T, E>;
