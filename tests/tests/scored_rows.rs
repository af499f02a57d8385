//! Only the rows that predict a scored position leave the last layer. A score must be that of a run in which all rows do:
//! bit for bit that of the same position where everything is scored, and the log-likelihood in the logits, which are made
//! of all rows.

use std::num::NonZero;
use std::ops::Range;
use std::sync::Mutex;

use ctq_container::LayerSource;
use ctq_kernels::collective::team;
use ctq_kernels::cpu::Cpu;
use ctq_kernels::{Backend, Compute};
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::{Acts, Engine, Error, HiddenPlace, Observer, Schedule, Settings, Snapshot};
use ctq_tests::{assets, models};

/// Lengths of windows around tiles of 64 keys, and what is scored of each: an end, a middle, one position, everything.
const WINDOWS: [(usize, Range<usize>); 5] =
    [(97, 80..97), (66, 20..41), (130, 129..130), (2, 1..2), (65, 1..65)];

/// Windows of the same random tokens, scored as `scored` says of each window.
fn windows(vocabulary: usize, scored: impl Fn(usize, &Range<usize>) -> Range<usize>) -> Vec<Window> {
    let mut state = 11_u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % vocabulary as u32
    };
    let window = |(index, (length, range)): (usize, &(usize, Range<usize>))| {
        let ids = (0..*length).map(|_| token()).collect();
        Window { index, start: 1000 * index, ids, scored: scored(*length, range) }
    };
    WINDOWS.iter().enumerate().map(window).collect()
}

fn some(vocabulary: usize) -> Vec<Window> {
    windows(vocabulary, |_, range| range.clone())
}

fn score<B: Backend>(
    backend: &B,
    source: &dyn LayerSource,
    settings: Settings,
    windows: &[Window],
) -> Vec<u64> {
    let scores = Engine::new(backend, source, settings).score(windows, usize::MAX, None, &());
    bits(&scores.expect("scores"))
}

fn bits(scores: &[WindowScores]) -> Vec<u64> {
    scores.iter().flat_map(|scores| &scores.nll).map(|nll| nll.to_bits()).collect()
}

/// The scores of `some` among those of a run that scores everything.
fn of_everything(source: &dyn LayerSource, settings: Settings, some: &[Window]) -> Vec<u64> {
    let everything = windows(source.inventory().spec.vocab, |length, _| 1..length);
    let scores = Engine::new(&Cpu::detect(), source, settings).score(&everything, usize::MAX, None, &());
    let scores = scores.expect("scores");
    let part = |(scores, window): (&WindowScores, &Window)| {
        scores.nll[window.scored.start - 1..window.scored.end - 1].to_vec()
    };
    scores.iter().zip(some).flat_map(part).map(|nll: f64| nll.to_bits()).collect()
}

/// Log-likelihoods of the scored positions, from the logits of all rows, in f64.
fn of_logits(source: &dyn LayerSource, settings: Settings, some: &[Window]) -> Vec<f64> {
    let mut all = Vec::new();
    for window in some {
        let logits = models::logits(source, std::slice::from_ref(&window.ids), settings).expect("logits");
        let rows: Vec<&[f32]> = logits.chunks_exact(source.inventory().spec.vocab).collect();
        for position in window.scored.clone() {
            let row: Vec<f64> = rows[position - 1].iter().copied().map(f64::from).collect();
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|logit| (logit - largest).exp()).sum();
            all.push(largest + sum.ln() - row[window.ids[position] as usize]);
        }
    }
    all
}

/// Of every kind of layer: dense and experts, whole and sliding windows, quantized keys and values, inputs quantized by
/// stored scales, by token and by group.
const CHECKPOINTS: [&str; 7] = [
    "bundled/bf16",
    "bundled/FP8",
    "families/mixtral-sliding",
    "families/qwen3moe-nvfp4",
    "families/llama-kv-fp8",
    "families/llama-w4a8",
    "bundled/W4A16",
];

fn settings(source: &dyn LayerSource) -> Vec<Settings> {
    let acts: &[Acts] = match source.inventory().quantizes_activations() {
        true => &[Acts::Library, Acts::Kernel],
        false => &[Acts::Off],
    };
    acts.iter().flat_map(|acts| [Compute::F32, Compute::Bf16].map(|it| models::settings(*acts, it))).collect()
}

