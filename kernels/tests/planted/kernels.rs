//! The CUDA kernels for the emulation, compiled file by file, so that a change in one costs the compilation of those that
//! see it. Knows no bugs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rayon::prelude::*;
use tempfile::TempDir;

/// The engine of the emulation, from the folder of kernels.
const ENGINE: &str = "emulation/simt.cpp";

/// Every file as it is, compiled.
pub(crate) struct Kernels {
    folder: TempDir,
    sources: PathBuf,
    /// By file that is compiled: each `.cu`, and the engine.
    objects: BTreeMap<String, PathBuf>,
}

impl Kernels {
    pub(crate) fn compile() -> Kernels {
        let folder = tempfile::tempdir().expect("a folder");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let entries = fs::read_dir(&sources).expect("the kernels").map(|entry| entry.expect("an entry"));
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut units: Vec<String> = names.filter(|name| name.ends_with(".cu")).collect();
        units.push(ENGINE.to_owned());
        let objects = units.into_par_iter().map(|unit| {
            let object = compile(&sources, &unit, folder.path());
            (unit, object)
        });
        Kernels { objects: objects.collect(), sources, folder }
    }

    /// A library of the kernels where `planted` stands for `line` in one file; `name` is that of its folder.
    pub(crate) fn with(&self, name: &str, file: &str, line: &str, planted: &str) -> PathBuf {
        let folder = self.folder.path().join(name);
        let copy = folder.join("cuda");
        copy_folder(&self.sources, &copy);
        let text = read(&copy, file);
        assert_eq!(text.matches(line).count(), 1, "`{line}` stands once in {file}");
        fs::write(copy.join(file), text.replace(line, planted)).expect("written");
        let objects = self.objects.iter().map(|(unit, object)| {
            if self.sees(unit, file) { compile(&copy, unit, &folder) } else { object.clone() }
        });
        let objects: Vec<PathBuf> = objects.collect();
        let library = folder.join("libkernels.so");
        run(Command::new(compiler()).args(["-shared", "-o"]).arg(&library).args(objects));
        library
    }

    /// Whether a file is another one, or includes it.
    fn sees(&self, unit: &str, file: &str) -> bool {
        let folder = Path::new(unit).parent().unwrap_or(Path::new(""));
        let included = |line: &str| {
            let name = line.strip_prefix("#include \"")?.strip_suffix('"')?;
            // One level up is all that there is.
            Some(name.strip_prefix("../").map_or_else(|| folder.join(name), PathBuf::from))
        };
        unit == file
            || read(&self.sources, unit)
                .lines()
                .filter_map(included)
                .any(|name| self.sees(name.to_str().expect("a name in UTF-8"), file))
    }
}

fn read(folder: &Path, file: &str) -> String {
    fs::read_to_string(folder.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// One file of `sources`, to an object in `folder`.
fn compile(sources: &Path, unit: &str, folder: &Path) -> PathBuf {
    let object = folder.join(unit.replace('/', "-")).with_extension("o");
    let options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-x", "c++", "-c", "-o"];
    run(Command::new(compiler()).args(options).arg(&object).arg(sources.join(unit)));
    object
}

fn compiler() -> std::ffi::OsString {
    std::env::var_os("CXX").unwrap_or_else(|| "c++".into())
}

fn run(command: &mut Command) {
    let output = command.output().expect("a C++ compiler");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("the kernels") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            fs::copy(&path, &target).expect("copied");
        }
    }
}
