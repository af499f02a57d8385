//! Files that are damaged or missing: each refusal names the file, the tensor and the next step, whatever the command.

use std::fs;

use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::session::Session;

const SHARD: &str = "model/model.safetensors";
const SECOND: &str = "model/model-00002-of-00002.safetensors";

/// What all commands say to the folder `model`, which all of them must refuse. Nothing is left of the attempts.
#[track_caller]
pub(crate) fn refused(session: &Session) -> String {
    let told = session.ctq("convert model out").expect(2).stderr;
    assert!(!session.path("out/ctq.json").exists(), "there is a container of a damaged checkpoint");
    let scored = session.ctq("eval model --data text.txt --ctx 64 --rows 1 --json r.json").expect(2);
    let reason = told.trim_start_matches("error: ");
    assert!(scored.stderr.contains(reason.trim_end()), "convert: {told}eval: {}", scored.stderr);
    let record = &session.json("r.json")[0];
    assert_eq!((&record["status"], &record["perplexity"]), (&json!("failed"), &Value::Null));
    told
}

/// The bundled W4A16 checkpoint as one shard, or two.
fn sound(sharded: bool) -> Session {
    let session = Session::with(&[]);
    let model = Checkpoint::bundled("W4A16");
    if sharded {
        model.write_sharded(&session, "model")
    } else {
        model.write(&session, "model")
    }
    session
}

/// The bytes of a file, changed.
fn change(session: &Session, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(session.path(file)).expect("a file");
    change(&mut bytes);
    session.write(file, bytes);
}

/// The header of a safetensors file, changed and written with its new length.
fn change_header(session: &Session, file: &str, edit: impl FnOnce(&mut Value)) {
    change(session, file, |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
        edit(&mut header);
        let header = header.to_string();
        let mut changed = (header.len() as u64).to_le_bytes().to_vec();
        changed.extend_from_slice(header.as_bytes());
        changed.extend_from_slice(&bytes[8 + length..]);
        *bytes = changed;
    });
}

#[test]
fn a_sound_checkpoint_is_not_refused() {
    for sharded in [false, true] {
        let session = sound(sharded);
        session.ctq("convert model out").expect(0);
        session.ctq("eval model --data text.txt --ctx 64 --rows 1").expect(0);
    }
}

#[test]
fn truncated_shard() {
    let session = sound(false);
    change(&session, SHARD, |bytes| bytes.truncate(bytes.len() - 100));
    assert_snapshot!(refused(&session), @"error: model/model.safetensors: truncated: tensor `model.norm.weight` ends at byte 399328 of the data, 399228 bytes are there; the file is damaged or incomplete: download or write it again");
    let session = sound(true);
    change(&session, SECOND, |bytes| bytes.truncate(bytes.len() / 2));
    assert_snapshot!(refused(&session), @"error: model/model-00002-of-00002.safetensors: truncated: tensor `model.layers.1.self_attn.v_proj.weight_scale` ends at byte 199536 of the data, 98516 bytes are there; the file is damaged or incomplete: download or write it again");
    change(&session, SECOND, |bytes| bytes.truncate(5));
    assert_snapshot!(refused(&session), @"error: model/model-00002-of-00002.safetensors: 5 bytes are too few for a safetensors file; the file is damaged or incomplete: download or write it again");
}

