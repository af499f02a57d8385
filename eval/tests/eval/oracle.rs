//! Streams, hashes, windows and counts against Hugging Face's, for every protocol it was asked.

use ctq_eval::protocol::{Overrides, Protocol};
use ctq_eval::statistics::{scored_tokens, summarize};
use ctq_eval::text::Text;
use ctq_eval::tokens::Tokenizer;
use ctq_model::window::{Window, WindowScores};
use serde_json::Value;

use crate::assets;

fn cases() -> [(&'static str, &'static str, Overrides); 6] {
    let same = Overrides::default();
    let rows = |rows| Overrides { rows: Some(rows), ..same };
    [
        ("exl3-2025-small", "exl3-2025-small", same),
        ("exl3-compareq-2026", "exl3-compareq-2026", same),
        ("exl3-ppl (10 rows)", "exl3-ppl", rows(10)),
        ("disjoint (10 windows)", "disjoint", rows(10)),
        ("llamacpp (ctx 512, 40 chunks)", "llamacpp", rows(40)),
        (
            "hf-strided (2048/512, first 12000 tokens)",
            "hf-strided",
            Overrides { max_tokens: Some(12_000), ..same },
        ),
    ]
}

#[test]
fn every_protocol_asks_what_hugging_face_was_asked() {
    let Some(parquet) = assets::wikitext_parquet() else { return };
    let Some(directory) = assets::large("models/tiny-llama-wiki/NVFP4") else { return };
    let oracle = std::fs::read(directory.join("oracle.json")).expect("the oracle");
    let oracle: Value = serde_json::from_slice(&oracle).expect("JSON");
    let text = Text::load(&parquet).expect("the text");
    let mut tokenizer = Tokenizer::load(&directory).expect("the tokenizer");
    assert_eq!((tokenizer.bos(), tokenizer.entries()), (Some(4094), 4096));
    for (name, preset, overrides) in cases() {
        let protocol = Protocol::resolve(preset, &overrides).expect("a protocol");
        let stream = tokenizer.stream(&text, &protocol, 4096).expect("a stream");
        assert_eq!(oracle["tokens_sha256_int32le"][name], stream.sha256(), "{name}: ids");
        assert_eq!(oracle["tokens"][name], stream.ids().len(), "{name}: tokens");
        let windows = protocol.windows(&stream).expect("windows");
        let result = &oracle["results"]["off"][name];
        let count: usize = windows.iter().map(|window| window.scored.len()).sum();
        assert_eq!(result["windows"], windows.len(), "{name}: windows");
        assert_eq!(result["count"], count, "{name}: scored positions");
        check_perplexity(name, &windows, result);
    }
}

/// Spreads the oracle's sum of each window evenly over its positions: total and perplexity must come out as
/// the oracle's.
fn check_perplexity(name: &str, windows: &[Window], result: &Value) {
    let scores: Vec<WindowScores> = windows
        .iter()
        .map(|window| {
            let sum = result["per_window_nll"][window.index].as_f64().expect("a sum");
            let nll = vec![sum / window.scored.len() as f64; window.scored.len()];
            WindowScores { window: window.index, first: window.scored.start, nll }
        })
        .collect();
    let summary = summarize(&scored_tokens(windows, &scores).expect("they fit")).expect("a summary");
    for (found, key) in [(summary.perplexity, "ppl"), (summary.total_nll, "total_nll")] {
        let expected = result[key].as_f64().expect("a number");
        assert!((found / expected - 1.0).abs() < 1e-11, "{name}: {key} {found}, expected {expected}");
    }
}

#[test]
fn the_raw_file_gives_the_same_stream_as_the_parquet_file() {
    let (Some(raw), Some(parquet)) = (assets::wikitext_raw(), assets::wikitext_parquet()) else { return };
    let Some(directory) = assets::large("models/tiny-llama-wiki/bf16") else { return };
    let mut tokenizer = Tokenizer::load(&directory).expect("the tokenizer");
    for preset in ["exl3-2025-small", "exl3-qbench", "exl3-gguf"] {
        let protocol = Protocol::resolve(preset, &Overrides::default()).expect("a protocol");
        let mut hash = |path| {
            let text = Text::load(path).expect("the text");
            tokenizer.stream(&text, &protocol, 4096).expect("a stream").sha256().to_owned()
        };
        assert_eq!(hash(&raw), hash(&parquet), "{preset}");
    }
}
