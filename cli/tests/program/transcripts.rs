//! The transcripts in `cli/tests/transcripts/` double as documentation: what stands there is what the program prints.
//!
//! Every line after `$ ` in a `console` block is run by a shell, in a folder that holds copies of the bundled
//! checkpoints and `text.txt`; stdout and stderr follow it as they came, and the exit code if it is not 0. `[..]`
//! stands for what differs between runs or machines: times, memory, speed, instruction set.
//! `SNAPSHOTS=overwrite cargo test` writes what the program prints now.

#![cfg(unix)]

use std::fs;

use crate::session::{Session, repository};

#[test]
fn first_steps() {
    play("first-steps.md");
}

#[test]
fn scoring() {
    play("scoring.md");
}

#[test]
fn verifying() {
    play("verifying.md");
}

#[test]
fn refusals() {
    play("refusals.md");
}

fn play(name: &str) {
    let path = repository().join("cli/tests/transcripts").join(name);
    let session = Session::with(&["bf16", "W4A16", "FP8", "NVFP4"]);
    let actual = perform(&session, &fs::read_to_string(&path).unwrap_or_else(|e| panic!("{name}: {e}")));
    let written = snapbox::Data::read_from(&path, Some(snapbox::data::DataFormat::Text));
    snapbox::Assert::new().action_env("SNAPSHOTS").normalize_paths(false).eq(actual, written);
}

/// The same document with the output that its commands have now.
fn perform(session: &Session, document: &str) -> String {
    let mut result = String::new();
    let mut in_block = false;
    for line in document.lines() {
        if line.starts_with("```") {
            in_block = line == "```console";
        }
        let is_output = in_block && !line.starts_with("```") && !line.starts_with("$ ");
        if is_output {
            continue;
        }
        result.push_str(line);
        result.push('\n');
        if let Some(command) = line.strip_prefix("$ ").filter(|_| in_block) {
            result.push_str(&output(session, command));
        }
    }
    result
}

fn output(session: &Session, command: &str) -> String {
    let ran = session.run(session.shell(&format!("{{ {command}\n}} 2>&1")));
    let mut text = ran.stdout.replace("DIR/", "");
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    if ran.code != Some(0) {
        let code = ran.code.map_or_else(|| "signal".to_owned(), |code| code.to_string());
        text.push_str(&format!("(exit code {code})\n"));
    }
    text
}
