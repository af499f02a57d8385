//! Windows shared out among independent runs: all parts together have the bits of one run, and nothing else passes for
//! all parts.

use std::fs;

use insta::assert_snapshot;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::exit_codes::overflowing_at;
use crate::session::{Session, copy_folder, repository, wait_until};

/// Five windows over two blocks of the error bars.
const QUESTION: &str = "--data text.txt --preset disjoint --ctx 128 --rows 5";

/// What a merge cannot have in common with one run.
const COST: [&str; 3] = ["seconds", "tokens_per_second", "peak_memory_bytes"];

/// Runs every part of a split, each into `NAME-I.json`.
fn parts(session: &Session, models: &str, options: &str, of: usize, name: &str) {
    for part in 1..=of {
        let line = format!("-q eval {models} {options} --shard {part}/{of} --json {name}-{part}.json");
        assert_eq!(session.ctq(&line).expect(0).stdout, "", "a part is no result");
    }
}

/// Records as text, which tells apart what compares equal, without their cost.
fn answers(session: &Session, name: &str) -> String {
    let mut records = session.json(name);
    for record in records.as_array_mut().expect("a list of records") {
        COST.iter().for_each(|field| record[field] = Value::Null);
    }
    records.to_string()
}

/// What was printed, without time and memory.
fn printed(stdout: &str) -> String {
    let cost = |line: &&str| line.starts_with("time: ") || line.starts_with("peak memory: ");
    stdout.lines().filter(|line| !cost(line)).map(|line| format!("{line}\n")).collect()
}

/// The files whose names begin with `stem`: the rest of their names, and their bytes.
fn files_from(session: &Session, stem: &str) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(session.root())
        .expect("the session's folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .filter_map(|name| Some((name.strip_prefix(stem)?.to_owned(), fs::read(session.path(&name)).ok()?)))
        .collect();
    files.sort();
    files
}

/// Parts of each number are merged, out of order, into what one run gives.
fn agrees(session: &Session, models: &str, options: &str, splits: &[usize]) {
    let whole = session.ctq(&format!("-q eval {models} {options} --json w.json --nll whole.nll")).expect(0);
    for of in splits {
        let what = format!("{models} {options} in {of} parts");
        parts(session, models, options, *of, "part");
        // An order that is neither that of the parts nor its reverse.
        let mut names: Vec<String> = (1..=*of).map(|part| format!("part-{part}.json")).collect();
        names.rotate_left(of / 2);
        let line = format!("-q merge {} --json m.json --nll merged.nll", names.join(" "));
        let merged = session.ctq(&line).expect(0);
        assert_eq!(answers(session, "m.json"), answers(session, "w.json"), "{what}");
        assert_eq!(printed(&merged.stdout), printed(&whole.stdout), "{what}");
        let (merged, whole) = (files_from(session, "merged"), files_from(session, "whole"));
        assert!(!whole.is_empty() && merged == whole, "{what}: nll");
        // The speed is that of what was done.
        let record = &session.json("m.json")[0];
        assert!(record["seconds"].as_f64() > Some(0.0) && record["tokens_per_second"].as_f64() > Some(0.0));
    }
}

#[test]
fn parts_of_any_number_have_the_bits_of_one_run() {
    let session = Session::with(&["NVFP4"]);
    agrees(&session, "NVFP4", QUESTION, &[1, 3, 7]);
    let records = session.json("m.json");
    assert_eq!(records[1]["acts"], "library");
    assert!(records[1]["paired"]["difference_error"].is_number(), "no paired difference: {records:#}");
}

#[test]
fn every_mode_of_activations() {
    let session = Session::with(&["FP8"]);
    for acts in ["off", "library", "kernel"] {
        agrees(&session, "FP8", &format!("{QUESTION} --acts {acts}"), &[2]);
    }
}

#[test]
fn windows_that_overlap_and_a_last_one_that_is_short() {
    let session = Session::with(&["W4A16"]);
    let question = "--data text.txt --preset hf-strided --ctx 128 --stride 48 --max-tokens 700";
    agrees(&session, "W4A16", question, &[4]);
}

