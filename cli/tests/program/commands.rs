//! Every command as a new user would give it: what is printed, what is written, what the options change.

use std::collections::BTreeMap;

use insta::{assert_json_snapshot, assert_snapshot};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Stored, random_llama, tensors, write_tensors};
use crate::session::{Session, files_of};

#[test]
fn help_of_every_command() {
    let session = Session::new();
    let mut pages = vec![session.ctq("--help").expect(0).stdout];
    for command in
        ["convert", "restore", "inspect", "eval", "merge", "verify", "logits", "demo", "doctor", "bench"]
    {
        pages.push(session.ctq(&format!("{command} --help")).expect(0).stdout);
    }
    assert_snapshot!(pages.join("\n\n\n"));
}

#[test]
fn doctor_says_what_computes() {
    let session = Session::new();
    let printed = session.ctq("doctor").expect(0).stdout;
    for start in ["driver ", "NVRTC ", "cuBLASLt ", "NCCL ", "CPU ", "CUDA engine ", "CPU engine  yes: "] {
        assert!(
            printed.lines().any(|line| line.starts_with(start)),
            "no line begins with `{start}`:\n{printed}"
        );
    }
    let object: Value =
        serde_json::from_str(&session.ctq("doctor --json").expect(0).stdout).expect("one JSON object");
    assert!(object["cpu"]["threads"].as_u64().is_some_and(|threads| threads > 0), "{object:#}");
    // A machine without a driver says so, and takes the CPU.
    if object["cuda"]["version"].is_null() {
        assert!(printed.contains("CUDA engine no: there is no NVIDIA driver"), "{printed}");
        assert!(printed.ends_with("--device auto takes cpu\n"), "{printed}");
        assert_eq!(object["auto"], "cpu");
    }
    let refused = session.ctq("eval model --device gpu").expect(2);
    assert!(refused.stderr.contains("expected auto, cpu, cuda, or cuda:N"), "{}", refused.stderr);
}

#[test]
fn inspect_as_json() {
    let session = Session::with(&["NVFP4", "FP8"]);
    session.ctq("-q convert FP8 fp8.ctq").expect(0);
    let parsed = |line: &str| -> Value {
        serde_json::from_str(&session.ctq(line).expect(0).stdout).expect("one JSON object")
    };
    assert_json_snapshot!(parsed("inspect NVFP4 --json"));
    let container = parsed("inspect fp8.ctq --json");
    let chosen = ["kind", "model", "path", "schemes", "activations", "bpw", "files"];
    let chosen: BTreeMap<&str, &Value> = chosen.iter().map(|key| (*key, &container[key])).collect();
    assert_json_snapshot!(chosen);
}

