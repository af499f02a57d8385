//! Where libraries are looked for, on file systems made up for it.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;

use super::*;

const NVRTC: Wanted =
    Wanted { variable: "CTQ_NVRTC", name: "libnvrtc.so", majors: Vec::new(), component: "cuda_nvrtc" };

fn wanted(majors: &[u32]) -> Wanted {
    Wanted { majors: majors.to_vec(), ..NVRTC }
}

/// A folder with empty files.
fn with_files(files: &[&str]) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a temporary folder");
    for file in files {
        let path = root.path().join(file);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, "").expect("a file");
    }
    root
}

/// Places in an environment of variables; `ROOT` stands for the folder.
fn places(root: &Path, variables: &[(&str, &str)]) -> Places {
    let root = root.to_str().expect("UTF-8");
    let variables: BTreeMap<&str, OsString> =
        variables.iter().map(|(name, value)| (*name, value.replace("ROOT", root).into())).collect();
    Places::of(&|name| variables.get(name).cloned())
}

/// Files that would be tried, from the root, without names that the loader looks up.
fn tried(root: &Path, majors: &[u32], variables: &[(&str, &str)]) -> Vec<String> {
    let (candidates, _) = candidates(&wanted(majors), &places(root, variables), None);
    let from_root = |candidate: Candidate| {
        let path = candidate.path.strip_prefix(root).ok()?.to_owned();
        Some(path.to_str().expect("UTF-8").to_owned())
    };
    candidates.into_iter().filter_map(from_root).collect()
}

const SITE: &str = "lib/python3.11/site-packages";

#[test]
fn packages_of_cuda_13_and_of_cuda_12_are_found() {
    let of_13 = format!("{SITE}/nvidia/cu13/lib/libnvrtc.so.13");
    let of_12 = format!("{SITE}/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
    let of_torch = format!("{SITE}/torch/lib/libnvrtc.so.12");
    let root = with_files(&[&of_13, &of_12, &of_torch]);
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        let tried = |majors: &[u32]| tried(root.path(), majors, &[(variable, "ROOT")]);
        assert_eq!(tried(&[13, 12]), [&*of_13, &of_12, &of_torch]);
        assert_eq!(tried(&[12]), [&*of_12, &of_torch], "what a driver of CUDA 12 takes");
    }
    assert_eq!(tried(root.path(), &[13, 12], &[]), [""; 0]);
}

#[test]
fn the_environment_of_the_python_on_the_path_is_found_without_running_it() {
    let in_environment = format!("env/{SITE}/nvidia/cu13/lib/libnvrtc.so.13");
    let in_system = "usr/local/lib/python3.11/dist-packages/nvidia/cu13/lib/libnvrtc.so.13";
    let root = with_files(&[&in_environment, in_system, "usr/bin/python3.11", "empty/keep", "env/bin/keep"]);
    symlink(root.path().join("usr/bin/python3.11"), root.path().join("env/bin/python3")).expect("a link");
    // The environment first, then what it was made from.
    let path = [("PATH", "ROOT/empty:ROOT/env/bin")];
    assert_eq!(tried(root.path(), &[13], &path), [&*in_environment, in_system]);
    assert_eq!(tried(root.path(), &[13], &[("PATH", "ROOT/empty")]), [""; 0]);
}

#[test]
fn an_installation_comes_before_packages_and_a_newer_major_before_all() {
    let package = format!("{SITE}/nvidia/cu13/lib/libnvrtc.so.13");
    let root = with_files(&["cuda/lib64/libnvrtc.so.12", "cuda/lib64/libnvrtc.so", &package]);
    let variables = [("CUDA_HOME", "ROOT/cuda"), ("VIRTUAL_ENV", "ROOT")];
    assert_eq!(
        tried(root.path(), &[13, 12], &variables),
        [&*package, "cuda/lib64/libnvrtc.so.12", "cuda/lib64/libnvrtc.so"]
    );
}

/// As a loader that can load these files, all of version `major`.0.
fn loading<'a>(
    root: &'a Path,
    versions: &'a [(&str, u32)],
) -> impl FnMut(&Path) -> Result<((), Version), String> + 'a {
    move |path| {
        let version = versions.iter().find(|(file, _)| path == root.join(file));
        match version {
            Some((_, major)) => Ok(((), Version { major: *major, minor: 0, patch: None })),
            None if path.is_file() => Err(format!("{}: invalid ELF header", path.display())),
            None => Err(format!("{}: No such file or directory", path.display())),
        }
    }
}

#[test]
fn the_first_that_loads_is_taken() {
    let broken = format!("{SITE}/nvidia/cu13/lib/libnvrtc.so.13");
    let whole = format!("{SITE}/torch/lib/libnvrtc.so.13");
    let root = with_files(&[&broken, &whole]);
    let places = places(root.path(), &[("VIRTUAL_ENV", "ROOT")]);
    let versions = [(&*whole, 13)];
    let found = search_with(&wanted(&[13]), &places, None, loading(root.path(), &versions));
    let ((), found) = found.expect("found");
    assert_eq!((found.path, found.version.to_string()), (root.path().join(&whole), "13.0".to_owned()));
    assert_eq!(found.origin, "$VIRTUAL_ENV");
    let missing =
        search_with(&wanted(&[13]), &places, None, loading(root.path(), &[])).expect_err("none loads");
    let told = |file: &str| format!("{}: invalid ELF header", root.path().join(file).display());
    assert_eq!(missing.refused, [told(&broken), told(&whole)]);
    assert_eq!(missing.looked_in[..2], ["the loader's path", "/usr/local/cuda"]);
    assert!(missing.to_string().starts_with("not usable: "), "{missing}");
}

#[test]
fn what_the_variable_names_is_taken_or_nothing() {
    let elsewhere = format!("{SITE}/nvidia/cu13/lib/libnvrtc.so.13");
    let root = with_files(&[&elsewhere, "mine/libnvrtc.so.12"]);
    let places = places(root.path(), &[("VIRTUAL_ENV", "ROOT")]);
    let versions = [(&*elsewhere, 13), ("mine/libnvrtc.so.12", 12)];
    let search = |value: &str| {
        let value = root.path().join(value).into_os_string();
        search_with(&wanted(&[13, 12]), &places, Some(value), loading(root.path(), &versions))
    };
    for value in ["mine", "mine/libnvrtc.so.12"] {
        let ((), found) = search(value).expect("found");
        assert_eq!((found.version.major, &*found.origin), (12, "$CTQ_NVRTC"));
    }
    let missing = search("gone.so").expect_err("nothing is there");
    assert_eq!(missing.looked_in, [format!("$CTQ_NVRTC = {}", root.path().join("gone.so").display())]);
    assert_eq!(missing.refused.len(), 1);
    assert_eq!(search("empty").expect_err("nothing is there").refused.len(), 1);
}

#[test]
fn versions_read_as_people_write_them() {
    let version = |patch| Version { major: 13, minor: 0, patch };
    assert_eq!(version(None).to_string(), "13.0");
    assert_eq!(version(Some(2)).to_string(), "13.0.2");
    assert!(version(None) < Version { major: 13, minor: 1, patch: None });
}