/// Session with a mixture of experts, and a tokenizer for its 256 tokens.
fn with_experts() -> Session {
    let session = Session::with(&["bf16"]);
    copy_folder(&repository().join("golden/families/qwen3moe-nvfp4"), &session.path("moe"));
    let bundled = fs::read(session.path("bf16/tokenizer.json")).expect("the bundled tokenizer");
    let mut tokenizer: Value = serde_json::from_slice(&bundled).expect("JSON");
    // What is left are its single bytes, which are its first 256 tokens.
    tokenizer["added_tokens"] = json!([]);
    tokenizer["post_processor"] = Value::Null;
    tokenizer["model"]["merges"] = json!([]);
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().expect("a vocabulary");
    vocabulary.retain(|_, id| id.as_u64() < Some(256));
    session.write("moe/tokenizer.json", tokenizer.to_string());
    session
}

#[test]
fn several_models_in_one_command() {
    let session = with_experts();
    agrees(&session, "moe bf16", QUESTION, &[3]);
    // A container is a model too.
    session.ctq("-q convert moe moe.ctq").expect(0);
    agrees(&session, "moe.ctq", QUESTION, &[2]);
}

#[test]
fn a_model_that_no_part_could_score_is_a_row_as_in_one_run() {
    let session = Session::with(&["bf16"]);
    let whole = session.ctq(&format!("-q eval bf16 gone {QUESTION} --json w.json")).expect(2);
    for part in 1..=2 {
        session.ctq(&format!("-q eval bf16 gone {QUESTION} --shard {part}/2 --json p{part}.json")).expect(2);
    }
    let merged = session.ctq("-q merge p2.json p1.json --json m.json").expect(2);
    assert_eq!(answers(&session, "m.json"), answers(&session, "w.json"));
    assert_eq!((merged.stdout, merged.stderr), (whole.stdout, whole.stderr));
}

#[test]
fn a_part_that_is_invalid_makes_the_result_invalid() {
    let session = Session::with(&["bf16"]);
    // It overflows at a letter that the text's first windows do not hold.
    let tokenizer: Value = session.json("bf16/tokenizer.json");
    let letter = tokenizer["model"]["vocab"]["Z"].as_u64().expect("a letter is a token");
    overflowing_at(&session, "broken", usize::try_from(letter).expect("a token"));
    let text = fs::read_to_string(session.path("text.txt")).expect("the text");
    assert!(!text.contains('Z'));
    session.write("text.txt", format!("{}Z{}", &text[..1100], &text[1100..]));
    session.ctq(&format!("-q eval broken {QUESTION} --json w.json")).expect(1);
    session.ctq(&format!("-q eval broken {QUESTION} --shard 1/2 --json p1.json")).expect(0);
    session.ctq(&format!("-q eval broken {QUESTION} --shard 2/2 --json p2.json")).expect(1);
    let merged = session.ctq("-q merge p1.json p2.json --json m.json --nll m.nll").expect(1);
    assert!(merged.stderr.contains("the hidden state is not finite"), "{}", merged.stderr);
    let record = &session.json("m.json")[0];
    assert_eq!((record["status"].as_str(), &record["perplexity"]), (Some("invalid"), &Value::Null));
    assert_eq!(answers(&session, "m.json"), answers(&session, "w.json"));
    assert!(files_from(&session, "m.nll").is_empty(), "an invalid result has scores");
}

#[test]
fn commands_that_make_no_part() {
    let session = Session::with(&["bf16"]);
    let told = |options: &str| session.ctq(&format!("eval bf16 {QUESTION} {options}")).expect(2).stderr;
    assert_snapshot!(told("--shard 2/3"), @"error: --shard 2/3 writes a part, not a result: name its file, as in `--shard 2/3 --json part-2.json`, and join all 3 parts with `ctq merge part-*.json`");
    assert_snapshot!(told("--shard 2/3 --json p.json --nll p.nll"), @"error: --nll does not go with --shard: part 2 of 3 holds each position's nll already; give --nll to `ctq merge`");
    for wrong in ["0/3", "4/3", "3", "a/b"] {
        let told = told(&format!("--shard {wrong} --json p.json"));
        assert!(told.contains("expected I/N with I from 1 to N, such as 2/8"), "{told}");
    }
    assert!(!session.path("p.json").exists());
}

