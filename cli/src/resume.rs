//! What a killed run leaves for the same command: scores of finished groups, and hidden states of those under way. In the
//! cache folder, under a key that the caller makes of everything the scores depend on.

use std::path::{Path, PathBuf};

use anyhow::Context;
use ctq_eval::partial::{self, Saved};
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::{Error, Snapshot};
use sha2::{Digest, Sha256};

use crate::cache;
use crate::report::Report;

/// A group by its windows: a snapshot belongs to exactly these.
pub(crate) fn group_name(windows: &[Window]) -> String {
    windows.iter().map(|window| window.index.to_string()).collect::<Vec<_>>().join(",")
}

/// Scores of finished groups, and the hidden states of the one under way, in the cache folder.
pub(crate) struct ResumeState {
    folder: PathBuf,
    key: String,
}

impl ResumeState {
    pub(crate) fn open(key: &str, report: &Report) -> anyhow::Result<ResumeState> {
        let folder = cache::folder()?.join("eval");
        // Found out now, not after the first hour.
        std::fs::create_dir_all(&folder).with_context(|| {
            format!("{}: cannot be made; set CTQ_CACHE to a folder that can be written", folder.display())
        })?;
        let digest = Sha256::digest(key.as_bytes());
        let key: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        report.detail(&format!("resume state: {}", folder.join(&key).display()));
        Ok(ResumeState { folder, key })
    }

    pub(crate) fn snapshot_path(&self, replica: usize) -> PathBuf {
        self.folder.join(match replica {
            0 => format!("{}.snapshot", self.key),
            _ => format!("{}.{replica}.snapshot", self.key),
        })
    }

    pub(crate) fn scores(&self, windows: &[Window], report: &Report) -> Vec<WindowScores> {
        match partial::load(&self.folder, &self.key) {
            Ok(Saved::Scores(scores)) => {
                report.note(&format!(
                    "going on: {} of {} windows are scored already",
                    scores.len(),
                    windows.len()
                ));
                scores
            }
            Ok(Saved::Nothing) => Vec::new(),
            Ok(Saved::Ignored { reason }) => {
                report.warning(&format!("resume state is not usable and is ignored: {reason}"));
                Vec::new()
            }
            Err(error) => {
                report.warning(&format!("resume state is not usable and is ignored: {error}"));
                Vec::new()
            }
        }
    }

    pub(crate) fn snapshot(&self, group: &str, replica: usize, report: &Report) -> Option<Snapshot> {
        let snapshot = Snapshot::load(&self.snapshot_path(replica), group)?;
        report.note(&format!("going on after layer {} of this group", snapshot.layer));
        Some(snapshot)
    }

    pub(crate) fn save(&self, scores: &[WindowScores]) -> Result<(), Error> {
        partial::save(&self.folder, &self.key, scores).map_err(|error| Error::Scores(error.into()))
    }

    pub(crate) fn forget_snapshot(&self, replica: usize) {
        remove(&self.snapshot_path(replica));
    }

    /// Nothing is left to go on with.
    pub(crate) fn forget(&self) {
        let _ = partial::remove(&self.folder, &self.key);
        let files = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let is_own = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&self.key) && name.ends_with(".snapshot")
        };
        files.map(|entry| entry.path()).filter(is_own).for_each(|path| remove(&path));
    }
}

fn remove(path: &Path) {
    // It may never have been written; and a leftover is harmless, for it only fits its own key.
    let _ = std::fs::remove_file(path);
}
