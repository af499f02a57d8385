//! SIGINT and SIGTERM: work is saved first, exit code 3, and the last line says that the same command goes on. A full
//! disk and an output in use end the same way.

#![cfg(unix)]

use crate::checkpoint::random_llama;
use crate::session::{Ran, Session, signal, wait_until};

const SLOW: &str = "eval NVFP4 --data text.txt --preset hf-strided --ctx 256 --stride 64 --rows 150 --acts off \
                    --memory 24M --json result.json";

/// Whether eval has scored some windows and kept them.
fn has_scores(session: &Session) -> bool {
    let folder = std::fs::read_dir(session.path("cache/eval")).into_iter().flatten().flatten();
    folder.map(|entry| entry.path()).any(|path| path.extension().is_some_and(|x| x == "scores"))
}

/// Starts, waits, signals, and gives what is left.
fn interrupted(session: &Session, line: &str, name: &str, reached: impl Fn() -> bool) -> Ran {
    let mut child = session.start(line);
    assert!(wait_until(&mut child, reached), "`ctq {line}` is too quick to be interrupted");
    signal(&child, name);
    session.wait(child).expect(3)
}

#[test]
fn eval_saves_and_goes_on() {
    let session = Session::with(&["NVFP4"]);
    session.ctq(SLOW).expect(0);
    let undisturbed = session.json("result.json")[0]["total_nll"].clone();
    for name in ["INT", "TERM"] {
        let ran = interrupted(&session, SLOW, name, || has_scores(&session));
        let words = ran.last_words();
        assert!(words.starts_with("error: NVFP4: interrupted; "), "{words}");
        assert!(
            words.ends_with(" of 150 windows are scored and kept, the same command goes on from there"),
            "{words}"
        );
        let record = &session.json("result.json")[0];
        assert_eq!((record["status"].as_str(), record["perplexity"].as_f64()), (Some("failed"), None));
        let last = session.ctq(SLOW).expect(0);
        assert!(last.stderr.contains("going on: "), "{}", last.stderr);
        assert_eq!(session.json("result.json")[0]["total_nll"], undisturbed);
    }
}

#[test]
fn what_is_scored_before_an_interrupt_is_not_scored_again() {
    let session = Session::with(&["bf16", "NVFP4"]);
    let line = SLOW.replace("eval NVFP4", "eval bf16 NVFP4");
    let two = || {
        let folder = std::fs::read_dir(session.path("cache/eval")).into_iter().flatten().flatten();
        folder.filter(|entry| entry.path().extension().is_some_and(|x| x == "scores")).count() == 2
    };
    interrupted(&session, &line, "INT", two);
    let again = session.ctq(&line).expect(0);
    assert!(again.stderr.contains("going on: 150 of 150 windows are scored already"), "{}", again.stderr);
    assert!(!has_scores(&session), "a complete command has left its state");
}

#[test]
fn convert_goes_on_after_a_signal() {
    let session = Session::new();
    random_llama(24, 384).write(&session, "model");
    for (name, part) in [("INT", "layer-00003"), ("TERM", "layer-00012")] {
        let part = session.path("out").join(format!("{part}.safetensors"));
        let ran = interrupted(&session, "convert model out --threads 1", name, || part.exists());
        let words = ran.last_words();
        assert!(
            words.contains(": interrupted; run the same command again, it goes on from there: "),
            "{words}"
        );
        assert!(words.ends_with(" of 26 parts are done and kept"), "{words}");
    }
    let last = session.ctq("convert model out").expect(0);
    assert!(last.stderr.contains("going on: "), "{}", last.stderr);
    session.ctq("verify out --bits-only").expect(0);
}

