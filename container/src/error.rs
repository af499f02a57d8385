//! Everything that can go wrong with a container, told as what, where and what to do next, and what kind it is of.

use std::path::{Path, PathBuf};

use crate::Digest;

/// A container that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A directory without a manifest.
    #[error("{} is not a ctq container: {what}; give a folder that `ctq convert` has written", path.display())]
    NotAContainer {
        /// The directory.
        path: PathBuf,
        /// What is missing or broken.
        what: String,
    },
    /// A conversion that has not come to its end.
    #[error(
        "{}: the conversion is not finished, {done} parts are done; run the same `ctq convert` again, it goes on from there",
        path.display()
    )]
    HalfWritten {
        /// The directory.
        path: PathBuf,
        /// Parts that are complete.
        done: usize,
    },
    /// A container of another version of the format.
    #[error(
        "{}: container format version {found}, and this ctq reads version {known}; convert the checkpoint again, or use the ctq that wrote it",
        path.display()
    )]
    ForeignVersion {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The version that this program reads.
        known: u32,
    },
    /// A part file that is missing, truncated or contradicts the manifest.
    #[error("{}: {what}; copy the container again, or convert it again with --force", path.display())]
    Part {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file whose bytes are not those that were written.
    #[error(
        "{}: its SHA-256 is {found}, and ctq.json says {expected}: the file has changed since it was written; copy the container again, or convert it again with --force",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Digest in the manifest.
        expected: Digest,
        /// Digest of the file.
        found: Digest,
    },
    /// An output path that can never become a container.
    #[error("{}: {what}; {next}", path.display())]
    BadOutput {
        /// The path.
        path: PathBuf,
        /// Why not.
        what: String,
        /// What to do.
        next: String,
    },
    /// The output holds a finished container.
    #[error(
        "{}: a complete container, made from {}, is there already; use --force to replace it, or choose another folder",
        path.display(),
        origin.display()
    )]
    AlreadyComplete {
        /// The directory.
        path: PathBuf,
        /// The checkpoint it was made from.
        origin: PathBuf,
    },
    /// The output holds the beginning of a conversion of something else.
    #[error(
        "{}: an unfinished conversion of another checkpoint, or by another version of ctq, is there; use --force to discard it, or choose another folder",
        path.display()
    )]
    OtherConversion {
        /// The directory.
        path: PathBuf,
    },
    /// Somebody else writes to the same output.
    #[error(
        "{}: in use by another process that converts into it; wait for it to end, or choose another folder",
        path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The file system is too full to begin.
    #[error(
        "{}: {needed} bytes are still to be written and {available} are free; make room, then run the same command again: {done} of {parts} parts are done and kept",
        path.display()
    )]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// Bytes still to be written.
        needed: u64,
        /// Bytes free.
        available: u64,
        /// Parts that are complete.
        done: usize,
        /// Parts of the model.
        parts: usize,
    },
    /// Writing failed on the way: disk full, a limit on file sizes, a lost device.
    #[error(
        "{}: {source}; {needed} bytes are still to be written; make room, then run the same command again: {done} of {parts} parts are done and kept",
        path.display()
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
        /// Bytes still to be written.
        needed: u64,
        /// Parts that are complete.
        done: usize,
        /// Parts of the model.
        parts: usize,
    },
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
}

/// Result of reading or writing a container.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the same command would do if it were given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Fail again: this input or command can never work.
    Input,
    /// Go on, once there is room or the other process has ended.
    Resource,
    /// Go on: it was asked to stop.
    Interrupted,
}

impl Error {
    /// What the same command would do if it were given again.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::InUse { .. } | Error::NoSpace { .. } | Error::Write { .. } => ErrorKind::Resource,
            Error::Io { source, .. } if is_full(source) => ErrorKind::Resource,
            Error::NotAContainer { .. }
            | Error::HalfWritten { .. }
            | Error::ForeignVersion { .. }
            | Error::Part { .. }
            | Error::Corrupt { .. }
            | Error::BadOutput { .. }
            | Error::AlreadyComplete { .. }
            | Error::OtherConversion { .. }
            | Error::Io { .. } => ErrorKind::Input,
        }
    }

    /// An error of the operating system.
    pub fn io(path: &Path, source: std::io::Error, next: &str) -> Error {
        Error::Io { path: path.to_owned(), source, next: next.to_owned() }
    }

    pub(crate) fn part(path: &Path, what: impl Into<String>) -> Error {
        Error::Part { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn output(path: &Path, what: &str, next: &str) -> Error {
        Error::BadOutput { path: path.to_owned(), what: what.to_owned(), next: next.to_owned() }
    }
}

fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as E;
    matches!(error.kind(), E::StorageFull | E::QuotaExceeded | E::FileTooLarge)
}