#[test]
fn inspect_says_what_ctq_cannot_run_and_still_what_it_is() {
    let session = Session::with(&[]);
    let mut model = Checkpoint::bundled("NVFP4");
    model.config["model_type"] = json!("gemma2");
    model.write(&session, "model");
    assert_snapshot!(session.ctq("inspect model").expect(0).stdout, @r"
    model (checkpoint)
      family       gemma2
      format       nvfp4-pack-quantized
      tensors      63
      cannot run   model/config.json: not supported: architecture `gemma2`; ctq runs llama, mistral, qwen2, qwen3, mixtral, qwen3_moe; see ARCHITECTURE.md for adding a family

              419720 bytes  model.safetensors
    ");
    let printed = session.ctq("inspect model --json").expect(0).stdout;
    let object: Value = serde_json::from_str(&printed).expect("one JSON object");
    assert_eq!(object["cannot_run"].as_array().map(Vec::len), Some(1));
    // A damaged file is no kind of checkpoint: that stays an error.
    std::fs::write(session.path("model/model.safetensors"), b"short").expect("written");
    session.ctq("inspect model").expect(2);
}

#[test]
fn inspect_takes_a_reader_that_has_seen_enough() {
    let session = Session::with(&["bf16"]);
    let mut child = session.start("inspect bf16");
    drop(child.stdout.take());
    session.wait(child).expect(0);
}

#[test]
fn a_record_has_the_fields_that_scripts_rely_on() {
    let session = Session::with(&["NVFP4"]);
    session.ctq("eval NVFP4 --data text.txt --ctx 256 --stride 64 --json r.json").expect(0);
    let mut records = session.json("r.json");
    for record in records.as_array_mut().expect("a list") {
        // What differs between runs and machines is replaced by its kind.
        let changing = [
            "perplexity",
            "perplexity_error",
            "perplexity_error_iid",
            "total_nll",
            "seconds",
            "tokens_per_second",
            "peak_memory_bytes",
            "threads",
            "isa",
            "method_id",
        ];
        for key in changing {
            let kind = match &record[key] {
                Value::Number(_) => "a number",
                Value::String(_) => "text",
                other => panic!("{key} is {other}"),
            };
            record[key] = kind.into();
        }
        if let Some(paired) = record["paired"].as_object_mut() {
            for key in ["difference", "difference_error", "ratio", "ratio_error"] {
                paired[key] = paired[key].as_f64().map_or("nothing", |_| "a number").into();
            }
        }
    }
    assert_json_snapshot!(records);
}

#[test]
fn presets_and_what_is_changed_in_them() {
    let session = Session::with(&["W4A16"]);
    let mut questions = Vec::new();
    let presets = [
        "exl3-2025-small",
        "exl3-2025-large",
        "exl3-compareq-2026",
        "exl3-ppl",
        "exl3-qbench",
        "exl3-gguf",
        "disjoint",
        "hf-strided",
        "llamacpp",
    ];
    let mut ask = |options: &str| {
        session.ctq(&format!("-q eval W4A16 --data text.txt {options} --json r.json")).expect(0);
        let record = &session.json("r.json")[0];
        let shown =
            ["preset", "windows", "count", "tokens"].map(|key| record[key].to_string().replace('"', ""));
        questions.push(format!("{options:<60} {}", shown.join(" ")));
    };
    for preset in presets {
        let stride = if preset == "hf-strided" { " --stride 16" } else { "" };
        ask(&format!("--preset {preset} --ctx 64{stride} --rows 3"));
    }
    ask("--preset disjoint --ctx 64 --max-tokens 300");
    ask("--preset disjoint --ctx 64 --rows 2 --bos every-window");
    ask("--preset exl3-2025-small --ctx 64 --stride 16 --rows 2 --bos none");
    assert_snapshot!(questions.join("\n"));
}

#[test]
fn nll_of_every_position() {
    let session = Session::with(&["bf16"]);
    let line = "eval bf16 --data text.txt --ctx 32 --stride 16 --rows 3 --nll n.safetensors --json r.json";
    session.ctq(line).expect(0);
    let file = tensors(&session.path("n.safetensors"));
    let words = |name: &str| -> Vec<u64> {
        let bytes = file[name].bytes.chunks_exact(8);
        bytes.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect()
    };
    let index: Vec<(u64, u64, u64)> = words("window")
        .into_iter()
        .zip(words("position"))
        .zip(words("token"))
        .map(|((window, position), token)| (window, position, token))
        .collect();
    assert_eq!(index.len(), 3 * 31);
    assert_eq!((index[0], index[31], index[92]), ((0, 1, 1), (1, 1, 17), (2, 31, 63)));
    let total: f64 = words("nll").into_iter().map(f64::from_bits).sum();
    assert_eq!(session.json("r.json")[0]["total_nll"].as_f64(), Some(total));
}

#[test]
fn quiet_verbose_and_log() {
    let session = Session::with(&["W4A16"]);
    let line = "eval W4A16 --data text.txt --ctx 64 --rows 2";
    assert_eq!(session.ctq(&format!("-q {line}")).expect(0).stderr, "");
    let verbose = session.ctq(&format!("{line} -v --log said.log")).expect(0).stderr;
    assert!(verbose.contains("W4A16 (acts none): 2 windows in 1 groups"), "{verbose}");
    let log = std::fs::read_to_string(session.path("said.log")).expect("a log");
    assert!(log.contains("2 windows in 1 groups") && log.starts_with('['), "{log}");
    // A mode that changes nothing is said, not refused.
    let noted = session.ctq(&format!("{line} --acts library --compute f32")).expect(0);
    assert_snapshot!(noted.stderr, @"this checkpoint does not quantize activations: acts none");
}

#[test]
fn restore_gives_back_every_byte() {
    for model in ["bf16", "W4A16", "FP8", "NVFP4"] {
        let session = Session::with(&[model]);
        session.ctq(&format!("-q convert {model} out")).expect(0);
        session.ctq("-q restore out original").expect(0);
        let (was, is) = (Checkpoint::read(&session.path(model)), Checkpoint::read(&session.path("original")));
        assert!(was.tensors == is.tensors, "{model}: tensors differ");
        assert_eq!(was.config, is.config, "{model}");
    }
    // And of a checkpoint in several shards.
    let session = Session::new();
    Checkpoint::bundled("FP8").write_sharded(&session, "model");
    session.ctq("-q convert model out").expect(0);
    session.ctq("-q restore out original").expect(0);
    let weights = |folder: &str| -> BTreeMap<String, Stored> {
        let files = files_of(&session.path(folder)).into_iter().map(|(name, _)| name);
        files
            .filter(|name| name.ends_with(".safetensors"))
            .flat_map(|name| tensors(&session.path(folder).join(name)))
            .collect()
    };
    assert!(weights("model") == weights("original"), "tensors differ");
}

#[test]
fn verify_as_json() {
    let session = Session::with(&["FP8"]);
    session.ctq("-q convert FP8 out").expect(0);
    let ran = session.ctq("verify out --json --tokens 8").expect(0);
    let verification: Value = serde_json::from_str(&ran.stdout).expect("one JSON object");
    let chosen =
        ["verification_version", "path", "against", "round_trip", "operands", "not_checked", "passed"];
    let mut chosen: BTreeMap<&str, Value> =
        chosen.iter().map(|key| (*key, verification[key].clone())).collect();
    let steps = |arithmetic: &Value| {
        let names = arithmetic["steps"].as_array().expect("steps").iter().map(|step| step["name"].clone());
        json!({ "mode": arithmetic["mode"], "steps": names.collect::<Vec<_>>() })
    };
    let arithmetic = verification["arithmetic"].as_array().expect("modes").iter().map(steps).collect();
    chosen.insert("arithmetic", arithmetic);
    assert_json_snapshot!(chosen);
}

#[test]
fn demo_can_be_kept_and_given_again() {
    let session = Session::new();
    session.ctq("-q demo --keep kept --threads 2").expect(0);
    let first = files_of(&session.path("kept/NVFP4"));
    session.ctq("-q demo --keep kept").expect(0);
    assert!(first == files_of(&session.path("kept/NVFP4")), "a container was changed");
    session.ctq("inspect kept/NVFP4").expect(0);
    random_llama(1, 64).write(&session, "other");
    session.ctq("-q convert other elsewhere").expect(0);
    std::fs::create_dir(session.path("mine")).expect("a folder");
    std::fs::rename(session.path("elsewhere"), session.path("mine/bf16")).expect("a container moved");
    let refused = session.ctq("-q demo --keep mine").expect(2);
    assert_snapshot!(refused.stderr, @"error: mine/bf16: another container is there; give another folder to --keep");
}

/// `input_ids` [rows, length] as I64.
pub(crate) fn write_ids(session: &Session, name: &str, rows: &[&[i64]]) {
    let bytes = rows.iter().copied().flatten().flat_map(|id| id.to_le_bytes()).collect();
    let stored = Stored { dtype: Dtype::I64, shape: vec![rows.len(), rows[0].len()], bytes };
    write_tensors(&session.path(name), &BTreeMap::from([("input_ids".to_owned(), stored)]));
}

#[test]
fn logits_of_given_ids() {
    let session = Session::with(&["NVFP4"]);
    let rows: [&[i64]; 2] = [&[478, 45, 428, 258, 276], &[478, 1, 2, 3, 4]];
    write_ids(&session, "ids.safetensors", &rows);
    let narrow: Vec<u8> = rows
        .iter()
        .copied()
        .flatten()
        .flat_map(|id| i32::try_from(*id).expect("an id").to_le_bytes())
        .collect();
    let narrow = Stored { dtype: Dtype::I32, shape: vec![2, 5], bytes: narrow };
    write_tensors(&session.path("ids32.safetensors"), &BTreeMap::from([("input_ids".to_owned(), narrow)]));
    session.ctq("-q convert NVFP4 out").expect(0);

    let logits = |model: &str, ids: &str, options: &str| {
        session.ctq(&format!("-q logits {model} --ids {ids} --out l.safetensors {options}")).expect(0);
        let stored = tensors(&session.path("l.safetensors")).remove("logits").expect("logits");
        assert_eq!((stored.dtype, stored.shape.as_slice()), (Dtype::F32, &[2, 5, 480][..]));
        stored
    };
    let plain = logits("NVFP4", "ids.safetensors", "");
    assert!(plain == logits("NVFP4", "ids32.safetensors", ""), "I32 ids change the logits");
    assert!(plain == logits("out", "ids.safetensors", ""), "a container changes the logits");
    assert!(plain == logits("NVFP4", "ids.safetensors", "--tp 3 --threads 2"), "ranks change the logits");
    let mut others = vec![plain];
    for options in ["--compute f32", "--acts library", "--acts kernel", "--acts library --compute f32"] {
        let other = logits("NVFP4", "ids.safetensors", options);
        assert!(!others.contains(&other), "{options} changes nothing");
        others.push(other);
    }
}

#[test]
fn ids_that_are_none() {
    let session = Session::with(&["bf16"]);
    let refused = |ids: &str| {
        let line = format!("logits bf16 --ids {ids} --out l.safetensors");
        let ran = session.ctq(&line).expect(2);
        assert!(!session.path("l.safetensors").exists(), "a refused command has left a file");
        ran.stderr
    };
    write_ids(&session, "large.safetensors", &[&[1, 480]]);
    write_ids(&session, "negative.safetensors", &[&[1, -1]]);
    let float = Stored { dtype: Dtype::F32, shape: vec![1, 1], bytes: vec![0; 4] };
    let flat = Stored { dtype: Dtype::I64, shape: vec![1], bytes: vec![0; 8] };
    for (name, tensor, stored) in
        [("float", "input_ids", float), ("flat", "input_ids", flat.clone()), ("other", "ids", flat)]
    {
        let path = session.path(&format!("{name}.safetensors"));
        write_tensors(&path, &BTreeMap::from([(tensor.to_owned(), stored)]));
    }
    let all = ["large", "negative", "float", "flat", "other", "absent"]
        .map(|name| refused(&format!("{name}.safetensors")))
        .join("");
    assert_snapshot!(all + &refused("text.txt"), @"
    error: large.safetensors: 480 is no token id: the model has 480 tokens; use the tokenizer that belongs to it
    error: negative.safetensors: -1 is no token id: the model has 480 tokens; use the tokenizer that belongs to it
    error: float.safetensors: `input_ids` is F32; it must be I64 or I32
    error: flat.safetensors: `input_ids` has shape [1]; it must be [B, S]
    error: other.safetensors: has no tensor `input_ids`; write one of shape [B, S], I64 or I32
    error: absent.safetensors: cannot be read; write `input_ids` [B, S] to a safetensors file: No such file or directory (os error 2)
    error: text.txt: not a safetensors file; write `input_ids` [B, S] to one: header too large
    ");
}

#[test]
fn a_dry_run_tells_what_goes_where_and_scores_nothing() {
    let session = Session::with(&["NVFP4"]);
    let line =
        "eval NVFP4 --data text.txt --ctx 256 --stride 64 --acts off --memory 16M --tp 2 --pp 2 --dry-run";
    let ran = session.ctq(&format!("{line} --json plan.json")).expect(0);
    // How long it would take is a matter of the machine.
    let lines = ran.stdout.lines().filter(|line| !line.starts_with("floor:"));
    insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"));
    let plan = &session.json("plan.json")[0];
    assert!(plan["work"]["linears"].as_f64().expect("operations") > 0.0);
    assert_eq!((&plan["tp"], &plan["pp"], &plan["replicas"]), (&2.into(), &2.into(), &1.into()));
    assert_eq!(plan["seats"].as_array().expect("seats").len(), 4);
    // (128 + 128 + 256 + 128) columns of f32, half of which come from the other rank.
    assert_eq!(plan["traffic"]["layer_bytes_per_token"], 1280);
    assert_eq!(plan["traffic"]["stage_bytes_per_token"], 512);
    assert!(!session.path("cache/eval").exists(), "a dry run has left a state");
}
