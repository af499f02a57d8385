//! `ctq.progress`: the record of a conversion under way, one JSON line for each finished part, and at the same time
//! the lock that keeps a second process out. It is gone once the container is complete.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Digest, Error, PartRecord, Result};

/// Name of the journal in an unfinished container.
pub(crate) const JOURNAL: &str = "ctq.progress";

/// First line: what is being converted, so that nothing else is mixed in.
#[derive(Serialize, Deserialize)]
struct Head {
    resume_key: Digest,
}

/// An open, locked journal. The lock goes with the file.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
}

/// What an earlier run has left.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) resume_key: Digest,
    pub(crate) parts: Vec<PartRecord>,
}

impl Journal {
    /// Opens or creates the journal in `directory` and locks it.
    pub(crate) fn lock(directory: &Path) -> Result<Journal> {
        let path = directory.join(JOURNAL);
        let failed = |e| Error::io(&path, e, "check that the folder can be written");
        loop {
            let mut options = OpenOptions::new();
            let file =
                options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: directory.to_owned() }),
                Err(TryLockError::Error(e)) => return Err(failed(e)),
            }
            // The process before us may have finished, and removed the file, between our opening and our locking it.
            if same_file(&file, &path).map_err(failed)? {
                return Ok(Journal { path, file });
            }
        }
    }

    /// What an earlier run has left; `None` where it has left nothing. A torn last line is cut off.
    pub(crate) fn read(&mut self) -> Result<Option<Left>> {
        self.try_read().map_err(|e| Error::io(&self.path, e, "check the permissions"))
    }

    fn try_read(&mut self) -> io::Result<Option<Left>> {
        self.file.rewind()?;
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes)?;
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
        let Some(first) = lines.next() else { return Ok(None) };
        let Ok(head) = serde_json::from_slice::<Head>(first) else { return Ok(None) };
        let mut valid = first.len();
        let mut parts = Vec::new();
        for line in lines {
            let Ok(record) = serde_json::from_slice::<PartRecord>(line) else { break };
            valid += line.len();
            parts.push(record);
        }
        self.file.set_len(valid as u64)?;
        self.file.seek(SeekFrom::End(0))?;
        Ok(Some(Left { resume_key: head.resume_key, parts }))
    }

    /// Starts over.
    pub(crate) fn begin(&mut self, resume_key: Digest) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.line(&Head { resume_key })
    }

    /// Adds a part whose file is safely on disk.
    pub(crate) fn append(&mut self, record: &PartRecord) -> io::Result<()> {
        let before = self.file.stream_position()?;
        let result = self.line(record);
        if result.is_err() {
            // Half a line would hide the lines that follow it.
            self.file.set_len(before)?;
            self.file.seek(SeekFrom::Start(before))?;
        }
        result
    }

    fn line(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.file.write_all(&line)?;
        self.file.sync_data()
    }

    /// Removes the file from `directory`, where it is by now; the lock goes with `self`.
    pub(crate) fn remove(self, directory: &Path) -> Result<()> {
        let path = directory.join(JOURNAL);
        std::fs::remove_file(&path).map_err(|e| Error::io(&path, e, "remove the file by hand"))
    }
}

/// Finished parts that the journal at `path` tells of, without taking its lock.
pub(crate) fn count(path: &Path) -> usize {
    let lines = std::fs::read(path).map(|bytes| bytes.iter().filter(|byte| **byte == b'\n').count());
    lines.map_or(0, |lines| lines.saturating_sub(1))
}

#[cfg(unix)]
fn same_file(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let held = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((held.dev(), held.ino()) == (named.dev(), named.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(not(unix))]
fn same_file(_file: &File, path: &Path) -> io::Result<bool> {
    path.try_exists()
}
