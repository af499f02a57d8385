//! Whole models on the CUDA engine against the CPU engine, without a GPU: the CUDA kernels' own sources run on the CPU.
//!
//! In f32 both give the same bits, in every mode of activations. In bf16 tensor cores sum in another order, so logits
//! and layers are held within bounds. And the CUDA engine against itself: however the work is cut, the same bits.

use std::num::NonZero;
use std::path::{Path, PathBuf};

use ctq_container::LayerSource;
use ctq_eval::protocol::{Overrides, Protocol};
use ctq_eval::text::Text;
use ctq_eval::tokens::Tokenizer;
use ctq_kernels::collective::{PeerCopies, Rank, team};
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::Cuda;
use ctq_kernels::cuda::emulated::{CopyTime, Dense, Emulated, Schedule, ThreadOrder};
use ctq_kernels::{Backend, Compute};
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::{Acts, Engine, Lockstep};
use ctq_tests::{assets, models};

/// Relative error of logits in bf16, weights only.
const LOGITS: f64 = 2e-3;
/// Difference of the mean nll in bf16, weights only, in nats.
const NLL: f64 = 2e-4;
/// Median over positions of a layer's relative error in bf16 with quantized activations, from the same hidden state.
const LAYER_MEDIAN: f64 = 2e-3;

const TOKENS: usize = 70;

fn emulated() -> Cuda<Emulated> {
    Cuda::new(Emulated::new(Schedule { order: ThreadOrder::DepthFirst, copies: CopyTime::Lazy }))
}

/// Ranks on devices that do not see one another's memory.
fn on_devices_of_their_own(ranks: usize) -> Vec<Rank<Cuda<Emulated>>> {
    PeerCopies::team(ranks).into_iter().map(|peers| Rank::new(emulated(), Box::new(peers))).collect()
}

/// Every tiny checkpoint of the repository, and the fixtures where they are.
fn checkpoints() -> Vec<PathBuf> {
    let bundled = ["bf16", "NVFP4", "W4A16", "FP8"].map(|name| assets::golden("bundled").join(name));
    let mut all: Vec<PathBuf> =
        bundled.into_iter().chain(assets::with_oracle(&assets::golden("families"))).collect();
    if let Some(fixtures) = assets::shared("fixtures") {
        all.extend(assets::with_oracle(&fixtures));
    }
    all
}

fn tokens(vocabulary: usize, count: usize) -> Vec<u32> {
    let mut state = 11_u64;
    let token = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % vocabulary as u32
    };
    (0..count).map(token).collect()
}

/// Modes of activations that mean something for a checkpoint.
fn modes(source: &dyn LayerSource) -> &'static [Acts] {
    if source.inventory().quantizes_activations() {
        &[Acts::Off, Acts::Library, Acts::Kernel]
    } else {
        &[Acts::Off]
    }
}

fn logits<B: Backend>(
    backend: &B,
    source: &dyn LayerSource,
    acts: Acts,
    compute: Compute,
) -> Result<Vec<f32>, String> {
    let ids = tokens(source.inventory().spec.vocab, TOKENS);
    let mut logits = Vec::new();
    let engine = Engine::new(backend, source, models::settings(acts, compute));
    let done = engine.logits(&[&ids[..TOKENS / 3], &ids[TOKENS / 3..]], &(), |rows| {
        logits.extend_from_slice(rows);
        Ok::<(), ctq_runtime::Error>(())
    });
    done.map(|()| logits).map_err(|error| error.to_string())
}

fn relative(found: &[f32], expected: &[f32]) -> f64 {
    let pairs = || found.iter().zip(expected).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let difference: f64 = pairs().map(|(a, b)| (a - b) * (a - b)).sum();
    (difference / pairs().map(|(_, b)| b * b).sum::<f64>()).sqrt()
}

