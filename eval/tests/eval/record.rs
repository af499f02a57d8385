//! Records as JSON, block, line and table, on values written by hand.

use ctq_eval::Error;
use ctq_eval::protocol::Coverage;
use ctq_eval::record::{
    Bpw, Method, PairedRecord, Record, Status, TextRecord, block, line, read, table, write,
};
use ctq_eval::statistics::Summary;

/// A complete record: weights only.
fn weights_only() -> Record {
    let mut record =
        Record::new("tiny-llama-wiki/NVFP4", "models/NVFP4", "exl3-2025-small", "not scored yet");
    record.ctq_version = "0.1.0".into();
    record.family = Some("llama".into());
    record.scheme = Some("nvfp4-pack-quantized".into());
    record.tokens = Some(380_543);
    record.tokens_sha256 = Some("ac5dd6499d6fdfd12d282497ab7e2930cce904794449d5e2a2d548eae0f5ec98".into());
    record.protocol_id = Some("1a2b3c4d5e6f7081".into());
    record.windows = Some(20);
    record.ctx = Some(2048);
    record.stride = Some(512);
    record.vocabulary = Some(4096);
    record.scored = Some(Coverage { first: 1, last: 11_775, of: 380_543, percent: 3.094_26 });
    record.text = Some(TextRecord {
        file: "wiki.test.raw".into(),
        form: "raw".into(),
        file_sha256: "173c".into(),
        rows_sha256: "5bb0".into(),
        whole_sha256: "173c".into(),
        rows: 4358,
        recognised: Some("wikitext-2-raw-v1 test".into()),
        join: "all rows, \"\\n\\n\"".into(),
        bos: "default".into(),
        special_tokens: "parsed".into(),
    });
    record.set_method(&Method {
        acts: "off".into(),
        backend: "cpu".into(),
        compute: "f32".into(),
        isa: "avx512-bf16".into(),
        kv: "off".into(),
        numerics_revision: 1,
    });
    record.threads = Some(4);
    record.tp = Some(1);
    record.bpw = Some(Bpw { layer: 4.500_1, head: 16.0, file: 8.067, container: None });
    record.vram_gb = Some(0.004_56);
    record.seconds = Some(41.24);
    record.tokens_per_second = Some(993.2);
    record.peak_memory_bytes = Some(5 << 28);
    record.set_summary(&Summary {
        total_nll: 204_790.680_980_172_47,
        count: 40_940,
        perplexity: 148.742_254_524_590_2,
        block_error: Some(1.234_5),
        iid_error: Some(0.456_7),
    });
    record
}

/// The same checkpoint with activations quantized, and its difference from the first.
fn with_activations() -> Record {
    let mut record = weights_only();
    record.acts = Some("library".into());
    record.perplexity = Some(149.125_667);
    record.paired = Some(PairedRecord {
        against: "off".into(),
        difference: 0.002_574,
        difference_error: Some(0.000_3),
        ratio: 1.002_577,
        ratio_error: Some(0.000_300_8),
    });
    record
}

fn failed() -> Record {
    let reason = "model.safetensors: missing tensor lm_head.weight; fetch the shard again";
    let mut record = Record::new("broken", "models/broken", "exl3-2025-small", reason);
    record.ctq_version = "0.1.0".into();
    record
}