#[test]
fn some_scores_are_those_among_all() {
    for name in CHECKPOINTS {
        let source = models::on_the_fly(&assets::golden(name));
        let some = some(source.inventory().spec.vocab);
        for settings in settings(&source) {
            let expected = of_everything(&source, settings, &some);
            assert!(score(&Cpu::detect(), &source, settings, &some) == expected, "{name}, {settings:?}");
        }
    }
}

#[test]
fn scores_are_those_of_the_logits_of_all_rows() {
    for name in CHECKPOINTS {
        let source = models::on_the_fly(&assets::golden(name));
        let some = some(source.inventory().spec.vocab);
        let settings = settings(&source)[0];
        let found = score(&Cpu::detect(), &source, settings, &some);
        let expected = of_logits(&source, settings, &some);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.into_iter().map(f64::from_bits).zip(expected) {
            // A tile's exponentials are of f32 arguments.
            assert!((found - expected).abs() < 1e-6, "{name}: {found} and {expected}");
        }
    }
}

#[test]
fn ranks_and_schedules_make_no_difference() {
    for name in ["bundled/W4A16", "families/mixtral-sliding", "families/llama-kv-fp8"] {
        let source = models::on_the_fly(&assets::golden(name));
        let some = some(source.inventory().spec.vocab);
        let settings = settings(&source)[0];
        let expected = of_everything(&source, settings, &some);
        let ranks = team::in_process(vec![Cpu::detect(); 3]);
        let found = team::run(&ranks, NonZero::<usize>::MIN, |rank| {
            Ok::<_, Error>(score(rank, &source, settings, &some))
        });
        for found in found {
            assert!(found.expect("scores") == expected, "{name} on 3 ranks");
        }
        let cpu = Cpu::detect();
        for hidden in [HiddenPlace::Host, HiddenPlace::Device] {
            let schedule = Schedule { batch_tokens: 200, hidden, resident_layers: 0 };
            let engine = Engine::new(&cpu, &source, settings).with_schedule(schedule);
            let found = engine.score(&some, usize::MAX, None, &()).expect("scores");
            assert!(bits(&found) == expected, "{name}, {schedule:?}");
        }
    }
}

/// Keeps the last snapshot of a run.
#[derive(Default)]
struct Last(Mutex<Option<Snapshot>>);

impl Observer for Last {
    fn wants_snapshot(&self) -> bool {
        true
    }

    fn snapshot(&self, snapshot: Snapshot) -> Result<(), Error> {
        *self.0.lock().expect("one thread at a time") = Some(snapshot);
        Ok(())
    }
}

/// Rows that leave the last layer of a run.
fn rows_left(source: &dyn LayerSource, settings: Settings, windows: &[Window]) -> usize {
    let last = Last::default();
    let cpu = Cpu::detect();
    Engine::new(&cpu, source, settings).score(windows, usize::MAX, None, &last).expect("scores");
    let snapshot = last.0.into_inner().expect("a lock").expect("a snapshot");
    assert_eq!(snapshot.layer, source.inventory().spec.blocks.len());
    snapshot.hidden.len() / source.inventory().spec.hidden
}

/// One scale of all tokens of a window, found from the data, is that of all rows, whichever are scored.
#[test]
fn all_rows_leave_where_they_share_a_scale() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let source = models::on_the_fly(&models::dynamic_per_tensor(parent.path()));
    let some = some(source.inventory().spec.vocab);
    let all: usize = WINDOWS.iter().map(|(length, _)| length).sum();
    let scored: usize = WINDOWS.iter().map(|(_, scored)| scored.len()).sum();
    for compute in [Compute::F32, Compute::Bf16] {
        for (acts, rows) in [(Acts::Off, scored), (Acts::Library, all), (Acts::Kernel, all)] {
            let settings = models::settings(acts, compute);
            assert_eq!(rows_left(&source, settings, &some), rows, "{settings:?}");
            let expected = of_everything(&source, settings, &some);
            assert!(score(&Cpu::detect(), &source, settings, &some) == expected, "{settings:?}");
        }
    }
}
