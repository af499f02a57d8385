//! The directory that a container is written to: what may be there already, how much room there is, and how a new
//! container takes the place of an old one. Knows directories, not what is in a part.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::journal::JOURNAL;
use crate::manifest::{FORMAT, Manifest};
use crate::{Error, MANIFEST, Result};

/// What to do with a container that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// Leave a complete container, or the beginning of another conversion, alone and fail.
    Refuse,
    /// Take its place: a complete container only once the new one is complete.
    Replace,
}

/// Suffix of files that are being written.
pub(crate) const PARTIAL: &str = ".partial";

/// Where to write, and what to exchange it with at the end.
#[derive(Debug)]
pub(crate) struct Target {
    /// The directory to write into; it exists.
    pub(crate) root: PathBuf,
    /// The complete container that it is to replace.
    pub(crate) replaces: Option<PathBuf>,
}

/// What a directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing.
    Empty,
    /// The beginning of a container.
    Unfinished,
    /// A container.
    Complete,
    /// Something else.
    Foreign,
}

impl State {
    fn of(directory: &Path) -> io::Result<State> {
        let manifest = directory.join(MANIFEST);
        if manifest.is_file() {
            // Of whatever version: it is a container all the same.
            let text = fs::read(&manifest)?;
            let value: Option<serde_json::Map<String, serde_json::Value>> =
                serde_json::from_slice(&text).ok();
            let ours = value.is_some_and(|map| map.get("format").and_then(|v| v.as_str()) == Some(FORMAT));
            return Ok(if ours { State::Complete } else { State::Foreign });
        }
        if directory.join(JOURNAL).is_file() {
            return Ok(State::Unfinished);
        }
        Ok(if fs::read_dir(directory)?.next().is_none() { State::Empty } else { State::Foreign })
    }
}

/// Decides where to write, and creates that directory. Touches nothing that is there.
pub(crate) fn prepare(out: &Path, overwrite: Overwrite) -> Result<Target> {
    if !out.exists() {
        create(out)?;
    }
    if !out.is_dir() {
        return Err(Error::output(out, "it is a file, and a container is a folder", "choose another path"));
    }
    let failed = |e| Error::io(out, e, "check the permissions");
    let out = &out.canonicalize().map_err(failed)?;
    match (State::of(out).map_err(failed)?, overwrite) {
        (State::Empty | State::Unfinished, _) => Ok(Target { root: out.clone(), replaces: None }),
        (State::Foreign, _) => Err(Error::output(
            out,
            "it is not empty and not a ctq container, so ctq does not touch it",
            "choose a new or an empty folder",
        )),
        (State::Complete, Overwrite::Refuse) => {
            let origin = Manifest::read(out).map(|manifest| manifest.source.path);
            Err(Error::AlreadyComplete { path: out.clone(), origin: origin.unwrap_or_default() })
        }
        (State::Complete, Overwrite::Replace) => {
            let root = sibling(out, ".ctq-replacement");
            if !root.is_dir() {
                create(&root)?;
            }
            match State::of(&root).map_err(failed)? {
                State::Empty | State::Unfinished | State::Complete => {
                    Ok(Target { root, replaces: Some(out.clone()) })
                }
                State::Foreign => Err(Error::output(
                    &root,
                    "this folder is in the way: a replacement is built in it",
                    "move or remove it",
                )),
            }
        }
    }
}

/// True where the directory has become a complete container since [`prepare`] looked at it.
pub(crate) fn is_complete(directory: &Path) -> bool {
    matches!(State::of(directory), Ok(State::Complete))
}

fn create(directory: &Path) -> Result<()> {
    let parent = match directory.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) | None => Path::new("."),
    };
    if parent.exists() && !parent.is_dir() {
        return Err(Error::output(
            directory,
            &format!("{} is a file, not a folder", parent.display()),
            "choose a path inside a folder",
        ));
    }
    // A path whose grandparent is a file does not `exist` either; creating tells what is wrong with it.
    fs::create_dir(directory).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::output(
            directory,
            &format!("its parent folder {} does not exist", parent.display()),
            "create it first, or choose another path",
        ),
        _ => Error::io(directory, e, "check the permissions of the parent folder"),
    })
}

fn sibling(directory: &Path, suffix: &str) -> PathBuf {
    let mut name = directory.file_name().map_or_else(OsString::new, OsString::from);
    name.push(suffix);
    directory.with_file_name(name)
}

/// Fails where fewer than `needed` bytes are free on the file system of `directory`.
///
/// `done` of `parts` parts are kept, for the message. A file system that does not tell is taken to have room.
///
/// # Errors
/// [`Error::NoSpace`].
pub fn check_space(directory: &Path, needed: u64, done: usize, parts: usize) -> Result<()> {
    match available(directory) {
        Some(available) if available < needed => {
            Err(Error::NoSpace { path: directory.to_owned(), needed, available, done, parts })
        }
        Some(_) | None => Ok(()),
    }
}

#[cfg(unix)]
fn available(directory: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(directory).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(not(unix))]
fn available(_directory: &Path) -> Option<u64> {
    None
}

/// Puts the complete container at `new` in the place of the one at `old`, then removes the files of the old one.
/// Files that are not a container's stay where they were.
pub(crate) fn exchange(new: &Path, old: &Path) -> Result<()> {
    let failed = |e| Error::io(old, e, "the new container is complete beside it: move it into place by hand");
    swap(new, old).map_err(failed)?;
    // From here on `old` is the new container and `new` the old one.
    clear(new).map_err(failed)?;
    for entry in fs::read_dir(new).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kept = old.join(entry.file_name());
        if kept.exists() {
            fs::remove_file(entry.path()).map_err(failed)?;
        } else {
            fs::rename(entry.path(), kept).map_err(failed)?;
        }
    }
    fs::remove_dir(new).map_err(|e| Error::io(new, e, "what is left of the old container is there"))
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn swap(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
        // File systems without the exchange.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP) => {
            swap_in_steps(a, b)
        }
        result => Ok(result?),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn swap(a: &Path, b: &Path) -> io::Result<()> {
    swap_in_steps(a, b)
}

/// Both are whole at every moment, though for one of them neither has the name `b`.
fn swap_in_steps(a: &Path, b: &Path) -> io::Result<()> {
    let aside = sibling(b, ".ctq-replaced");
    fs::rename(b, &aside)?;
    fs::rename(a, b)?;
    fs::rename(&aside, a)
}

/// Removes the files of a container, finished or not, and nothing else. The journal stays.
pub(crate) fn clear(directory: &Path) -> io::Result<()> {
    let copies: Vec<String> = match Manifest::read(directory) {
        Ok(manifest) => manifest.copies.into_iter().map(|copy| copy.name).collect(),
        Err(_) => Vec::new(),
    };
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let part = matches!(&*name, "embedding.safetensors" | "head.safetensors" | MANIFEST)
            || (name.starts_with("layer-") && name.ends_with(".safetensors"))
            || name.ends_with(PARTIAL);
        if part || copies.contains(&name.into_owned()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Makes the renames in a directory last.
pub(crate) fn sync(directory: &Path) -> io::Result<()> {
    #[cfg(unix)]
    fs::File::open(directory)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = directory;
    Ok(())
}