#[test]
fn the_block_says_everything() {
    insta::assert_snapshot!(block(&weights_only()), @r#"
    model:       tiny-llama-wiki/NVFP4 (llama, nvfp4-pack-quantized)
    perplexity:  148.7423 ± 1.23 (iid ± 0.457)
    total nll:   204790.680980 nats
    count:       40940 positions
    scored:      tokens 1-11775 of 380543 (3.1 %)
    protocol:    exl3-2025-small 2048/512x20, id 1a2b3c4d5e6f7081
    text:        wikitext-2-raw-v1 test (raw, 4358 rows), join all rows, "\n\n", bos default, ids sha256 ac5dd6499d6fdfd1
    method:      acts off, compute f32, kv off, cpu avx512-bf16, id 30b85c8931364431
    bpw:         layers 4.50, head 16.00, file 8.067; layers and head 0.00456 GiB
    time:        41.2 s, 993.2 tokens/s, 4 threads, tp 1
    peak memory: 1.2 GiB (this run)
    "#);
}

#[test]
fn the_block_of_a_difference_and_of_a_failure() {
    let lines = |record: &Record| block(record).lines().map(str::to_owned).collect::<Vec<_>>();
    let difference = lines(&with_activations()).into_iter().find(|line| line.starts_with("difference"));
    insta::assert_snapshot!(difference.expect("a difference"), @"difference:  +0.258 ± 0.0301 % against acts off");
    insta::assert_snapshot!(block(&failed()), @r#"
    model:       broken
    perplexity:  none, failed: model.safetensors: missing tensor lm_head.weight; fetch the shard again
    protocol:    exl3-2025-small
    "#);
}

#[test]
fn the_line_can_be_pasted() {
    insta::assert_snapshot!(line(&weights_only()), @"ppl 148.7423 ± 1.23 | tiny-llama-wiki/NVFP4 nvfp4-pack-quantized 4.50 bpw | exl3-2025-small 2048/512x20 | acts off, f32 | protocol 1a2b3c4d5e6f7081 method 30b85c8931364431 | ctq 0.1.0");
    let mut invalid = weights_only();
    invalid.set_without_answer(Status::Invalid, "layer 3 mlp.down_proj: NaN");
    insta::assert_snapshot!(line(&invalid), @"ppl none, INVALID: layer 3 mlp.down_proj: NaN | tiny-llama-wiki/NVFP4 nvfp4-pack-quantized 4.50 bpw | exl3-2025-small 2048/512x20 | acts off, f32 | protocol 1a2b3c4d5e6f7081 method 30b85c8931364431 | ctq 0.1.0");
    insta::assert_snapshot!(line(&failed()), @"ppl none, failed: model.safetensors: missing tensor lm_head.weight; fetch the shard again | broken | exl3-2025-small | ctq 0.1.0");
}

#[test]
fn the_table_keeps_failures_and_differences() {
    insta::assert_snapshot!(table(&[weights_only(), with_activations(), failed()]), @r#"
    | model                 | scheme               |  bpw |     GiB | acts    | compute | perplexity |    ± | note                                                                            |
    |-----------------------|----------------------|------|---------|---------|---------|------------|------|---------------------------------------------------------------------------------|
    | tiny-llama-wiki/NVFP4 | nvfp4-pack-quantized | 4.50 | 0.00456 | off     | f32     |   148.7423 | 1.23 |                                                                                 |
    | tiny-llama-wiki/NVFP4 | nvfp4-pack-quantized | 4.50 | 0.00456 | library | f32     |   149.1257 | 1.23 | +0.258 ± 0.0301 % against acts off                                              |
    | broken                | -                    |    - |       - | -       | -       |          - |    - | failed: model.safetensors: missing tensor lm_head.weight; fetch the shard again |
    "#);
}

#[test]
fn a_table_of_different_questions_names_them() {
    let mut other = weights_only();
    other.protocol_id = Some("ffffffffffffffff".into());
    other.preset = "exl3-ppl (rows 10)".into();
    let rows = table(&[weights_only(), other]);
    assert!(rows.contains("exl3-2025-small 2048/512x20, id 1a2b3c4d5e6f7081"), "{rows}");
    assert!(rows.contains("exl3-ppl (rows 10) 2048/512x20, id ffffffffffffffff"), "{rows}");
}

#[test]
fn the_json_is_stable() {
    insta::assert_json_snapshot!(with_activations(), @r#"
    {
      "record_version": 1,
      "ctq_version": "0.1.0",
      "status": "ok",
      "reason": null,
      "model": "tiny-llama-wiki/NVFP4",
      "path": "models/NVFP4",
      "family": "llama",
      "scheme": "nvfp4-pack-quantized",
      "perplexity": 149.125667,
      "perplexity_error": 1.2345,
      "perplexity_error_iid": 0.4567,
      "total_nll": 204790.68098017247,
      "count": 40940,
      "tokens": 380543,
      "tokens_sha256": "ac5dd6499d6fdfd12d282497ab7e2930cce904794449d5e2a2d548eae0f5ec98",
      "preset": "exl3-2025-small",
      "protocol_id": "1a2b3c4d5e6f7081",
      "windows": 20,
      "ctx": 2048,
      "stride": 512,
      "vocabulary": 4096,
      "scored": {
        "first": 1,
        "last": 11775,
        "of": 380543,
        "percent": 3.09426
      },
      "text": {
        "file": "wiki.test.raw",
        "form": "raw",
        "file_sha256": "173c",
        "rows_sha256": "5bb0",
        "whole_sha256": "173c",
        "rows": 4358,
        "recognised": "wikitext-2-raw-v1 test",
        "join": "all rows, \"\\n\\n\"",
        "bos": "default",
        "special_tokens": "parsed"
      },
      "method_id": "30b85c8931364431",
      "acts": "library",
      "compute": "f32",
      "kv": "off",
      "backend": "cpu",
      "isa": "avx512-bf16",
      "numerics_revision": 1,
      "threads": 4,
      "tp": 1,
      "pp": null,
      "replicas": null,
      "bpw": {
        "layer": 4.5001,
        "head": 16.0,
        "file": 8.067,
        "container": null
      },
      "vram_gb": 0.00456,
      "seconds": 41.24,
      "tokens_per_second": 993.2,
      "peak_memory_bytes": 1342177280,
      "paired": {
        "against": "off",
        "difference": 0.002574,
        "difference_error": 0.0003,
        "ratio": 1.002577,
        "ratio_error": 0.0003008
      }
    }
    "#);
}

#[test]
fn json_reads_back_to_the_same_bits_and_failures_have_no_number() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("results.json");
    let mut invalid = with_activations();
    invalid.set_without_answer(Status::Invalid, "NaN");
    let records = [weights_only(), with_activations(), failed(), invalid];
    write(&path, &records).expect("written");
    assert_eq!(read(&path).expect("read"), records);
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).expect("bytes")).expect("JSON");
    assert_eq!(json.as_array().map(Vec::len), Some(4));
    assert!(json[2]["perplexity"].is_null() && json[2]["status"] == "failed");
    assert!(json[3]["perplexity"].is_null() && json[3]["status"] == "invalid" && json[3]["paired"].is_null());
}

#[test]
fn another_version_is_refused_and_new_fields_are_skipped() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("results.json");
    let mut json = serde_json::to_value([weights_only()]).expect("JSON");
    json[0]["a_later_field"] = true.into();
    std::fs::write(&path, json.to_string()).expect("a file");
    assert_eq!(read(&path).expect("read"), [weights_only()]);
    json[0]["record_version"] = 2.into();
    std::fs::write(&path, json.to_string()).expect("a file");
    assert!(matches!(read(&path), Err(Error::BadRecords { .. })));
}

#[test]
fn records_of_different_questions_part_where_it_is_said() {
    let one = weights_only();
    one.check_same_question(&with_activations()).expect("a differing method is no obstacle");
    let mut sliced = weights_only();
    (sliced.protocol_id, sliced.vocabulary) = (Some("ffffffffffffffff".into()), Some(4000));
    let message = one.check_same_question(&sliced).expect_err("another question").to_string();
    assert!(message.contains("the vocabulary slice is 4096") && message.contains("and 4000"), "{message}");
    assert!(failed().check_same_question(&failed()).is_err());
}
