//! Kills, interrupts and outputs that are in the way: what is complete is kept, and nothing foreign is touched.

mod checkpoints;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoints::{Tiny, assert_same_parts, convert_to, open, options};
use ctq_container::{Container, ErrorKind, Overwrite};
use ctq_convert::{Error, Options, Progress, TiledCheckpoint, convert};
use insta::assert_snapshot;
use tempfile::TempDir;

/// A model of six layers, so that there is something to interrupt.
fn six_layers() -> Tiny {
    let mut tiny = Tiny::int4(33, 64);
    tiny.config["num_hidden_layers"] = 6.into();
    for (name, stored) in tiny.tensors.clone() {
        for layer in 1..6 {
            let name = name.replace("layers.0.", &format!("layers.{layer}."));
            tiny.tensors.insert(name, stored.clone());
        }
    }
    tiny
}

/// The message with the directory taken out.
fn message(error: &dyn std::fmt::Display, folder: &Path) -> String {
    let canonical = folder.canonicalize().unwrap();
    let text = error.to_string().replace(canonical.to_str().unwrap(), "DIR");
    text.replace(folder.to_str().unwrap(), "DIR")
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap()))
        .collect()
}

fn interrupted(source: &Path, out: &Path, after: usize) -> Error {
    let flag = AtomicBool::new(false);
    let (checkpoint, inventory) = open(source);
    let options = Options { interrupt: Some(&flag), ..options(1) };
    let observer = |progress: Progress| {
        if progress.parts_done >= after {
            flag.store(true, Ordering::Relaxed);
        }
    };
    convert(&checkpoint, &inventory, out, &options, &observer).unwrap_err()
}

struct Folders {
    source: TempDir,
    work: TempDir,
}

impl Folders {
    fn new() -> Folders {
        Folders { source: six_layers().write(), work: tempfile::tempdir().unwrap() }
    }

    fn out(&self) -> std::path::PathBuf {
        self.work.path().join("out")
    }
}

#[test]
fn an_interrupted_conversion_goes_on_and_ends_with_the_same_bytes() {
    let folders = Folders::new();
    let straight = folders.work.path().join("straight");
    convert_to(folders.source.path(), &straight, &options(3)).unwrap();
    let error = interrupted(folders.source.path(), &folders.out(), 3);
    assert_eq!(error.kind(), ErrorKind::Interrupted);
    assert_snapshot!(message(&error, folders.work.path()), @"DIR/out: interrupted; run the same command again, it goes on from there: 3 of 8 parts are done and kept");
    let half = Container::open(&folders.out()).unwrap_err();
    assert_snapshot!(message(&half, folders.work.path()), @"DIR/out: the conversion is not finished, 3 parts are done; run the same `ctq convert` again, it goes on from there");

    let seen = Mutex::new(Vec::new());
    let (checkpoint, inventory) = open(folders.source.path());
    let observer = |progress: Progress| seen.lock().unwrap().push(progress);
    let container = convert(&checkpoint, &inventory, &folders.out(), &options(2), &observer).unwrap();
    let seen = seen.into_inner().unwrap();
    assert_eq!((seen[0].finished, seen[0].parts_done, seen[0].parts), (None, 3, 8));
    assert_eq!(seen.len(), 6);
    assert!(seen.iter().any(|progress| progress.bytes_done == progress.bytes));
    assert_eq!(files(&folders.out()), files(&straight));
    assert_same_parts(&container, &TiledCheckpoint::open(folders.source.path(), &[]).unwrap());
}

#[test]
fn a_kill_at_any_byte_of_the_journal_or_a_part_costs_that_part_only() {
    let folders = Folders::new();
    let straight = folders.work.path().join("straight");
    convert_to(folders.source.path(), &straight, &options(1)).unwrap();
    interrupted(folders.source.path(), &folders.out(), 4);
    let journal = folders.out().join("ctq.progress");
    let whole = fs::read(&journal).unwrap();
    for cut in [0, 5, whole.len() / 2, whole.len() - 1] {
        fs::write(&journal, &whole[..cut]).unwrap();
        fs::write(folders.out().join("layer-00004.safetensors.partial"), "half a part").unwrap();
        interrupted(folders.source.path(), &folders.out(), 4);
    }
    // A part that is shorter than its record, as after a loss of power.
    fs::write(folders.out().join("layer-00000.safetensors"), "short").unwrap();
    convert_to(folders.source.path(), &folders.out(), &options(1)).unwrap();
    let mut found = files(&folders.out());
    found.remove("layer-00004.safetensors.partial");
    assert_eq!(found, files(&straight));
}

