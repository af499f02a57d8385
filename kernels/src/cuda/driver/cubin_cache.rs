//! Compiled kernels on disk, so that they are compiled once a machine. Knows bytes and names, not what they are.
//!
//! An entry is the bytes and a trailer with their hash: what a crash, a full disk or another program left behind is
//! compiled again, never loaded. Entries appear by a rename, so that processes may share a folder.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

/// Before the hash in the trailer.
const MARK: &[u8; 8] = b"ctqcubin";
const TRAILER: usize = MARK.len() + 32;

/// A folder of compiled kernels.
#[derive(Debug)]
pub(super) struct CubinCache {
    folder: PathBuf,
}

/// The name of what is compiled from these parts.
pub(super) fn key(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // With its length, so that no two lists of parts look alike.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl CubinCache {
    /// Entries in `kernels` below a folder; neither need exist.
    pub(super) fn new(folder: &Path) -> CubinCache {
        CubinCache { folder: folder.join("kernels") }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.cubin"))
    }

    /// What was stored under a key, if it is whole.
    pub(super) fn load(&self, key: &str) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(key)).ok()?;
        let content = bytes.len().checked_sub(TRAILER)?;
        let (cubin, trailer) = bytes.split_at(content);
        let whole = trailer.starts_with(MARK) && trailer[MARK.len()..] == Sha256::digest(cubin)[..];
        bytes.truncate(content);
        whole.then_some(bytes)
    }

    /// Stores bytes under a key.
    ///
    /// # Errors
    /// Where the folder cannot be made or written.
    pub(super) fn store(&self, key: &str, cubin: &[u8]) -> io::Result<()> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(&self.folder)?;
        // A name that no other process and no other thread of this one writes to.
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let temporary = self.folder.join(format!("{key}.{}.{count}.tmp", process::id()));
        let written = fs::File::create_new(&temporary).and_then(|mut file| {
            file.write_all(cubin)?;
            file.write_all(MARK)?;
            file.write_all(&Sha256::digest(cubin))
        });
        let stored = written.and_then(|()| fs::rename(&temporary, self.path(key)));
        if stored.is_err() {
            // Nothing more can be done about a file that cannot be removed.
            let _ = fs::remove_file(&temporary);
        }
        stored
    }
}

#[cfg(test)]
#[path = "tests/cubin_cache.rs"]
mod tests;