#[test]
fn in_f32_both_engines_give_the_same_bits() {
    for folder in checkpoints() {
        let source = models::on_the_fly(&folder);
        for acts in modes(&source) {
            let found = logits(&emulated(), &source, *acts, Compute::F32);
            let expected = logits(&Cpu::detect(), &source, *acts, Compute::F32);
            match (found, expected) {
                (Ok(found), Ok(expected)) => {
                    let same = found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                    let error = relative(&found, &expected);
                    assert!(
                        same && found.len() == expected.len(),
                        "{} {acts}: off by {error:e}",
                        folder.display()
                    );
                }
                // What one engine refuses, so does the other, with the same words.
                (found, expected) => assert_eq!(found.err(), expected.err(), "{} {acts}", folder.display()),
            }
        }
    }
}

#[test]
fn in_bf16_logits_are_those_of_the_cpu_engine() {
    for folder in checkpoints() {
        let source = models::on_the_fly(&folder);
        let found = logits(&emulated(), &source, Acts::Off, Compute::Bf16).expect("logits");
        let expected = logits(&Cpu::detect(), &source, Acts::Off, Compute::Bf16).expect("logits");
        let error = relative(&found, &expected);
        assert!(error <= LOGITS, "{}: {error:e}", folder.display());
    }
}

#[test]
fn in_bf16_layers_with_quantized_activations_are_those_of_the_cpu_engine() {
    for folder in checkpoints() {
        let source = models::on_the_fly(&folder);
        let spec = &source.inventory().spec;
        let ids = tokens(spec.vocab, TOKENS);
        for acts in modes(&source).iter().filter(|acts| **acts != Acts::Off) {
            let settings = models::settings(*acts, Compute::Bf16);
            let (cuda, cpu) = (emulated(), Cpu::detect());
            let (found, expected) =
                (Engine::new(&cuda, &source, settings), Engine::new(&cpu, &source, settings));
            let mut hidden = expected.embed(&ids).expect("embedded");
            for index in 0..spec.blocks.len() {
                let after = match (found.layer(index, &hidden), expected.layer(index, &hidden)) {
                    (Ok(found), Ok(expected)) => (found, expected),
                    (found, expected) => {
                        assert_eq!(found.err().map(|e| e.to_string()), expected.err().map(|e| e.to_string()));
                        break;
                    }
                };
                let mut errors: Vec<f64> = after
                    .0
                    .chunks_exact(spec.hidden)
                    .zip(after.1.chunks_exact(spec.hidden))
                    .map(|(found, expected)| relative(found, expected))
                    .collect();
                errors.sort_by(f64::total_cmp);
                let median = errors[errors.len() / 2];
                assert!(median <= LAYER_MEDIAN, "{} {acts} layer {index}: {median:e}", folder.display());
                hidden = after.1;
            }
        }
    }
}

fn scores<B: Backend>(
    backend: &B,
    folder: &Path,
    windows: &[Window],
    acts: Acts,
    compute: Compute,
) -> Vec<WindowScores> {
    let source = models::on_the_fly(folder);
    let engine = Engine::new(backend, &source, models::settings(acts, compute));
    engine
        .score(windows, usize::MAX, None, &())
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
}

fn windows(vocabulary: usize) -> Vec<Window> {
    let ids = tokens(vocabulary, 300);
    let mut start = 0;
    let window = |(index, length): (usize, &usize)| {
        start += length;
        Window { index, start: start - length, ids: ids[start - length..start].to_vec(), scored: 1..*length }
    };
    [97, 2, 64, 65, 33].iter().enumerate().map(window).collect()
}