#[test]
fn another_checkpoint_is_not_mixed_in() {
    let folders = Folders::new();
    interrupted(folders.source.path(), &folders.out(), 2);
    let mut other = six_layers();
    other.gate("weight_packed").bytes[0] ^= 1;
    let other = other.write();
    let error = convert_to(other.path(), &folders.out(), &options(1)).unwrap_err();
    assert_snapshot!(message(&error, folders.work.path()), @"DIR/out: an unfinished conversion of another checkpoint, or by another version of ctq, is there; use --force to discard it, or choose another folder");
    assert_eq!(error.kind(), ErrorKind::Input);
    let force = Options { overwrite: Overwrite::Replace, ..options(1) };
    let container = convert_to(other.path(), &folders.out(), &force).unwrap();
    assert_same_parts(&container, &TiledCheckpoint::open(other.path(), &[]).unwrap());
}

#[test]
fn a_complete_container_is_replaced_only_when_asked_and_only_when_the_new_one_is_complete() {
    let folders = Folders::new();
    convert_to(folders.source.path(), &folders.out(), &options(1)).unwrap();
    fs::write(folders.out().join("README.md"), "mine").unwrap();
    let before = files(&folders.out());
    let mut other = six_layers();
    other.gate("weight_packed").bytes[0] ^= 1;
    let other = other.write();

    let error = convert_to(other.path(), &folders.out(), &options(1)).unwrap_err();
    assert!(error.to_string().contains("is there already; use --force to replace it"));
    assert_eq!(files(&folders.out()), before);

    let flag = AtomicBool::new(true);
    let force = Options { overwrite: Overwrite::Replace, ..options(1) };
    let stopped = Options { interrupt: Some(&flag), ..force.clone() };
    convert_to(other.path(), &folders.out(), &stopped).unwrap_err();
    assert_eq!(files(&folders.out()), before);
    Container::open(&folders.out()).unwrap();

    let container = convert_to(other.path(), &folders.out(), &force).unwrap();
    assert_same_parts(&container, &TiledCheckpoint::open(other.path(), &[]).unwrap());
    assert_eq!(fs::read_to_string(folders.out().join("README.md")).unwrap(), "mine");
    assert!(!folders.work.path().join("out.ctq-replacement").exists());
}

#[test]
fn outputs_that_are_no_place_for_a_container_are_refused_and_left_alone() {
    let folders = Folders::new();
    let refused = |out: &Path| {
        let error = convert_to(folders.source.path(), out, &options(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Input);
        message(&error, folders.work.path())
    };
    let file = folders.work.path().join("file");
    fs::write(&file, "text").unwrap();
    assert_snapshot!(refused(&file), @"DIR/file: it is a file, and a container is a folder; choose another path");
    assert_snapshot!(refused(&file.join("out")), @"DIR/file/out: DIR/file is a file, not a folder; choose a path inside a folder");
    assert_snapshot!(refused(&folders.work.path().join("no/out")), @"DIR/no/out: its parent folder DIR/no does not exist; create it first, or choose another path");
    let full = folders.work.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("thesis.tex"), "mine").unwrap();
    assert_snapshot!(refused(&full), @"DIR/full: it is not empty and not a ctq container, so ctq does not touch it; choose a new or an empty folder");
    assert_eq!(files(&full).len(), 1);
}

#[test]
fn an_output_in_use_is_left_to_the_other_process() {
    let folders = Folders::new();
    interrupted(folders.source.path(), &folders.out(), 2);
    let journal = fs::File::open(folders.out().join("ctq.progress")).unwrap();
    journal.lock().unwrap();
    let error = convert_to(folders.source.path(), &folders.out(), &options(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Resource);
    assert_snapshot!(message(&error, folders.work.path()), @"DIR/out: in use by another process that converts into it; wait for it to end, or choose another folder");
    drop(journal);
    convert_to(folders.source.path(), &folders.out(), &options(1)).unwrap();
}

#[test]
fn restoring_refuses_a_folder_with_something_in_it() {
    let folders = Folders::new();
    let container = convert_to(folders.source.path(), &folders.out(), &options(1)).unwrap();
    let error = ctq_convert::restore(&container, &folders.out()).unwrap_err();
    assert_snapshot!(message(&error, folders.work.path()), @"DIR/out: it is not empty; choose a new or an empty folder");
    let parentless = ctq_convert::restore(&container, &folders.work.path().join("no/where")).unwrap_err();
    assert_snapshot!(message(&parentless, folders.work.path()), @"DIR/no/where: its parent is not a folder; create it first, or choose another path");
}

#[test]
fn a_full_disk_is_told_before_work_begins() {
    let folder = tempfile::tempdir().unwrap();
    let error = ctq_container::check_space(folder.path(), u64::MAX, 2, 8).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Resource);
    let text = error.to_string();
    assert!(text.contains("18446744073709551615 bytes are still to be written"));
    assert!(text.ends_with("make room, then run the same command again: 2 of 8 parts are done and kept"));
}
