//! Where tests find checkpoints: goldens in the repository, always there; larger ones where `CTQ_TEST_ASSETS` says.
//!
//! `CTQ_TEST_ASSETS` is a folder with `fixtures/` (checkpoints of many schemes with logits by Hugging Face), `models/`
//! (a trained model in many schemes with perplexities) and `data/` (WikiText-2).

use std::path::{Path, PathBuf};

/// A path below `golden/`.
pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden").join(path)
}

/// A path below `$CTQ_TEST_ASSETS`, or `None`, with the reason printed, where it is not to be had.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub fn shared(path: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("CTQ_TEST_ASSETS") else {
        eprintln!("skipped: CTQ_TEST_ASSETS is not set, so there is no {path}");
        return None;
    };
    let found = Path::new(&root).join(path);
    if !found.exists() {
        eprintln!("skipped: there is no {}", found.display());
        return None;
    }
    Some(found)
}

/// Subfolders of `root` that hold a checkpoint with an `oracle.json`, sorted.
///
/// # Panics
/// If `root` cannot be read.
pub fn with_oracle(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.expect("directory entry").path())
        .filter(|path| path.join("oracle.json").is_file())
        .collect();
    folders.sort();
    folders
}

/// The last part of a path.
///
/// # Panics
/// If there is none.
pub fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).expect("a path with a name")
}
