//! Finding WikiText-2 when nobody named a file.
//!
//! Knows where people keep it; refuses to fetch anything and refuses to read the process's environment
//! itself, so that tests can pretend.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Folders that the hub's data set has in the cache: its two names.
const DATASETS: [&str; 2] = ["datasets--wikitext", "datasets--Salesforce--wikitext"];

/// Folders inside a snapshot that hold the test split's Parquet file.
const SPLITS: [(&str, &str); 2] = [("wikitext-2-raw-v1", "test-"), ("wikitext-2-raw-v1/test", "")];

/// A function from a variable's name to its value.
type Lookup<'a> = dyn Fn(&str) -> Option<OsString> + 'a;

/// Environment variables, as a function from name to value.
pub struct Environment<'a> {
    lookup: Box<Lookup<'a>>,
}

impl<'a> Environment<'a> {
    /// The variables of this process.
    pub fn of_process() -> Environment<'static> {
        Environment { lookup: Box::new(|name| std::env::var_os(name)) }
    }

    /// Variables from anywhere else.
    pub fn new(lookup: impl Fn(&str) -> Option<OsString> + 'a) -> Environment<'a> {
        Environment { lookup: Box::new(lookup) }
    }

    /// A variable as a path; an empty one counts as unset.
    fn path(&self, name: &str) -> Option<PathBuf> {
        (self.lookup)(name).filter(|value| !value.is_empty()).map(PathBuf::from)
    }
}

/// The data set to use when none was named: `$CTQ_DATA`, else WikiText-2's test split in the Hugging Face
/// cache (`$HF_HUB_CACHE`, else `$HF_HOME/hub`, else `$XDG_CACHE_HOME/huggingface/hub`, else
/// `~/.cache/huggingface/hub`).
///
/// Of several snapshots the one that `refs/main` names is taken, else the first by name.
///
/// # Errors
/// [`Error::NoData`] says what to fetch and where it would be found; [`Error::DataVariable`] when `$CTQ_DATA`
/// names no file.
pub fn discover(environment: &Environment<'_>) -> Result<PathBuf> {
    if let Some(path) = environment.path("CTQ_DATA") {
        return if path.is_file() { Ok(path) } else { Err(Error::DataVariable { path }) };
    }
    let Some(hub) = hub_cache(environment) else {
        return Err(Error::NoData { looked: "no Hugging Face cache ($HOME is not set)".to_owned() });
    };
    let found = DATASETS.iter().find_map(|name| in_dataset(&hub.join(name)));
    found.ok_or_else(|| Error::NoData { looked: format!("the Hugging Face cache {}", hub.display()) })
}

fn hub_cache(environment: &Environment<'_>) -> Option<PathBuf> {
    environment
        .path("HF_HUB_CACHE")
        .or_else(|| environment.path("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| environment.path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| environment.path("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

fn in_dataset(dataset: &Path) -> Option<PathBuf> {
    let snapshots = dataset.join("snapshots");
    let main = std::fs::read_to_string(dataset.join("refs/main")).ok();
    let preferred = main.map(|commit| snapshots.join(commit.trim()));
    preferred.into_iter().chain(sorted_entries(&snapshots)).find_map(|snapshot| in_snapshot(&snapshot))
}

fn in_snapshot(snapshot: &Path) -> Option<PathBuf> {
    SPLITS.iter().find_map(|(folder, prefix)| {
        sorted_entries(&snapshot.join(folder)).into_iter().find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.starts_with(prefix) && name.ends_with(".parquet") && path.is_file()
        })
    })
}

/// The entries of a directory by name; none if it cannot be listed.
fn sorted_entries(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}