/// A session with the two parts of one evaluation, `a.json` and `b.json`.
fn two_parts() -> Session {
    let session = Session::with(&["W4A16"]);
    for (part, name) in [(1, "a"), (2, "b")] {
        part_of(&session, &format!("W4A16 {QUESTION} --shard {part}/2"), name);
    }
    session
}

fn part_of(session: &Session, line: &str, name: &str) {
    session.ctq(&format!("-q eval {line} --json {name}.json")).expect(0);
}

/// What a merge says that is refused and writes nothing.
fn refused(session: &Session, files: &str) -> String {
    let ran = session.ctq(&format!("merge {files} --json merged.json")).expect(2);
    assert_eq!(ran.stdout, "");
    assert!(!session.path("merged.json").exists(), "a refused merge has written a result");
    ran.stderr
}

#[test]
fn parts_that_are_missing_or_doubled() {
    let session = two_parts();
    assert_snapshot!(refused(&session, "b.json"), @"error: part 1 of 2 is missing; part 2 is in b.json; run `ctq eval --shard 1/2` as the others were run, and merge again");
    assert_snapshot!(refused(&session, "a.json b.json b.json"), @"error: part 2/2 is doubled: b.json and b.json both hold it, with the same content; name one of them only");
    // The same part again, at another time.
    part_of(&session, &format!("W4A16 {QUESTION} --shard 2/2"), "again");
    assert_snapshot!(refused(&session, "a.json b.json again.json"), @"error: part 2/2 is doubled: b.json and again.json both hold it, with the same scores; name one of them only");
    // And one with other scores, as no honest run has them.
    rewritten(&session, "b", "other", |part| {
        part["models"][0]["results"][0]["windows"][0]["nll"][0] = json!(1.5);
    });
    assert_snapshot!(refused(&session, "a.json b.json other.json"), @"error: part 2/2 is doubled: b.json and other.json both hold it, with different content; find out which is right, or run this part again, and name that file only");
    for part in [1, 3, 5] {
        part_of(&session, &format!("W4A16 {QUESTION} --shard {part}/12"), &format!("of12-{part}"));
    }
    assert_snapshot!(refused(&session, "of12-5.json of12-1.json of12-3.json"), @"error: parts 2, 4, 6, 7, 8, 9, 10, 11 and 1 more of 12 are missing; part 1 is in of12-1.json, part 3 is in of12-3.json, part 5 is in of12-5.json; run `ctq eval --shard 2/12` as the others were run, and merge again");
}

#[test]
fn parts_of_something_else() {
    let session = two_parts();
    let other = |line: &str| {
        part_of(&session, &format!("{line} --shard 2/2"), "other");
        refused(&session, "a.json other.json")
    };
    assert_snapshot!(other("W4A16 --data text.txt --preset disjoint --ctx 64 --rows 5"), @"error: a.json and other.json are not parts of one evaluation: ctx is 128 in one and 64 in the other; merge the parts of one command, run by one version of ctq on one kind of device");
    assert_snapshot!(other(&format!("W4A16 {QUESTION} --compute f32")), @"error: a.json and other.json are not parts of one evaluation: compute is bf16 in one and f32 in the other; merge the parts of one command, run by one version of ctq on one kind of device");
    session.write("short.txt", "A text of its own. ".repeat(100));
    let told = other("W4A16 --data short.txt --preset disjoint --ctx 128 --rows 5");
    assert!(told.contains("the rows' sha256 is "), "{told}");
    part_of(&session, &format!("W4A16 {QUESTION} --shard 2/3"), "other");
    assert_snapshot!(refused(&session, "a.json other.json"), @"error: a.json and other.json are not parts of one evaluation: one is part 1/2, the other part 2/3; merge the parts of one command, run by one version of ctq on one kind of device");
    rewritten(&session, "b", "other", |part| {
        part["models"][0]["results"][0]["record"]["numerics_revision"] = json!(9999);
    });
    let told = refused(&session, "a.json other.json");
    assert!(told.contains("the numerics revision is ") && told.contains(" and 9999 in the other"), "{told}");
    // The same model but for one weight, then another number of models.
    let mut model = Checkpoint::read(&session.path("W4A16"));
    let norm = &mut model.tensor("model.norm.weight").bytes;
    norm[0] ^= 1;
    model.write(&session, "changed/W4A16");
    let told = other(&format!("changed/W4A16 {QUESTION}"));
    assert!(told.contains("they scored other models (W4A16, contents "), "{told}");
    assert!(told.starts_with("error: a.json and other.json are not parts of one evaluation: "), "{told}");
    assert_snapshot!(other(&format!("W4A16 W4A16 {QUESTION}")), @"error: a.json and other.json are not parts of one evaluation: the number of models is 1 in one and 2 in the other; merge the parts of one command, run by one version of ctq on one kind of device");
}

