//! The laws of the house that a compiler does not keep: who may import whom, how a file begins, how long it may grow,
//! where `unsafe` may stand. Reads manifests and sources; runs nothing of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// What each crate may import of ours: exactly this, no more and no less.
const IMPORTS: [(&str, &[&str]); 9] = [
    ("ctq-model", &[]),
    ("ctq-container", &["ctq-model"]),
    ("ctq-convert", &["ctq-container", "ctq-model"]),
    ("ctq-kernels", &["ctq-container", "ctq-model"]),
    ("ctq-runtime", &["ctq-container", "ctq-kernels", "ctq-model"]),
    ("ctq-cluster", &["ctq-kernels"]),
    ("ctq-reference", &["ctq-model"]),
    ("ctq-eval", &["ctq-model"]),
    ("ctq-verify", &["ctq-container", "ctq-convert", "ctq-model", "ctq-reference", "ctq-runtime"]),
];

/// Where people may run into every crate: the program, and the tests of the whole.
const SEES_EVERYTHING: [&str; 2] = ["ctq", "ctq-tests"];

/// Files that map other files; apart from the kernels, nothing else is unsafe.
const UNSAFE: [&str; 3] = ["model/src/shard.rs", "container/src/part_file.rs", "cli/src/bench/mapped.rs"];

/// A longer file has more than one subject.
const LONGEST: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// The imports of every crate of the workspace: name to (kind of dependency, name).
fn imports() -> BTreeMap<String, BTreeSet<(String, String)>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |value: &Value| value.as_str().unwrap_or("normal").to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let of = |package: &Value| {
        let ours =
            list(&package["dependencies"]).into_iter().filter(|dependency| dependency["path"].is_string());
        ours.map(|dependency| (text(&dependency["kind"]), text(&dependency["name"]))).collect()
    };
    list(&metadata["packages"]).iter().map(|package| (text(&package["name"]), of(package))).collect()
}

#[test]
fn crates_import_what_the_design_allows() {
    let mut imports = imports();
    for name in SEES_EVERYTHING {
        imports.remove(name).unwrap_or_else(|| panic!("there is no crate {name}"));
    }
    for (name, allowed) in IMPORTS {
        let found = imports.remove(name).unwrap_or_else(|| panic!("there is no crate {name}"));
        let kind = |normal: bool| {
            found.iter().filter(move |(kind, _)| (kind == "normal") == normal).map(|(_, name)| name.as_str())
        };
        let allowed: BTreeSet<&str> = allowed.iter().copied().collect();
        assert_eq!(kind(true).collect::<BTreeSet<_>>(), allowed, "imports of {name}");
        // Tests may see more of their own crate.
        let tests: Vec<&str> =
            kind(false).filter(|import| *import != name && !allowed.contains(import)).collect();
        assert!(tests.is_empty(), "tests or the build of {name} import {tests:?}");
    }
    assert!(imports.is_empty(), "crates that the design does not know: {:?}", imports.keys());
}

/// All files below `folder` that are the project's own, but for what builds leave.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let left_by_builds = path.is_dir() && (name == ".git" || name == "target" || name.starts_with("__"));
        if left_by_builds || path.is_symlink() {
            continue;
        }
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

/// Every file of the repository that is text, with its path from the root.
fn texts() -> Vec<(String, String)> {
    let mut found = Vec::new();
    files(&root(), &mut found);
    found.sort();
    let text = |path: PathBuf| {
        let name = path.strip_prefix(root()).expect("below the root").to_string_lossy().replace('\\', "/");
        Some((name, String::from_utf8(fs::read(path).ok()?).ok()?))
    };
    found.into_iter().filter_map(text).collect()
}

fn sources() -> Vec<(String, String)> {
    let sources: Vec<_> = texts().into_iter().filter(|(name, _)| name.ends_with(".rs")).collect();
    assert!(sources.len() > 100, "only {} sources were found", sources.len());
    sources
}

#[test]
fn every_file_says_what_it_is_about() {
    let silent: Vec<String> =
        sources().into_iter().filter(|(_, text)| !text.starts_with("//! ")).map(|(name, _)| name).collect();
    assert!(silent.is_empty(), "these do not begin with `//! `: {silent:#?}");
}

#[test]
fn no_file_is_about_everything() {
    let long: Vec<(String, usize)> = sources()
        .into_iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > LONGEST)
        .collect();
    assert!(long.is_empty(), "these are longer than {LONGEST} lines: {long:#?}");
}

#[test]
fn no_file_is_named_after_nothing() {
    let nothing = ["utils", "util", "common", "helpers", "helper", "misc"];
    let named: Vec<String> = sources()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.trim_end_matches(".rs").split('/').any(|part| nothing.contains(&part)))
        .collect();
    assert!(named.is_empty(), "these names say nothing: {named:#?}");
}

#[test]
fn unsafe_stands_in_kernels_and_where_files_are_mapped() {
    let word = concat!("un", "safe");
    let is_unsafe = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        [" {", " fn", " impl", " extern", "(no_mangle"]
            .iter()
            .any(|after| code.contains(&format!("{word}{after}")))
            || code.contains(&format!("{word}_code, reason"))
            || code.contains(&format!("({word}_code)"))
    };
    let found: BTreeSet<String> = sources()
        .into_iter()
        .filter(|(name, text)| !name.starts_with("kernels/") && text.lines().any(is_unsafe))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(found, UNSAFE.iter().map(|name| (*name).to_owned()).collect());
}

/// A path of one machine means nothing on another.
#[test]
fn nothing_names_a_path_of_one_machine() {
    let homes = ["root", "home", "Users", "work", "tmp", "mnt"].map(|name| format!("/{name}/"));
    let mut found = Vec::new();
    for (name, text) in texts() {
        for (number, line) in text.lines().enumerate() {
            // Only where a path begins: not in the middle of an address or of a relative path.
            let begins = |home: &String| {
                line.match_indices(home.as_str()).any(|(at, _)| {
                    !line[..at]
                        .ends_with(|before: char| before.is_alphanumeric() || "._-~]}>/".contains(before))
                })
            };
            if homes.iter().any(begins) {
                found.push(format!("{name}:{}: {line}", number + 1));
            }
        }
    }
    assert!(found.is_empty(), "absolute paths of some machine: {found:#?}");
}
