//! Perplexities of the bundled checkpoints against those that Hugging Face computes: `golden/bundled/oracle.json`.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::checkpoint::{Stored, tensors};
use crate::session::{Session, repository};

const SMALL: (&str, &str) =
    ("exl3-2025-small (ctx 256, stride 64, 20 rows)", "--preset exl3-2025-small --ctx 256 --stride 64");
const DISJOINT: (&str, &str) = ("disjoint (ctx 256)", "--preset disjoint --ctx 256");

/// Largest relative error of a perplexity, and largest error of a window's mean nll, nats.
#[derive(Clone, Copy)]
struct Bound {
    perplexity: f64,
    window: f64,
}

/// f32 computes what the oracle computes; the library's activation codes may flip where a value lies on a boundary.
const F32: [(&str, Bound); 3] = [
    ("none", Bound { perplexity: 1e-5, window: 1e-5 }),
    ("off", Bound { perplexity: 1e-5, window: 1e-5 }),
    ("library", Bound { perplexity: 1e-4, window: 3e-4 }),
];

/// Operands rounded to bf16: only the perplexity is promised.
const BF16: [(&str, Bound); 3] = [
    ("none", Bound { perplexity: 3e-4, window: 2e-2 }),
    ("off", Bound { perplexity: 3e-4, window: 2e-2 }),
    ("library", Bound { perplexity: 1e-3, window: 2e-2 }),
];

#[test]
fn bf16_checkpoint() {
    agrees("bf16", SMALL, "f32", F32);
    agrees("bf16", SMALL, "bf16", BF16);
    agrees("bf16", DISJOINT, "f32", F32);
}

#[test]
fn w4a16_checkpoint() {
    agrees("W4A16", SMALL, "f32", F32);
    agrees("W4A16", SMALL, "bf16", BF16);
    agrees("W4A16", DISJOINT, "f32", F32);
}

#[test]
fn fp8_checkpoint() {
    agrees("FP8", SMALL, "f32", F32);
    agrees("FP8", SMALL, "bf16", BF16);
    agrees("FP8", DISJOINT, "bf16", BF16);
}

#[test]
fn nvfp4_checkpoint() {
    agrees("NVFP4", SMALL, "f32", F32);
    agrees("NVFP4", SMALL, "bf16", BF16);
    agrees("NVFP4", DISJOINT, "bf16", BF16);
}

/// Every record that `--acts auto` makes lies within its bounds.
fn agrees(model: &str, (question, options): (&str, &str), compute: &str, bounds: [(&str, Bound); 3]) {
    let session = Session::with(&[model]);
    let line = format!(
        "eval {model} --data text.txt {options} --compute {compute} --json r.json --nll n.safetensors"
    );
    session.ctq(&line).expect(0);
    let oracle = std::fs::read(repository().join("golden/bundled/oracle.json")).expect("the oracle");
    let oracle: Value = serde_json::from_slice(&oracle).expect("JSON");
    let records = session.json("r.json");
    for (index, record) in records.as_array().expect("records").iter().enumerate() {
        let acts = record["acts"].as_str().expect("acts");
        let (_, bound) = bounds[bounds.iter().position(|(name, _)| *name == acts).expect("known acts")];
        let stated = if acts == "none" { "off" } else { acts };
        let expected = &oracle["checkpoints"][model]["results"][stated][question];
        let what = format!("{model}, {question}, {compute}, acts {acts}");
        assert_eq!(record["count"], expected["count"], "{what}");
        let error = number(&record["perplexity"]) / number(&expected["ppl"]) - 1.0;
        assert!(error.abs() <= bound.perplexity, "{what}: perplexity is off by {error:e}");
        let nll = match index {
            0 => "n.safetensors".to_owned(),
            _ => format!("n.{index}-{model}-{acts}.safetensors"),
        };
        let means = window_means(&tensors(&session.path(&nll)));
        let sums = expected["per_window_nll"].as_array().expect("windows");
        assert_eq!(means.len(), sums.len(), "{what}");
        for (window, (mean, count)) in means {
            let error = mean - number(&sums[window]) / count as f64;
            assert!(error.abs() <= bound.window, "{what}: window {window} is off by {error:e}");
        }
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Mean nll and number of positions of each window.
pub(crate) fn window_means(file: &BTreeMap<String, Stored>) -> BTreeMap<usize, (f64, usize)> {
    let words = |name: &str| {
        let bytes = file[name].bytes.chunks_exact(8);
        bytes.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect::<Vec<_>>()
    };
    let mut sums: BTreeMap<usize, (f64, usize)> = BTreeMap::new();
    for (window, nll) in words("window").into_iter().zip(words("nll")) {
        let (sum, count) = sums.entry(window as usize).or_default();
        *sum += f64::from_bits(nll);
        *count += 1;
    }
    sums.into_iter().map(|(window, (sum, count))| (window, (sum / count as f64, count))).collect()
}
