//! Where tests find files: small ones beside them, large ones where `CTQ_TEST_ASSETS` says.

use std::path::{Path, PathBuf};

/// A file beside the tests.
pub(crate) fn small(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/eval/assets").join(name)
}

/// A path below `$CTQ_TEST_ASSETS`, or `None`, with the reason printed, when the variable is not set.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn large(path: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("CTQ_TEST_ASSETS") else {
        eprintln!("skipped: CTQ_TEST_ASSETS is not set, so {path} cannot be found");
        return None;
    };
    Some(Path::new(&root).join(path))
}

/// WikiText-2's test split as the raw file.
pub(crate) fn wikitext_raw() -> Option<PathBuf> {
    large("data/wikitext-2-raw/wiki.test.raw")
}

/// WikiText-2's test split as the hub's Parquet file.
pub(crate) fn wikitext_parquet() -> Option<PathBuf> {
    large("data/wikitext-2-raw/test-00000-of-00001.parquet")
}
