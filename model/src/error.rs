//! Everything that can be wrong with a checkpoint, each told as what, where and what to do next.

use std::path::{Path, PathBuf};

/// A checkpoint that cannot be read, or that contradicts itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file.
    #[error("{}: {source}; {next}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
        /// What to do.
        next: String,
    },
    /// A directory that does not hold a checkpoint.
    #[error("{} is not a checkpoint: {what}; {next}", path.display())]
    NotACheckpoint {
        /// The directory.
        path: PathBuf,
        /// What is missing.
        what: String,
        /// What to do.
        next: String,
    },
    /// A file whose structure is broken.
    #[error("{}: {what}; {next}", path.display())]
    Shard {
        /// The safetensors file, its index or config.json.
        path: PathBuf,
        /// What is broken.
        what: String,
        /// What to do.
        next: String,
    },
    /// One tensor that is absent.
    #[error("{}: tensor `{tensor}` is missing: {what}; {next}", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor looked for.
        tensor: String,
        /// Why it is needed.
        what: String,
        /// What to do.
        next: String,
    },
    /// One tensor whose dtype, shape or content contradicts its scheme.
    #[error("{}: tensor `{tensor}`: {what}; {next}", path.display())]
    BadTensor {
        /// The file that holds it.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The contradiction.
        what: String,
        /// What to do.
        next: String,
    },
    /// `config.json` says something impossible, unreadable or unknown.
    #[error("{}: `{key}`: {what}; {next}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key, dotted.
        key: String,
        /// What is wrong with it.
        what: String,
        /// What to do.
        next: String,
    },
    /// Well-formed input of a kind that ctq does not run.
    #[error("{}: not supported: {what}; {next}", path.display())]
    Unsupported {
        /// The file that asks for it.
        path: PathBuf,
        /// What it asks for.
        what: String,
        /// What to do.
        next: String,
    },
}

/// Result of reading a checkpoint.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error, next: &str) -> Self {
        Error::Io { path: path.to_owned(), source, next: next.to_owned() }
    }

    pub(crate) fn config(path: &Path, key: &str, what: impl Into<String>, next: impl Into<String>) -> Self {
        Error::Config { path: path.to_owned(), key: key.to_owned(), what: what.into(), next: next.into() }
    }

    /// A tensor that contradicts its scheme.
    pub fn tensor(path: &Path, tensor: &str, what: impl Into<String>, next: impl Into<String>) -> Self {
        Error::BadTensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            what: what.into(),
            next: next.into(),
        }
    }

    /// A tensor that must be there and is not.
    pub fn missing(path: &Path, tensor: &str, what: impl Into<String>) -> Self {
        Error::MissingTensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            what: what.into(),
            next: "download the checkpoint again, or write it again with the quantizer".to_owned(),
        }
    }

    /// A kind of checkpoint that is well formed and not run by ctq.
    pub fn unsupported(path: &Path, what: impl Into<String>, next: impl Into<String>) -> Self {
        Error::Unsupported { path: path.to_owned(), what: what.into(), next: next.into() }
    }
}
