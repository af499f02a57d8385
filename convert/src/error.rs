//! Everything that can go wrong between a checkpoint and a container, and what the same command would do again.

use std::path::{Path, PathBuf};

use ctq_container::ErrorKind;

/// A conversion, or its inverse, that did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint contradicts itself, or holds a value that no weight can be made of.
    #[error(transparent)]
    Checkpoint(#[from] ctq_model::Error),
    /// The container cannot be read or written.
    #[error(transparent)]
    Container(#[from] ctq_container::Error),
    /// Asked to stop between two parts.
    #[error(
        "{}: interrupted; run the same command again, it goes on from there: {done} of {parts} parts are done and kept",
        path.display()
    )]
    Interrupted {
        /// The output.
        path: PathBuf,
        /// Parts that are complete.
        done: usize,
        /// Parts of the model.
        parts: usize,
    },
    /// The container does not regenerate a tensor that it was made from.
    #[error(
        "{}: tensor `{tensor}` does not come back: {what}; check the container with `ctq verify`, and convert it again",
        path.display()
    )]
    NotRestored {
        /// The part file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How it differs.
        what: String,
    },
    /// A directory that a checkpoint cannot be written to.
    #[error("{}: {what}; {next}", path.display())]
    BadOutput {
        /// The directory.
        path: PathBuf,
        /// Why not.
        what: String,
        /// What to do.
        next: String,
    },
    /// Writing a checkpoint failed on the way.
    #[error("{}: {source}; nothing is left of the attempt; make room or check the permissions, then run the same command again", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The operating system gave no threads.
    #[error("cannot start {threads} threads: {what}; run again with a smaller --threads")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the operating system said.
        what: String,
    },
}

/// Result of converting or restoring.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// What the same command would do if it were given again.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Container(error) => error.kind(),
            Error::Interrupted { .. } => ErrorKind::Interrupted,
            Error::Write { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                ErrorKind::Input
            }
            Error::Write { .. } | Error::Threads { .. } => ErrorKind::Resource,
            Error::Checkpoint(_) | Error::NotRestored { .. } | Error::BadOutput { .. } => ErrorKind::Input,
        }
    }

    pub(crate) fn not_restored(path: &Path, tensor: &str, what: impl Into<String>) -> Error {
        Error::NotRestored { path: path.to_owned(), tensor: tensor.to_owned(), what: what.into() }
    }

    pub(crate) fn write(path: &Path, source: std::io::Error) -> Error {
        Error::Write { path: path.to_owned(), source }
    }
}