#[test]
fn a_copy_elsewhere_is_the_same_model() {
    let session = two_parts();
    copy_folder(&session.path("W4A16"), &session.path("elsewhere"));
    part_of(&session, &format!("elsewhere {QUESTION} --shard 2/2"), "b");
    session.ctq("merge a.json b.json").expect(0);
}

#[test]
fn a_part_whose_model_failed() {
    let session = Session::with(&["W4A16", "bf16"]);
    part_of(&session, &format!("W4A16 bf16 {QUESTION} --shard 1/2"), "a");
    fs::remove_file(session.path("bf16/tokenizer.json")).expect("removed");
    session.ctq(&format!("-q eval W4A16 bf16 {QUESTION} --shard 2/2 --json b.json")).expect(2);
    assert_snapshot!(refused(&session, "a.json b.json"), @"error: b.json: part 2/2 has no scores of bf16: bf16: no tokenizer.json; copy tokenizer.json and tokenizer_config.json here from the model that was quantized; run this part again and merge again");
}

/// A part as it would be if its writer had written something else: changed, with a checksum that fits.
fn rewritten(session: &Session, from: &str, to: &str, change: impl Fn(&mut Value)) {
    let mut part = session.json(&format!("{from}.json"));
    part.as_object_mut().expect("an object").shift_remove("checksum").expect("a checksum");
    change(&mut part);
    let digest = Sha256::digest(part.to_string().as_bytes());
    part["checksum"] = digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
    session.write(&format!("{to}.json"), part.to_string());
}