/// Tensor-parallel ranks, each window by itself, and a library for dense products that takes no model this small.
#[test]
fn the_same_bits_however_the_work_is_cut() {
    let families = ["mixtral-sliding", "qwen3moe-nvfp4"].map(|name| assets::golden("families").join(name));
    for folder in
        families.into_iter().chain([assets::golden("bundled/NVFP4"), assets::golden("bundled/W4A16")])
    {
        let windows = windows(models::on_the_fly(&folder).inventory().spec.vocab);
        for (acts, compute) in
            [(Acts::Off, Compute::Bf16), (Acts::Library, Compute::Bf16), (Acts::Off, Compute::F32)]
        {
            let plain = scores(&emulated(), &folder, &windows, acts, compute);
            let same = |how: &str, found: Vec<WindowScores>| {
                let bits = |scores: &[WindowScores]| -> Vec<u64> {
                    scores.iter().flat_map(|scores| &scores.nll).map(|nll| nll.to_bits()).collect()
                };
                assert_eq!(bits(&found), bits(&plain), "{}: {how}", folder.display());
            };
            let ranks = on_devices_of_their_own(3);
            let found = team::run(&ranks, NonZero::<usize>::MIN, |rank| {
                Ok::<_, ctq_runtime::Error>(scores(rank, &folder, &windows, acts, compute))
            });
            found.into_iter().for_each(|found| same("3 ranks", found.expect("scores")));
            let alone = windows
                .iter()
                .flat_map(|window| scores(&emulated(), &folder, std::slice::from_ref(window), acts, compute));
            same("each window alone", alone.collect());
            let dense = Cuda::new(Emulated::new(Schedule::ALL[2]).with_dense_product(Dense::Present));
            same("another schedule", scores(&dense, &folder, &windows, acts, compute));
        }
    }
}

/// Windows of a text, few and short, for the emulation is slow.
fn text_windows(folder: &Path, text: &Path, ctx: usize, rows: usize) -> Vec<Window> {
    let overrides = Overrides {
        ctx: Some(ctx),
        stride: Some(ctx / 4),
        rows: Some(rows),
        max_tokens: Some(20_000),
        ..Overrides::default()
    };
    let protocol = Protocol::resolve("exl3-2025-small", &overrides).expect("a protocol");
    let text = Text::load(text).expect("the text");
    let mut tokenizer = Tokenizer::load(folder).expect("a tokenizer");
    let vocabulary = models::on_the_fly(folder).inventory().spec.vocab;
    let stream = tokenizer.stream(&text, &protocol, vocabulary).expect("a stream");
    protocol.windows(&stream).expect("windows")
}

/// Holds the mean nll of a trained model, weights only, against the CPU engine.
fn hold_scores(folder: &Path, windows: &[Window]) {
    let mean = |scores: Vec<WindowScores>| {
        let nll: Vec<f64> = scores.iter().flat_map(|scores| scores.nll.clone()).collect();
        nll.iter().sum::<f64>() / nll.len() as f64
    };
    let found = mean(scores(&emulated(), folder, windows, Acts::Off, Compute::Bf16));
    let expected = mean(scores(&Cpu::detect(), folder, windows, Acts::Off, Compute::Bf16));
    assert!((found - expected).abs() <= NLL, "{}: {found}, on the CPU {expected}", folder.display());
}

#[test]
fn in_bf16_scores_of_the_bundled_models_are_those_of_the_cpu_engine() {
    let text = assets::golden("bundled/text.txt");
    for name in ["bf16", "NVFP4", "W4A16", "FP8"] {
        let folder = assets::golden("bundled").join(name);
        hold_scores(&folder, &text_windows(&folder, &text, 256, 2));
    }
}

#[test]
fn in_bf16_scores_of_larger_models_are_those_of_the_cpu_engine() {
    let Some(text) = assets::shared("data/wikitext-2-raw/test-00000-of-00001.parquet") else { return };
    for name in ["bf16", "W4A16", "W8A16", "MXFP4A16", "NVFP4", "FP8_DYNAMIC", "W8A8"] {
        let Some(folder) = assets::shared(&format!("models/tiny-llama-wiki/{name}")) else { return };
        hold_scores(&folder, &text_windows(&folder, &text, 192, 1));
    }
}
