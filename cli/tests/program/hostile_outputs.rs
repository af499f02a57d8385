//! Outputs that cannot be: each is refused before work begins, and nothing that is there is touched.

use std::fs;

use insta::assert_snapshot;

use crate::session::{Session, files_of};

#[test]
fn convert() {
    let session = Session::with(&["bf16", "W4A16"]);
    session.write("file", "a file");
    let told = |line: &str| session.ctq(line).expect(2).stderr;
    assert_snapshot!(told("convert bf16 file"), @"error: file: it is a file, and a container is a folder; choose another path");
    assert_snapshot!(told("convert bf16 file/out"), @"error: file/out: file is a file, not a folder; choose a path inside a folder");
    assert_snapshot!(told("convert bf16 file/further/out"), @"error: file/further/out: its parent folder file/further does not exist; create it first, or choose another path");
    assert_snapshot!(told("convert bf16 missing/out"), @"error: missing/out: its parent folder missing does not exist; create it first, or choose another path");
    // A folder that is no container stays as it is, with --force too.
    let before = files_of(&session.path("W4A16"));
    assert_snapshot!(told("convert bf16 W4A16"), @"error: DIR/W4A16: it is not empty and not a ctq container, so ctq does not touch it; choose a new or an empty folder");
    told("convert bf16 W4A16 --force");
    assert!(files_of(&session.path("W4A16")) == before, "a foreign folder was touched");
    assert_snapshot!(told("convert gone out"), @"error: gone is not a checkpoint: there is no such directory; give the folder that holds config.json and model.safetensors");
    assert!(!session.path("out").exists());
}

#[test]
fn a_complete_container_is_replaced_as_a_whole_or_not_at_all() {
    let session = Session::with(&["bf16", "W4A16"]);
    session.ctq("-q convert W4A16 out").expect(0);
    let before = files_of(&session.path("out"));
    assert_snapshot!(session.ctq("convert bf16 out").expect(2).stderr, @"error: DIR/out: a complete container, made from DIR/W4A16, is there already; use --force to replace it, or choose another folder");
    assert!(files_of(&session.path("out")) == before, "a complete container was touched");
    session.ctq("-q convert bf16 out --force").expect(0);
    session.ctq("verify out --bits-only --against bf16").expect(0);
}

#[test]
#[cfg(unix)]
fn a_replacement_that_fails_leaves_the_old_container() {
    let session = Session::with(&["bf16", "W4A16"]);
    session.ctq("-q convert W4A16 out").expect(0);
    let before = files_of(&session.path("out"));
    session.run(session.shell("ulimit -f 64; exec ctq convert bf16 out --force")).expect(3);
    assert!(files_of(&session.path("out")) == before, "a complete container was touched");
    session.ctq("-q convert bf16 out --force").expect(0);
    session.ctq("verify out --bits-only --against bf16").expect(0);
}

#[test]
fn an_unfinished_conversion_of_something_else() {
    let session = Session::with(&["bf16", "W4A16"]);
    fs::create_dir(session.path("out")).expect("a folder");
    session.write("out/ctq.progress", "");
    assert_snapshot!(session.ctq("inspect out").expect(2).stderr, @"error: out: the conversion is not finished, 0 parts are done; run the same `ctq convert` again, it goes on from there");
    session.ctq("-q convert bf16 out").expect(0);
}

#[test]
fn restore() {
    let session = Session::with(&["W4A16"]);
    session.ctq("-q convert W4A16 out").expect(0);
    let told = |line: &str| session.ctq(line).expect(2).stderr;
    assert_snapshot!(told("restore out W4A16"), @"error: W4A16: it is not empty; choose a new or an empty folder");
    assert_snapshot!(told("restore out text.txt"), @"error: text.txt: it is not a folder that can be read; choose another path");
    assert_snapshot!(told("restore out missing/original"), @"error: missing/original: its parent is not a folder; create it first, or choose another path");
    assert_snapshot!(told("restore W4A16 original"), @"error: W4A16 is not a ctq container: it has no ctq.json; give a folder that `ctq convert` has written");
    assert_snapshot!(told("restore gone original"), @"error: gone is not a ctq container: there is no such directory; give a folder that `ctq convert` has written");
}

#[test]
fn results_of_eval() {
    let session = Session::with(&["W4A16"]);
    fs::create_dir(session.path("folder")).expect("a folder");
    let told = |options: &str| session.ctq(&format!("eval W4A16 --data text.txt {options}")).expect(2).stderr;
    assert_snapshot!(told("--json missing/r.json"), @"error: missing/r.json: cannot be written: missing is not a folder; make it first");
    assert_snapshot!(told("--json folder"), @"error: folder: cannot be written: it is a folder; give a file");
    assert_snapshot!(told("--nll missing/n.safetensors"), @"error: missing/n.safetensors: cannot be written: missing is not a folder; make it first");
    assert_snapshot!(told("--nll text.txt/n.safetensors"), @"error: text.txt/n.safetensors: cannot be written: text.txt is not a folder; make it first");
    assert_snapshot!(told("--log missing/said.log"), @"error: missing/said.log: cannot write the log; check that its folder is there: No such file or directory (os error 2)");
}

#[test]
fn logits() {
    let session = Session::with(&["W4A16"]);
    crate::commands::write_ids(&session, "ids.safetensors", &[&[1, 2]]);
    let told =
        |out: &str| session.ctq(&format!("logits W4A16 --ids ids.safetensors --out {out}")).expect(2).stderr;
    assert_snapshot!(told("missing/l.safetensors"), @"error: missing/l.safetensors: cannot be written: missing is not a folder; make it first");
    assert_snapshot!(told("W4A16"), @"error: W4A16: cannot be written: it is a folder; give a file");
}

#[test]
fn a_cache_that_cannot_be_written() {
    let session = Session::with(&["W4A16"]);
    session.write("cache", "a file where the cache folder should be");
    let ran = session.ctq("eval W4A16 --data text.txt --ctx 64 --rows 2");
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert_snapshot!(ran.last_words(), @"error: W4A16: DIR/cache/eval: cannot be made; set CTQ_CACHE to a folder that can be written: Not a directory (os error 20)");
}
