//! Trained models against perplexities by Hugging Face: token ids by hash, then the negative log-likelihood of each
//! window, with weights only and with quantized activations, in f32 and bf16. And the bounds can tell: the weights of
//! another checkpoint, or another choice about activations, break them.
//!
//! The whole of every protocol is a command's business; here the first windows of each model are scored.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ctq_eval::protocol::{Overrides, Protocol};
use ctq_eval::text::Text;
use ctq_eval::tokens::{TokenStream, Tokenizer};
use ctq_kernels::Compute;
use ctq_kernels::cpu::Cpu;
use ctq_model::window::Window;
use ctq_runtime::{Acts, Engine};
use ctq_tests::{assets, models};
use serde_json::Value;

/// Models of `tiny-llama-wiki`; the second half of the list quantizes activations.
const MODELS: [&str; 10] =
    ["bf16", "W4A16", "W4A16_ASYM", "W8A16", "NVFP4A16", "MXFP4A16", "NVFP4", "FP8", "FP8_DYNAMIC", "W8A8"];
const QUANTIZED: &[&str] = &["NVFP4", "FP8", "FP8_DYNAMIC", "W8A8"];

/// The protocol that every model was scored by.
const PROTOCOL: &str = "exl3-2025-small";

/// Windows of each model that are scored.
const WINDOWS: usize = 2;

/// Most that a window's mean nll may be from the oracle's.
const OFF_F32: f64 = 1e-5;
const LIBRARY_F32: f64 = 3e-4;

/// Most that the perplexity of the windows may be from the oracle's, relative.
const OFF_BF16: f64 = 3e-4;
const LIBRARY_BF16: f64 = 1e-3;

