//! Where CUDA's libraries lie: a variable, the loader's own path, CUDA's folders, Python environments.
//!
//! Knows names and folders, not what is in a library. Looks and loads; never runs a program, Python's least of all.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Version of a library, or of the CUDA that a driver is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number, where there is one.
    pub patch: Option<u32>,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        self.patch.map_or(Ok(()), |patch| write!(f, ".{patch}"))
    }
}

/// A library that could be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its file.
    pub path: PathBuf,
    /// What it says of itself.
    pub version: Version,
    /// How it was found: `$CTQ_NVRTC`, `the loader's path`, a folder.
    pub origin: String,
}

/// A library that is not there, or that cannot be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NotFound {
    /// Places, in the order they were looked at.
    pub looked_in: Vec<String>,
    /// Files that were there, each with the reason why it was not taken.
    pub refused: Vec<String>,
}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.refused[..] {
            [] => write!(f, "not found"),
            refused => write!(f, "not usable: {}", refused.join("; ")),
        }
    }
}

/// What is looked for.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// Variable that names the file, or the folder it is in.
    pub(super) variable: &'static str,
    /// Name without a version: `libnvrtc.so`.
    pub(super) name: &'static str,
    /// Versions that file names may end with, best first.
    pub(super) majors: Vec<u32>,
    /// Folder that the library's Python package of CUDA 12 and earlier puts it in, below `nvidia`.
    pub(super) component: &'static str,
}

/// Folders where libraries may lie.
#[derive(Clone, Debug, Default)]
pub(super) struct Places {
    /// Of CUDA installations: the folder that holds `lib64`.
    cuda: Vec<(String, PathBuf)>,
    /// `site-packages` of Python environments.
    python: Vec<(String, PathBuf)>,
}

impl Places {
    /// Those of this process's environment.
    pub(super) fn of_this_machine() -> Places {
        Places::of(&|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    /// Those that variables name, and where installers put CUDA.
    fn of(variable: &dyn Fn(&str) -> Option<OsString>) -> Places {
        let mut places = Places::default();
        for name in ["CUDA_HOME", "CUDA_PATH"] {
            if let Some(folder) = variable(name) {
                places.cuda.push((format!("${name}"), PathBuf::from(folder)));
            }
        }
        places.cuda.push(("/usr/local/cuda".to_owned(), PathBuf::from("/usr/local/cuda")));
        for name in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
            if let Some(folder) = variable(name) {
                places.add_python(&format!("${name}"), Path::new(&folder));
            }
        }
        if let Some(python) = variable("PATH").and_then(|path| interpreter(&path)) {
            // A virtual environment's interpreter is a link: first the environment, then what it was made from.
            let real = fs::canonicalize(&python).ok();
            for prefix in [Some(python), real].into_iter().flatten().filter_map(|python| prefix(&python)) {
                places.add_python("the Python on the PATH", &prefix);
                places.add_python("the Python on the PATH", &prefix.join("local"));
            }
        }
        if let Some(home) = variable("HOME") {
            places.add_python("the user's Python packages", &PathBuf::from(home).join(".local"));
        }
        let mut seen = BTreeSet::new();
        places.python.retain(|(_, folder)| seen.insert(fs::canonicalize(folder).ok()));
        places
    }

    /// The packages of the Python environment at `prefix`.
    fn add_python(&mut self, origin: &str, prefix: &Path) {
        for lib in ["lib", "lib64"] {
            for version in children(&prefix.join(lib), "python3") {
                for packages in ["site-packages", "dist-packages"] {
                    let folder = version.join(packages);
                    if folder.is_dir() {
                        self.python.push((origin.to_owned(), folder));
                    }
                }
            }
        }
    }

    /// Folders that may hold a library, with how each was found.
    fn folders(&self, wanted: &Wanted) -> Vec<(String, PathBuf)> {
        let mut folders = Vec::new();
        for (origin, root) in &self.cuda {
            for lib in ["lib64", "lib", "targets/x86_64-linux/lib"] {
                folders.push((origin.clone(), root.join(lib)));
            }
        }
        for (origin, packages) in &self.python {
            let nvidia = packages.join("nvidia");
            // From CUDA 13 on all packages share a folder; the newest first.
            let mut shared = children(&nvidia, "cu1");
            shared.sort();
            for folder in shared.into_iter().rev() {
                folders.push((origin.clone(), folder.join("lib")));
            }
            folders.push((origin.clone(), nvidia.join(wanted.component).join("lib")));
            folders.push((origin.clone(), packages.join("torch/lib")));
        }
        folders
    }
}

/// Folders in `folder` whose names begin with `start`, sorted.
fn children(folder: &Path, start: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(start))
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    found.sort();
    found
}