#[test]
fn verify_and_logits_say_that_they_start_again() {
    let session = Session::new();
    random_llama(24, 384).write(&session, "model");
    session.ctq("-q convert model out").expect(0);
    crate::commands::write_ids(&session, "ids.safetensors", &[[1; 256].as_slice(); 16]);
    let said = |name: &str| {
        let log = session.path(name);
        move || std::fs::read_to_string(&log).is_ok_and(|said| said.contains(" left"))
    };
    let verify = "verify out --threads 1 --log verify.log";
    let ran = interrupted(&session, verify, "INT", said("verify.log"));
    insta::assert_snapshot!(ran.last_words(), @"error: interrupted: nothing is kept, the same command starts again");
    let logits = "logits model --ids ids.safetensors --out l.safetensors --threads 1 --log logits.log";
    let ran = interrupted(&session, logits, "TERM", said("logits.log"));
    insta::assert_snapshot!(ran.last_words(), @"error: interrupted: nothing is written, the same command starts again");
    assert!(!session.path("l.safetensors").exists());
}

#[test]
fn an_output_in_use_by_another_process() {
    let session = Session::new();
    random_llama(24, 384).write(&session, "model");
    let mut first = session.start("convert model out --threads 1");
    let begun = session.path("out/layer-00001.safetensors");
    assert!(wait_until(&mut first, || begun.exists()), "the conversion is too quick to be stopped");
    signal(&first, "STOP");
    let second = session.ctq("convert model out").expect(3);
    insta::assert_snapshot!(second.stderr, @"error: DIR/out: in use by another process that converts into it; wait for it to end, or choose another folder");
    let third = session.ctq("convert model out --force").expect(3);
    assert_eq!(third.stderr, second.stderr);
    signal(&first, "CONT");
    session.wait(first).expect(0);
    session.ctq("verify out --bits-only").expect(0);
}

#[test]
fn disk_full_in_convert() {
    let session = Session::with(&["NVFP4"]);
    let ran = session.run(session.shell("ulimit -f 64; exec ctq convert NVFP4 out --threads 1")).expect(3);
    insta::assert_snapshot!(ran.stderr, @"error: DIR/out/embedding.safetensors: File too large (os error 27); 782336 bytes are still to be written; make room, then run the same command again: 0 of 4 parts are done and kept");
    assert!(!session.path("out/embedding.safetensors.partial").exists());
    session.ctq("convert NVFP4 out").expect(0);
}

#[test]
fn disk_full_in_eval() {
    let session = Session::with(&["bf16"]);
    let line = "eval bf16 --data text.txt --ctx 256 --stride 64 --rows 4 --save-every 0";
    let ran = session.run(session.shell(&format!("ulimit -f 8; exec ctq {line}"))).expect(3);
    let words = ran.last_words();
    assert!(words.starts_with("error: bf16: DIR/cache/eval/"), "{words}");
    assert!(
        words.ends_with(
            ".snapshot: File too large (os error 27); free some space or set CTQ_CACHE to another folder; \
             0 of 4 windows are scored and kept, the same command goes on from there"
        ),
        "{words}"
    );
    session.ctq(line).expect(0);
}

#[test]
fn disk_full_in_restore_and_logits() {
    let session = Session::with(&["bf16"]);
    session.ctq("-q convert bf16 out").expect(0);
    let ran = session.run(session.shell("ulimit -f 64; exec ctq restore out original")).expect(3);
    insta::assert_snapshot!(ran.stderr, @"error: original/model.safetensors: File too large (os error 27); nothing is left of the attempt; make room or check the permissions, then run the same command again");
    session.ctq("restore out original").expect(0);

    crate::commands::write_ids(&session, "ids.safetensors", &[&[478; 64]]);
    let line = "logits bf16 --ids ids.safetensors --out logits.safetensors";
    let ran = session.run(session.shell(&format!("ulimit -f 64; exec ctq {line}"))).expect(3);
    insta::assert_snapshot!(ran.stderr, @"error: logits.safetensors: cannot be written; check that its folder takes a file of 122880 bytes, then run the same command again: File too large (os error 27)");
    assert!(!session.path("logits.safetensors").exists());
    session.ctq(line).expect(0);
}
