//! Where ctq keeps what it can make again: `$CTQ_CACHE`, else `$XDG_CACHE_HOME/ctq`, else `~/.cache/ctq`.

use std::env;
use std::path::PathBuf;

use anyhow::Context;

/// The cache folder; it need not exist yet.
pub(crate) fn folder() -> anyhow::Result<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("CTQ_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("ctq")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/ctq")))
        .context("no folder to keep resume state in; set CTQ_CACHE to one")
}