/// The interpreter that `python3`, or else `python`, would run.
fn interpreter(path: &OsString) -> Option<PathBuf> {
    let on_path =
        |name: &str| env::split_paths(path).map(|folder| folder.join(name)).find(|file| file.is_file());
    on_path("python3").or_else(|| on_path("python"))
}

/// The environment an interpreter belongs to: it lies in its `bin`.
fn prefix(python: &Path) -> Option<PathBuf> {
    Some(python.parent()?.parent()?.to_owned())
}

/// A file to try, or a name for the loader to look up.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    path: PathBuf,
    origin: String,
}

/// What to try, best first, and where was looked.
fn candidates(wanted: &Wanted, places: &Places, variable: Option<OsString>) -> (Vec<Candidate>, Vec<String>) {
    let versioned = wanted.majors.iter().map(|major| format!("{}.{major}", wanted.name));
    let names: Vec<String> = versioned.chain([wanted.name.to_owned()]).collect();
    let in_folder = |folder: &Path, name: &str| Some(folder.join(name)).filter(|file| file.is_file());
    if let Some(value) = variable {
        // What was named is taken or refused; nothing else is.
        let (origin, path) = (format!("${}", wanted.variable), PathBuf::from(value));
        let looked_in = vec![format!("{origin} = {}", path.display())];
        let inside = names.iter().filter_map(|name| in_folder(&path, name));
        let paths: Vec<PathBuf> = if path.is_dir() { inside.collect() } else { vec![path.clone()] };
        let candidate = |path| Candidate { path, origin: origin.clone() };
        return (paths.into_iter().map(candidate).collect(), looked_in);
    }
    let folders = places.folders(wanted);
    let mut found = Vec::new();
    for name in &names {
        found.push(Candidate { path: PathBuf::from(name), origin: "the loader's path".to_owned() });
        for (origin, folder) in &folders {
            if let Some(path) = in_folder(folder, name) {
                found.push(Candidate { path, origin: origin.clone() });
            }
        }
    }
    let mut looked_in = vec!["the loader's path".to_owned()];
    for (origin, folder) in places.cuda.iter().chain(&places.python) {
        let folder = folder.display().to_string();
        looked_in.push(if *origin == folder { folder } else { format!("{origin} ({folder})") });
    }
    (found, looked_in)
}

/// Finds and loads a library: `load` opens a file, or says why it cannot be used.
///
/// # Errors
/// Where it is not there, or none of those found can be used.
pub(super) fn search<T>(
    wanted: &Wanted,
    places: &Places,
    load: impl FnMut(&Path) -> Result<(T, Version), String>,
) -> Result<(T, Found), NotFound> {
    let variable = env::var_os(wanted.variable).filter(|value| !value.is_empty());
    search_with(wanted, places, variable, load)
}

fn search_with<T>(
    wanted: &Wanted,
    places: &Places,
    variable: Option<OsString>,
    mut load: impl FnMut(&Path) -> Result<(T, Version), String>,
) -> Result<(T, Found), NotFound> {
    let (candidates, looked_in) = candidates(wanted, places, variable);
    let mut refused: Vec<String> = Vec::new();
    for Candidate { path, origin } in candidates {
        let is_name = path.components().count() == 1;
        match load(&path) {
            Ok((library, version)) => {
                let path = if is_name { loaded_from(&path).unwrap_or(path) } else { path };
                return Ok((library, Found { path, version, origin }));
            }
            // Names are tried whether or not there is a file.
            Err(reason) if is_name && reason.contains("No such file") => {}
            Err(reason) => {
                // The loader's messages begin with the path.
                let path = path.display().to_string();
                let reason = reason.strip_prefix(&format!("{path}: ")).unwrap_or(&reason);
                refused.push(format!("{path}: {reason}"));
            }
        }
    }
    Err(NotFound { looked_in, refused })
}

/// The file that the loader has taken for a name.
fn loaded_from(name: &Path) -> Option<PathBuf> {
    let name = name.to_str()?;
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let path = |line: &str| line.split_once('/').map(|(_, path)| PathBuf::from(format!("/{path}")));
    // The name may be a link to a file with a longer version.
    let ours = |path: &PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name));
    maps.lines().filter_map(path).find(ours)
}

#[cfg(test)]
#[path = "tests/library.rs"]
mod tests;