#[test]
fn header_length_past_the_end() {
    let session = sound(false);
    change(&session, SHARD, |bytes| bytes[..8].copy_from_slice(&(1_u64 << 40).to_le_bytes()));
    assert_snapshot!(refused(&session), @"error: model/model.safetensors: its header claims 1099511627776 bytes, past the end of a file of 404440 bytes; the file is damaged or incomplete: download or write it again");
    change(&session, SHARD, |bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
    refused(&session);
}

#[test]
fn a_header_that_is_not_json() {
    let session = sound(false);
    change(&session, SHARD, |bytes| bytes[20] = b'\n');
    assert_snapshot!(refused(&session), @r"error: model/model.safetensors: not a valid safetensors header (invalid JSON in header: control character (\u0000-\u001F) found while parsing a string at line 2 column 0); the file is damaged or incomplete: download or write it again");
}

#[test]
fn overlapping_offsets() {
    let session = sound(false);
    change_header(&session, SHARD, |header| {
        let offsets = &mut header["model.layers.0.mlp.up_proj.weight_scale"]["data_offsets"];
        let (begin, end) = (offsets[0].as_u64().expect("an offset"), offsets[1].as_u64().expect("an offset"));
        *offsets = json!([begin - 16, end - 16]);
    });
    assert_snapshot!(refused(&session), @"error: model/model.safetensors: tensor `model.layers.0.mlp.up_proj.weight_scale`: its data offsets overlap another tensor's or leave a gap; the file is damaged or incomplete: download or write it again");
}

#[test]
fn missing_shard() {
    let session = sound(true);
    fs::remove_file(session.path(SECOND)).expect("a shard");
    assert_snapshot!(refused(&session), @"error: model/model-00002-of-00002.safetensors: this shard is missing; model.safetensors.index.json places `lm_head.weight` in it; download the missing shard into the checkpoint");
}

#[test]
fn an_index_that_does_not_fit_its_shards() {
    let session = sound(true);
    let first = fs::read(session.path("model/model-00001-of-00002.safetensors")).expect("a shard");
    session.write(SECOND, first);
    let told = session.ctq("convert model out").expect(2).stderr;
    assert!(told.contains("stored twice"), "{told}");
    let session = sound(true);
    let index = "model/model.safetensors.index.json";
    change(&session, index, |bytes| {
        let mut value: Value = serde_json::from_slice(bytes).expect("an index");
        value["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00002-of-00002.safetensors".into();
        *bytes = value.to_string().into_bytes();
    });
    assert_snapshot!(refused(&session), @"error: model/model-00002-of-00002.safetensors: tensor `model.layers.9.mlp.up_proj.weight` is missing: model.safetensors.index.json places it in this shard; download this shard again: it does not belong to this index");
    session.write(index, r#"{"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}"#);
    assert_snapshot!(refused(&session), @"error: model/model.safetensors.index.json: places `lm_head.weight` in `../elsewhere.safetensors`, outside the checkpoint; download the index again");
    session.write(index, "{}");
    assert_snapshot!(refused(&session), @"error: model/model.safetensors.index.json: not a safetensors index (missing field `weight_map` at line 1 column 2); download the index again");
}

#[test]
fn no_weights_at_all() {
    let session = sound(false);
    fs::remove_file(session.path(SHARD)).expect("a shard");
    assert_snapshot!(refused(&session), @"error: model is not a checkpoint: it has neither model.safetensors nor model.safetensors.index.json; give the folder that holds the safetensors files of the model");
}

#[test]
fn no_config() {
    let session = sound(false);
    fs::remove_file(session.path("model/config.json")).expect("config.json");
    assert_snapshot!(refused(&session), @"error: model is not a checkpoint: it has no config.json; give the folder of a Hugging Face checkpoint, or copy config.json from the original model");
    session.write("model/config.json", "{ not json");
    assert_snapshot!(refused(&session), @"error: model/config.json: not valid JSON (key must be a string at line 1 column 3); download config.json again");
    session.write("model/config.json", "[]");
    assert_snapshot!(refused(&session), @"error: model/config.json: not a JSON object; download config.json again");
}

/// What eval says to a checkpoint that converts, but has no tokenizer that fits.
fn not_scored(session: &Session) -> String {
    session.ctq("-q convert model out --force").expect(0);
    session.ctq("eval model --data text.txt --ctx 64 --rows 1").expect(2).stderr
}

#[test]
fn tokenizers() {
    let session = sound(false);
    fs::remove_file(session.path("model/tokenizer.json")).expect("tokenizer.json");
    assert_snapshot!(not_scored(&session), @"error: model: no tokenizer.json; copy tokenizer.json and tokenizer_config.json here from the model that was quantized");
    session.write("model/tokenizer.json", "{}");
    assert_snapshot!(not_scored(&session), @"error: model/tokenizer.json: not a tokenizer that the tokenizers library reads (Model missing. at line 1 column 2); copy the file again from the model that was quantized");
}

#[test]
fn a_vocabulary_too_large_for_the_embedding() {
    let session = Session::with(&[]);
    let mut model = Checkpoint::bundled("bf16");
    model.config["vocab_size"] = json!(400);
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let tensor = model.tensor(name);
        tensor.shape[0] = 400;
        tensor.bytes.truncate(400 * 128 * 2);
    }
    model.write(&session, "model");
    assert_snapshot!(not_scored(&session), @"error: model/tokenizer.json: vocabulary too large for the embedding: the text holds token id 478 and the embedding has 400 rows; the tokenizer belongs to another model: copy the right one beside the checkpoint");
}

#[test]
fn a_container_that_is_damaged() {
    let session = sound(false);
    session.ctq("-q convert model out").expect(0);
    let told = |line: &str| session.ctq(line).expect(2).stderr;
    let part = "out/layer-00001.safetensors";
    let whole = fs::read(session.path(part)).expect("a part");
    session.write(part, &whole[..whole.len() - 4096]);
    assert_snapshot!(told("eval out --data text.txt --ctx 64 --rows 1"), @"error: out/layer-00001.safetensors: truncated or replaced: 110592 bytes of 114688; copy the container again, or convert it again with --force");
    fs::remove_file(session.path(part)).expect("a part");
    assert_snapshot!(told("inspect out"), @"error: out/layer-00001.safetensors: this file of the container is missing; copy the container again, or convert it again with --force");
    session.write(part, &whole);
    change(&session, "out/ctq.json", |bytes| {
        let text = String::from_utf8(bytes.clone()).expect("text");
        *bytes = text.replacen("\"format_version\": 1", "\"format_version\": 99", 1).into_bytes();
    });
    assert_snapshot!(told("inspect out"), @"error: out/ctq.json: container format version 99, and this ctq reads version 1; convert the checkpoint again, or use the ctq that wrote it");
    session.write("out/ctq.json", "{");
    assert_snapshot!(told("inspect out"), @"error: out is not a ctq container: its ctq.json is not a JSON object (EOF while parsing an object at line 1 column 1); give a folder that `ctq convert` has written");
    assert_snapshot!(told("restore out original"), @"error: out is not a ctq container: its ctq.json is not a JSON object (EOF while parsing an object at line 1 column 1); give a folder that `ctq convert` has written");
}
