//! Exit codes: 0 good; 1 a verdict failed or a result is INVALID; 2 this can never work. What ends with 3 is in
//! `interrupts`.

use insta::assert_snapshot;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::session::Session;

const EVAL: &str = "--data text.txt --ctx 64 --stride 32 --rows 2 --json r.json";

#[test]
fn good() {
    let session = Session::with(&["W4A16"]);
    session.ctq("convert W4A16 out").expect(0);
    session.ctq("inspect out").expect(0);
    session.ctq(&format!("eval out W4A16 {EVAL}")).expect(0);
    session.ctq("verify out").expect(0);
    session.ctq("restore out original").expect(0);
    session.ctq("--version").expect(0);
}

#[test]
fn verify_of_a_container_that_was_tampered_with() {
    let session = Session::with(&["W4A16"]);
    session.ctq("-q convert W4A16 out").expect(0);
    let path = session.path("out/layer-00001.safetensors");
    let mut bytes = std::fs::read(&path).expect("a part");
    bytes[60_000] ^= 0x10;
    std::fs::write(&path, bytes).expect("a part");
    for line in ["verify out", "verify out --bits-only", "verify out --tokens 4 --layers 1"] {
        let ran = session.ctq(line).expect(1);
        assert!(ran.stdout.contains("round trip   FAILED"), "{}", ran.stdout);
        assert!(ran.stdout.contains("model.layers.1."), "{}", ran.stdout);
        assert!(ran.stdout.ends_with("verdict: FAILED\n"), "{}", ran.stdout);
    }
    // The hash of the part stands in ctq.json: what it regenerates is refused, not written.
    let refused = session.ctq("restore out original").expect(2);
    assert!(refused.stderr.contains("layer-00001.safetensors"), "{}", refused.stderr);
}