#[test]
fn files_that_are_no_parts() {
    let session = two_parts();
    session.ctq(&format!("-q eval W4A16 {QUESTION} --json result.json")).expect(0);
    let whole = fs::read_to_string(session.path("b.json")).expect("a part");
    session.write("cut.json", &whole[..40]);
    session.write("number.json", "7");
    session.write("object.json", "{}");
    let told: Vec<String> =
        ["result.json", "cut.json", "number.json", "object.json", "gone.json", "text.txt"]
            .iter()
            .map(|name| refused(&session, &format!("a.json {name}")))
            .collect();
    assert_snapshot!(told.concat(), @r"
    error: result.json: it is no part file: it holds a list, as `eval` without --shard does; write it again with `ctq eval --shard`
    error: cut.json: it is no part file, or damaged: no JSON (EOF while parsing an object at line 1 column 40); write it again with `ctq eval --shard`
    error: number.json: it is no part file; write it again with `ctq eval --shard`
    error: object.json: it is no part file: it has no part_version; write it again with `ctq eval --shard`
    error: gone.json: cannot read: No such file or directory (os error 2); check the path and its permissions
    error: text.txt: it is no part file, or damaged: no JSON (expected value at line 1 column 1); write it again with `ctq eval --shard`
    ");
}

#[test]
fn parts_that_were_edited() {
    let session = two_parts();
    let whole = fs::read_to_string(session.path("b.json")).expect("a part");
    let told = |change: &dyn Fn(&mut Value)| {
        rewritten(&session, "b", "edited", change);
        refused(&session, "a.json edited.json")
    };
    // Another last digit of one score, and nothing else.
    let nll = session.json("b.json")["models"][0]["results"][0]["windows"][0]["nll"][0].to_string();
    let other = f64::from_bits(nll.parse::<f64>().expect("a number").to_bits() + 1).to_string();
    assert_eq!(whole.matches(&nll).count(), 1);
    session.write("edited.json", whole.replace(&nll, &other));
    assert_snapshot!(refused(&session, "a.json edited.json"), @"error: edited.json: its checksum does not fit: it was damaged or edited; write it again with `ctq eval --shard`");
    assert_snapshot!(told(&|part| part["part_version"] = json!(2)), @"error: edited.json: part_version 2 (this program knows 1); write it again with `ctq eval --shard`");
    let windows = |part: &mut Value| part["models"][0]["results"][0]["windows"].take();
    let without = |part: &mut Value, index: usize| {
        let mut list = windows(part);
        list.as_array_mut().expect("windows").remove(index);
        part["models"][0]["results"][0]["windows"] = list;
    };
    assert_snapshot!(told(&|part| without(part, 1)), @"error: edited.json: part 2/2 must hold windows 2 to 4, and lacks 1 of them, such as window 3; write it again with `ctq eval --shard`");
    assert_snapshot!(told(&|part| part["shard"] = json!("1/2")), @"error: edited.json: part 1/2 must hold windows 0 to 1, and lacks 2 of them, such as window 0; write it again with `ctq eval --shard`");
    assert_snapshot!(told(&|part| part["shard"] = json!("3/2")), @r#"error: edited.json: it is no part: "3/2" is no shard: expected i/n with i from 1 to n, such as 2/8 for the second of eight parts; write it again with `ctq eval --shard`"#);
    assert_snapshot!(told(&|part| part["models"][0]["results"][0]["windows"][0]["first"] = json!(u64::MAX)), @"error: edited.json: its window 2 has impossible positions; write it again with `ctq eval --shard`");
    assert_snapshot!(told(&|part| part["models"][0]["results"][0]["windows"][0]["nll"][3] = Value::Null), @"error: edited.json: it is no part: invalid type: null, expected f64; write it again with `ctq eval --shard`");
    // White space is nobody's affair.
    let pretty = serde_json::to_string_pretty(&session.json("b.json")).expect("JSON");
    session.write("pretty.json", pretty);
    session.ctq("merge a.json pretty.json").expect(0);
}

#[test]
fn a_merge_does_not_overwrite_its_parts() {
    let session = two_parts();
    let before = fs::read(session.path("b.json")).expect("a part");
    let told = session.ctq("merge a.json b.json --json b.json").expect(2).stderr;
    assert_snapshot!(told, @"error: b.json: is one of the parts; give another file to write to");
    assert!(fs::read(session.path("b.json")).expect("a part") == before);
}

/// Many groups of few windows, each with hidden states on disk after every layer.
const SLOW: &str = "eval NVFP4 --data text.txt --preset hf-strided --ctx 256 --stride 64 --rows 150 --acts off \
                    --save-every 0 --memory 24M";

#[test]
fn a_part_that_is_killed_goes_on_beside_another() {
    let session = Session::with(&["NVFP4"]);
    session.ctq(&format!("-q {SLOW} --json w.json")).expect(0);
    let part = |part: usize| format!("{SLOW} --shard {part}/2 --json p{part}.json");
    let saved = || {
        let entries = fs::read_dir(session.path("cache/eval")).into_iter().flatten().flatten();
        entries.filter(|entry| entry.path().extension().is_some_and(|x| x == "scores")).count()
    };
    let mut second = session.start(&part(2));
    assert!(wait_until(&mut second, || saved() == 1), "the run is too short to be killed in its middle");
    second.kill().expect("a kill");
    session.wait(second);
    assert!(!session.path("p2.json").exists(), "a killed run has left a part");
    // The other part neither takes its scores nor throws them away; nor does the whole.
    let first = session.ctq(&part(1)).expect(0);
    assert!(!first.stderr.contains("going on: "), "{}", first.stderr);
    let whole = session.ctq(&format!("{SLOW} --json again.json")).expect(0);
    assert!(!whole.stderr.contains("going on: "), "{}", whole.stderr);
    assert_eq!(saved(), 1, "the scores of a killed part are gone");
    let second = session.ctq(&part(2)).expect(0);
    assert!(second.stderr.contains("going on: "), "{}", second.stderr);
    assert_eq!(saved(), 0, "a complete part has left its state");
    session.ctq("-q merge p1.json p2.json --json m.json").expect(0);
    assert_eq!(answers(&session, "m.json"), answers(&session, "w.json"));
}