/// The protocols of the oracles.
fn protocols() -> [(&'static str, &'static str, Overrides); 6] {
    let same = Overrides::default();
    let rows = |rows| Overrides { rows: Some(rows), ..same };
    [
        (PROTOCOL, PROTOCOL, same),
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

/// A model with what Hugging Face says about it.
struct Model {
    name: String,
    folder: PathBuf,
    /// `results` of the oracle, by acts and protocol.
    results: Value,
}

impl Model {
    fn wiki(name: &str) -> Option<Model> {
        let folder = assets::shared("models/tiny-llama-wiki")?.join(name);
        let oracle = json(&folder.join("oracle.json"));
        Some(Model { name: name.to_owned(), results: oracle["results"].clone(), folder })
    }

    /// Sum of the nll of each window, by the oracle.
    fn expected(&self, acts: Acts, protocol: &str) -> Vec<f64> {
        let sums = self.results[acts.to_string()][protocol]["per_window_nll"].as_array();
        let sums = sums.unwrap_or_else(|| panic!("{}: no {acts} {protocol} in its oracle", self.name));
        sums.iter().map(|sum| sum.as_f64().expect("a sum")).collect()
    }

    /// Sum of the nll of each of these windows, by ctq.
    fn score(&self, windows: &[Window], acts: Acts, compute: Compute) -> Vec<f64> {
        let source = models::on_the_fly(&self.folder);
        let cpu = Cpu::detect();
        let engine = Engine::new(&cpu, &source, models::settings(acts, compute));
        let scores = engine.score(windows, usize::MAX, None, &());
        let scores = scores.unwrap_or_else(|error| panic!("{} {acts} {compute}: {error}", self.name));
        scores.iter().map(|scores| scores.nll.iter().sum()).collect()
    }
}

fn json(path: &Path) -> Value {
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).expect("JSON")
}

fn stream(tokenizer: &Path, text: &Text, protocol: &Protocol, vocabulary: usize) -> TokenStream {
    let mut tokenizer = Tokenizer::load(tokenizer).expect("a tokenizer");
    tokenizer.stream(text, protocol, vocabulary).expect("a stream")
}

fn wikitext() -> Option<Text> {
    let path = assets::shared("data/wikitext-2-raw/test-00000-of-00001.parquet")?;
    Some(Text::load(&path).expect("the text"))
}

/// The windows of the models that are scored here.
fn wiki_windows() -> Option<Vec<Window>> {
    let folder = assets::shared("models/tiny-llama-wiki/bf16")?;
    let overrides = Overrides { rows: Some(WINDOWS), max_tokens: Some(4_096), ..Overrides::default() };
    let protocol = Protocol::resolve(PROTOCOL, &overrides).expect("a protocol");
    Some(protocol.windows(&stream(&folder, &wikitext()?, &protocol, 4096)).expect("windows"))
}

/// Largest difference of a window's mean.
fn furthest(windows: &[Window], found: &[f64], expected: &[f64]) -> f64 {
    let mean = windows.iter().map(|window| window.scored.len() as f64);
    let pairs = found.iter().zip(expected).zip(mean);
    pairs.map(|((found, expected), count)| ((found - expected) / count).abs()).fold(0.0, f64::max)
}

/// Relative difference of the perplexity of all these windows.
fn perplexity_off_by(windows: &[Window], found: &[f64], expected: &[f64]) -> f64 {
    let count: usize = windows.iter().map(|window| window.scored.len()).sum();
    let difference: f64 = found.iter().zip(expected).map(|(found, expected)| found - expected).sum();
    ((difference / count as f64).exp() - 1.0).abs()
}

#[test]
fn token_ids_of_every_model_and_protocol_have_the_hash_of_the_oracle() {
    let Some(text) = wikitext() else { return };
    // Models with the same tokenizer have the same streams.
    let mut hashes: BTreeMap<(Vec<u8>, &str), (String, usize)> = BTreeMap::new();
    for name in MODELS {
        let Some(model) = Model::wiki(name) else { return };
        let oracle = json(&model.folder.join("oracle.json"));
        let tokenizer = ["tokenizer.json", "tokenizer_config.json"]
            .map(|file| std::fs::read(model.folder.join(file)).expect("a tokenizer"))
            .concat();
        for (protocol, preset, overrides) in protocols() {
            let resolved = Protocol::resolve(preset, &overrides).expect("a protocol");
            let (hash, tokens) = hashes.entry((tokenizer.clone(), protocol)).or_insert_with(|| {
                let stream = stream(&model.folder, &text, &resolved, 4096);
                (stream.sha256().to_owned(), stream.ids().len())
            });
            let stated = &oracle["tokens_sha256_int32le"][protocol];
            if stated.is_null() {
                assert_ne!(protocol, PROTOCOL, "{name}");
                continue;
            }
            assert_eq!(stated, hash.as_str(), "{name}, {protocol}");
            assert_eq!(oracle["tokens"][protocol], *tokens, "{name}, {protocol}");
        }
    }
}

#[test]
fn weights_only_in_f32_every_window_has_the_likelihood_of_hugging_face() {
    let Some(windows) = wiki_windows() else { return };
    let models: Vec<Model> = MODELS.iter().filter_map(|name| Model::wiki(name)).collect();
    let scores: Vec<Vec<f64>> =
        models.iter().map(|model| model.score(&windows, Acts::Off, Compute::F32)).collect();
    for (model, found) in models.iter().zip(&scores) {
        let distance = furthest(&windows, found, &model.expected(Acts::Off, PROTOCOL));
        assert!(distance <= OFF_F32, "{}: {distance:.1e}", model.name);
    }
    for (model, found) in models.iter().zip(&scores) {
        for other in &models {
            // These two were quantized alike: NVFP4A16 is NVFP4 without its activations.
            let alike = |name: &str| name.strip_suffix("A16").unwrap_or(name) == "NVFP4";
            if model.name == other.name || (alike(&model.name) && alike(&other.name)) {
                continue;
            }
            let distance = furthest(&windows, found, &other.expected(Acts::Off, PROTOCOL));
            assert!(distance > OFF_F32, "{} passes for {}: {distance:.1e}", model.name, other.name);
        }
    }
}

#[test]
fn quantized_activations_in_f32_move_every_window_as_the_library_says() {
    let Some(windows) = wiki_windows() else { return };
    for model in QUANTIZED.iter().filter_map(|name| Model::wiki(name)) {
        let expected = model.expected(Acts::Library, PROTOCOL);
        let found = model.score(&windows, Acts::Library, Compute::F32);
        let distance = furthest(&windows, &found, &expected);
        assert!(distance <= LIBRARY_F32, "{}: {distance:.1e}", model.name);
        // Without quantized activations the bound breaks, and with them the one of weights only.
        let off = model.expected(Acts::Off, PROTOCOL);
        let distance = furthest(&windows, &off, &expected[..WINDOWS]);
        assert!(distance > LIBRARY_F32, "{}: off passes for library: {distance:.1e}", model.name);
        let distance = furthest(&windows, &found, &off);
        assert!(distance > OFF_F32, "{}: library passes for off: {distance:.1e}", model.name);
    }
}

#[test]
fn in_bf16_the_perplexity_is_as_close_as_its_rounding_allows() {
    let Some(mut windows) = wiki_windows() else { return };
    windows.truncate(1);
    let mut checks: Vec<(&str, Acts, f64)> = MODELS.iter().map(|name| (*name, Acts::Off, OFF_BF16)).collect();
    checks.extend(QUANTIZED.iter().map(|name| (*name, Acts::Library, LIBRARY_BF16)));
    for (name, acts, bound) in checks {
        let Some(model) = Model::wiki(name) else { return };
        let (found, expected) = (model.score(&windows, acts, Compute::Bf16), model.expected(acts, PROTOCOL));
        let distance = perplexity_off_by(&windows, &found, &expected);
        assert!(distance <= bound, "{name} {acts}: {distance:.1e}");
        // Too close is wrong too: then nothing was rounded.
        let furthest = furthest(&windows, &found, &expected);
        assert!(furthest > 1e-7, "{name} {acts}: {furthest:.1e}");
    }
}

/// Where windows fall, what they score and where BOS stands: the second window of every protocol.
#[test]
fn every_protocol_scores_its_second_window_as_hugging_face_does() {
    let Some(text) = wikitext() else { return };
    let Some(model) = Model::wiki("W4A16") else { return };
    for (name, preset, overrides) in protocols() {
        // The text of two windows is enough of it.
        let overrides = Overrides { max_tokens: Some(6_000), rows: Some(2), ..overrides };
        let protocol = Protocol::resolve(preset, &overrides).expect("a protocol");
        let windows = protocol.windows(&stream(&model.folder, &text, &protocol, 4096)).expect("windows");
        let found = model.score(&windows[1..], Acts::Off, Compute::F32);
        let expected = model.expected(Acts::Off, name);
        let distance = furthest(&windows[1..], &found, &expected[1..2]);
        assert!(distance <= OFF_F32, "{name}: {distance:.1e}");
    }
}

/// The small model of the repository, whole protocols: 20 overlapping windows of 256.
#[test]
fn the_bundled_model_has_the_likelihoods_of_hugging_face() {
    const NAME: &str = "exl3-2025-small (ctx 256, stride 64, 20 rows)";
    let bundled = assets::golden("bundled");
    let oracle = json(&bundled.join("oracle.json"));
    let text = Text::load(&bundled.join("text.txt")).expect("the text");
    let overrides = Overrides { ctx: Some(256), stride: Some(64), ..Overrides::default() };
    let protocol = Protocol::resolve(PROTOCOL, &overrides).expect("a protocol");
    let stream = stream(&bundled.join("bf16"), &text, &protocol, 480);
    assert_eq!(oracle["tokens_sha256_int32le"][NAME], stream.sha256());
    let windows = protocol.windows(&stream).expect("windows");
    for (name, checkpoint) in oracle["checkpoints"].as_object().expect("checkpoints") {
        let (name, results) = (name.clone(), checkpoint["results"].clone());
        let model = Model { folder: bundled.join(&name), name, results };
        let off = model.expected(Acts::Off, NAME);
        let found = model.score(&windows, Acts::Off, Compute::F32);
        let distance = furthest(&windows, &found, &off);
        assert!(distance <= OFF_F32, "{}: {distance:.1e}", model.name);
        let found = model.score(&windows, Acts::Off, Compute::Bf16);
        let distance = perplexity_off_by(&windows, &found, &off);
        assert!(distance <= OFF_BF16, "{} bf16: {distance:.1e}", model.name);
        if model.results["library"].is_null() {
            continue;
        }
        let library = model.expected(Acts::Library, NAME);
        let found = model.score(&windows, Acts::Library, Compute::F32);
        let distance = furthest(&windows, &found, &library);
        assert!(distance <= LIBRARY_F32, "{} library: {distance:.1e}", model.name);
        assert!(furthest(&windows, &off, &library) > LIBRARY_F32, "{}: off passes for library", model.name);
        let found = model.score(&windows, Acts::Library, Compute::Bf16);
        let distance = perplexity_off_by(&windows, &found, &library);
        assert!(distance <= LIBRARY_BF16, "{} library bf16: {distance:.1e}", model.name);
    }
}
