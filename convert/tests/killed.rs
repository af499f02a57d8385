//! A real process that dies, or that runs into a limit on file sizes, in the middle of a conversion. The process is this
//! test program itself, started again to run one test.
#![cfg(unix)]

mod checkpoints;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use checkpoints::{Tiny, assert_same_parts, convert_to, open, options};
use ctq_container::{Container, ErrorKind};
use ctq_convert::{TiledCheckpoint, convert};

const SOURCE: &str = "CTQ_TEST_CHILD_SOURCE";
const OUT: &str = "CTQ_TEST_CHILD_OUT";

fn child_paths() -> Option<(PathBuf, PathBuf)> {
    Some((std::env::var_os(SOURCE)?.into(), std::env::var_os(OUT)?.into()))
}

/// Runs one test of this program in a process of its own, under a shell that prepares its limits.
fn run(prepare: &str, test: &str, source: &Path, out: &Path) -> Output {
    let script = format!("{prepare}; exec \"$0\" --exact {test} --nocapture");
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg(program).env(SOURCE, source).env(OUT, out);
    command.output().unwrap()
}

/// Not a test by itself: converts until the embedding and the layer are done, then dies without a word.
#[test]
fn child_that_dies() {
    let Some((source, out)) = child_paths() else { return };
    let (checkpoint, inventory) = open(&source);
    let observer = |progress: ctq_convert::Progress| {
        if progress.parts_done == 2 {
            std::process::abort();
        }
    };
    convert(&checkpoint, &inventory, &out, &options(1), &observer).unwrap();
}

/// Not a test by itself: converts, and expects that there is no room.
#[test]
fn child_without_room() {
    let Some((source, out)) = child_paths() else { return };
    let error = convert_to(&source, &out, &options(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Resource);
    let message = error.to_string();
    assert!(message.contains("layer-00000.safetensors: "), "{message}");
    assert!(message.ends_with("run the same command again: 1 of 3 parts are done and kept"), "{message}");
}

#[test]
fn after_a_kill_the_same_conversion_goes_on() {
    let source = Tiny::int4(33, 64).write();
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("out");
    assert!(!run("ulimit -c 0", "child_that_dies", source.path(), &out).status.success());
    assert!(Container::open(&out).unwrap_err().to_string().contains("2 parts are done"));
    let (checkpoint, inventory) = open(source.path());
    let first = std::sync::Mutex::new(None);
    let observer = |progress: ctq_convert::Progress| {
        first.lock().unwrap().get_or_insert(progress.parts_done);
    };
    let container = convert(&checkpoint, &inventory, &out, &options(1), &observer).unwrap();
    assert_eq!(*first.lock().unwrap(), Some(2));
    container.verify_hashes().unwrap();
    assert_same_parts(&container, &TiledCheckpoint::open(source.path(), &[]).unwrap());
}

#[test]
fn a_limit_on_file_sizes_is_no_room_and_costs_one_part() {
    let source = Tiny::int4(33, 64).write();
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("out");
    // 32 or 64 KiB, as the shell counts blocks; the layer takes more, the embedding less. The signal that comes with the
    // limit is ignored, as ctq itself does.
    let child = run("trap '' XFSZ; ulimit -f 64", "child_without_room", source.path(), &out);
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    assert!(!out.join("layer-00000.safetensors.partial").exists());
    convert_to(source.path(), &out, &options(1)).unwrap().verify_hashes().unwrap();
}