#[test]
fn verify_against_another_checkpoint() {
    let session = Session::with(&["W4A16"]);
    session.ctq("-q convert W4A16 out").expect(0);
    // One scale that differs in its last bit.
    let mut other = Checkpoint::bundled("W4A16");
    other.tensor("model.layers.1.mlp.down_proj.weight_scale").bytes[20] ^= 1;
    other.write(&session, "other");
    let ran = session.ctq("verify out --against other --bits-only").expect(1);
    assert_snapshot!(ran.stdout, @"
    out against other
      round trip   FAILED: 49 tensors, 399328 bytes, 1 differ
        model.layers.1.mlp.down_proj.weight_scale: has other bytes in the checkpoint than those that were converted
      weights      FAILED: 16 matrices, 417792 weights, 103 differ
        first: `model.layers.1.mlp.down_proj` row 5 k 0: runtime -3.112793e-2, reference -3.100586e-2

    not checked: the arithmetic: --bits-only
    verdict: FAILED
    ");
    let ran = session.ctq("verify out --against other --json --bits-only").expect(1);
    let verification: Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(verification["passed"], false);
    session.ctq("verify out --bits-only").expect(0);
}

#[test]
fn verify_against_a_model_of_another_shape() {
    let session = Session::with(&["bf16"]);
    let mut other = Checkpoint::bundled("bf16");
    other.config["num_hidden_layers"] = 1.into();
    other.tensors.retain(|name, _| !name.starts_with("model.layers.1."));
    other.write(&session, "shorter");
    let mut other = Checkpoint::bundled("bf16");
    other.config["vocab_size"] = 400.into();
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let tensor = other.tensor(name);
        tensor.shape[0] = 400;
        tensor.bytes.truncate(400 * 128 * 2);
    }
    other.write(&session, "narrower");
    for name in ["bf16", "shorter", "narrower"] {
        session.ctq(&format!("-q convert {name} {name}.ctq")).expect(0);
    }
    let told = |line: &str| {
        let ran = session.ctq(&format!("verify {line}")).expect(1);
        ran.stdout.lines().rev().take(2).collect::<Vec<_>>().join("\n")
    };
    assert_snapshot!(told("bf16.ctq --against shorter"), @"
    verdict: FAILED
    not checked: weights and arithmetic: these are not the same model: `model.layers.1.self_attn.q_proj` [128, 128] where `lm_head` [480, 128] is expected
    ");
    assert_snapshot!(told("shorter.ctq --against bf16"), @"
    verdict: FAILED
    not checked: weights and arithmetic: these are not the same model: `lm_head` [480, 128] where `model.layers.1.self_attn.q_proj` [128, 128] is expected
    ");
    assert_snapshot!(told("narrower.ctq --against bf16"), @"
    verdict: FAILED
    not checked: weights and arithmetic: these are not the same model: `model.embed_tokens` [400, 128] where `model.embed_tokens` [480, 128] is expected
    ");
    session.ctq("verify bf16.ctq --against narrower --json --bits-only").expect(1);
}

/// A model whose feed-forward in layer 1 multiplies to infinity though every weight is a number.
fn overflowing(session: &Session, name: &str) {
    let mut model = Checkpoint::bundled("bf16");
    let huge = 0x7f00_u16.to_le_bytes();
    for module in ["gate_proj", "up_proj", "down_proj"] {
        let tensor = model.tensor(&format!("model.layers.1.mlp.{module}.weight"));
        tensor.bytes = huge.repeat(tensor.bytes.len() / 2);
    }
    model.write(session, name);
}

#[test]
fn a_hidden_state_that_becomes_infinite() {
    let session = Session::with(&["bf16"]);
    overflowing(&session, "broken");
    let ran = session.ctq(&format!("eval broken {EVAL}")).expect(1);
    assert_snapshot!(ran.stderr, @"error: broken: the hidden state is not finite after `model.layers.1.mlp` at window 0, position 0: the result is INVALID; look at the scales of this module, or score the unquantized model to see whether it is sound");
    assert!(!ran.stdout.contains("ppl "), "{}", ran.stdout);
    assert_snapshot!(ran.stdout.lines().take(2).collect::<Vec<_>>().join("\n"), @"
    model:       broken (llama, dense)
    perplexity:  none, INVALID: broken: the hidden state is not finite after `model.layers.1.mlp` at window 0, position 0: the result is INVALID; look at the scales of this module, or score the unquantized model to see whether it is sound
    ");
    let record = &session.json("r.json")[0];
    assert_eq!((&record["status"], &record["perplexity"]), (&"invalid".into(), &Value::Null));
    // Beside a good one it is a row with its reason.
    let ran = session.ctq(&format!("eval broken bf16 {EVAL}")).expect(1);
    assert!(
        ran.stdout.contains("| INVALID: broken: the hidden state is not finite after `model.layers.1.mlp"),
        "{}",
        ran.stdout
    );
    assert_eq!(session.json("r.json")[1]["status"], "ok");

    crate::commands::write_ids(&session, "ids.safetensors", &[&[478, 1, 2]]);
    let ran = session.ctq("logits broken --ids ids.safetensors --out l.safetensors").expect(1);
    assert_snapshot!(ran.stderr, @"error: broken: the hidden state is not finite after `model.layers.1.mlp` at window 0, position 0: the result is INVALID; look at the scales of this module, or score the unquantized model to see whether it is sound");
    assert!(!session.path("l.safetensors").exists());
}

/// A model that is sound until `token` comes: its embedding is the largest number there is, and attention adds to it.
pub(crate) fn overflowing_at(session: &Session, name: &str, token: usize) {
    let mut model = Checkpoint::bundled("bf16");
    model.tensor("model.embed_tokens.weight").bytes[token * 256..][..256]
        .copy_from_slice(&0x7f7f_u16.to_le_bytes().repeat(128));
    for weight in model.tensor("model.layers.0.self_attn.o_proj.weight").bytes.chunks_exact_mut(2) {
        let bits = u16::from_le_bytes([weight[0], weight[1]]);
        // Times 2^124; zeros and what is next to nothing stay.
        let scaled = if bits & 0x7f80 == 0 { bits } else { bits + (124 << 7) };
        weight.copy_from_slice(&scaled.to_le_bytes());
    }
    model.write(session, name);
}

#[test]
fn an_infinity_is_named_by_its_window_however_windows_are_grouped() {
    let session = Session::with(&[]);
    let mut windows = Vec::new();
    // Rare tokens: their first place in the text is rarely in its first window.
    for token in 470..476 {
        overflowing_at(&session, "broken", token);
        let line = "eval broken --data text.txt --preset disjoint --ctx 64 --rows 12";
        let told: Vec<String> = ["1M", "1G"]
            .iter()
            .map(|memory| session.ctq(&format!("{line} --memory {memory}")))
            .filter(|ran| ran.code == Some(1))
            .map(|ran| ran.last_words().to_owned())
            .collect();
        if let [small, large] = &told[..] {
            assert_eq!(small, large);
            windows.push(
                large.split_once(" at window ").expect("a window").1[..2].trim_end_matches(',').to_owned(),
            );
        }
    }
    assert!(windows.iter().any(|window| window != "0"), "{windows:?}");
}

#[test]
fn a_head_that_makes_logits_infinite() {
    let session = Session::with(&["bf16"]);
    let mut model = Checkpoint::bundled("bf16");
    let head = model.tensor("lm_head.weight");
    head.bytes = 0x7f00_u16.to_le_bytes().repeat(head.bytes.len() / 2);
    let norm = model.tensor("model.norm.weight");
    norm.bytes = 0x4f00_u16.to_le_bytes().repeat(norm.bytes.len() / 2);
    model.write(&session, "broken");
    let ran = session.ctq(&format!("eval broken {EVAL}")).expect(1);
    assert_snapshot!(ran.stderr, @"error: broken: the hidden state is not finite after `lm_head` at window 0, position 0: the result is INVALID; look at the scales of this module, or score the unquantized model to see whether it is sound");
    crate::commands::write_ids(&session, "ids.safetensors", &[&[478, 1, 2]]);
    let ran = session.ctq("logits broken --ids ids.safetensors --out l.safetensors").expect(1);
    assert_snapshot!(ran.stderr, @"error: broken: the hidden state is not finite after `lm_head` at window 0, position 0: the result is INVALID; look at the scales of this module, or score the unquantized model to see whether it is sound");
}

#[test]
fn a_failing_path_among_several_is_a_row() {
    let session = Session::with(&["bf16", "W4A16"]);
    let mut model = Checkpoint::bundled("W4A16");
    model.tensors.remove("model.layers.1.mlp.up_proj.weight_scale");
    model.write(&session, "broken");
    let ran = session.ctq(&format!("-q eval bf16 broken gone W4A16 {EVAL}")).expect(2);
    let notes: Vec<&str> =
        ran.stdout.lines().take(6).map(|line| line.rsplit('|').nth(1).unwrap_or_default().trim()).collect();
    assert_snapshot!(notes.join("\n"), @"
    note
    ---------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------

    failed: broken/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight_scale` is missing: `weight_packed` needs a scale; download the checkpoint again, or write it again with the quantizer
    failed: gone is not a checkpoint: there is no such directory; give the folder that holds config.json and model.safetensors
    ");
    let records = session.json("r.json");
    let states: Vec<&str> =
        records.as_array().expect("records").iter().filter_map(|record| record["status"].as_str()).collect();
    assert_eq!(states, ["ok", "failed", "failed", "ok"]);
}

#[test]
fn commands_that_can_never_work() {
    let session = Session::with(&["bf16"]);
    for line in
        ["", "evaluate", "eval", "eval bf16 --tp 0", "eval bf16 --memory 8X", "convert bf16", "verify"]
    {
        session.ctq(line).expect(2);
    }
}
