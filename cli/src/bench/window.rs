//! `ctq bench --window`: windows through a whole model by the engine that `ctq eval` runs, held against what the same
//! work would take at the peak of its instructions.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::bail;
use comfy_table::{CellAlignment, Table, presets};
use ctq_kernels::bench::PeakTiming;
use ctq_kernels::{Backend, Compute};
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::{Acts, Engine, HiddenPlace, Observer, Schedule, Settings, groups};
use serde::Serialize;

use super::memory::watched;
use super::operations::or;
use super::shapes::Model;
use super::synthetic::Synthetic;
use super::work::{Question, Work};
use super::{Spread, go_on};
use crate::bench::options::{BenchActs, BenchCompute, BenchOptions, BenchScheme, ShapeChoice, WeightsPlace};
use crate::interrupt;
use crate::report::Report;

/// Rounds where none are named: a window takes seconds.
const ROUNDS: usize = 3;

/// Windows of one model with one scheme.
#[derive(Debug, Serialize)]
pub(super) struct WindowTiming {
    shape: String,
    scheme: String,
    acts: Acts,
    compute: Compute,
    /// Layers that were run, and those of the whole model.
    layers: usize,
    all_layers: usize,
    /// Windows that ran together, tokens that went through a layer at once, and where the layers were.
    windows: usize,
    batch: usize,
    weights: WeightsPlace,
    /// Tokens of a window, and how many of them are scored.
    context: usize,
    scored: usize,
    /// Packed bytes of a layer.
    layer_bytes: u64,
    /// Of the windows, with all that making layers took.
    #[serde(flatten)]
    seconds: Spread,
    /// Of the round before, in which layers were put where they are and kernels made ready; `null` where there is none.
    loading_seconds: Option<f64>,
    /// Of that, what making layers took, median: no part of any real run. With one thread it is in the way of everything
    /// else, with several it is mostly beside it.
    making_seconds: f64,
    /// Of the windows, without what making its layers took where one thread did both.
    net_seconds: f64,
    /// By `net_seconds`.
    tokens_per_second: f64,
    /// Multiplications and additions of all tokens through all layers that were run, and of the scored ones through the
    /// head. What the engine leaves out because nobody asks for it counts as done.
    operations: f64,
    /// Of the operations at the measured peak of the instructions that they use; `null` without such peaks.
    floor_seconds: Option<f64>,
    /// `floor_seconds` by `net_seconds`.
    share_of_floor: Option<f64>,
    /// Before the first layer: what is loaded and embedded.
    embedding_seconds: f64,
    /// Of one layer: the median of all but the last, of which only scored rows are needed.
    layer_seconds: f64,
    last_layer_seconds: f64,
    /// After the last layer.
    head_seconds: f64,
    /// What all layers would take, net: those that were run, and `layer_seconds` for each of the others.
    all_layers_seconds: f64,
    /// The most that was resident while it ran, in bytes: of memory that is no page of a file, and of all.
    peak_anonymous_bytes: Option<u64>,
    peak_resident_bytes: Option<u64>,
    #[serde(skip)]
    work: Work,
    /// Mean negative log-likelihood, in nats: tells whether two runs have the same bits, and nothing else.
    mean_nll: f64,
}

impl WindowTiming {
    /// Reckons what the same work would take at these peaks.
    pub(super) fn hold_against(&mut self, peaks: &[PeakTiming]) {
        self.floor_seconds = self.work.floor_seconds(peaks);
        self.share_of_floor = self.floor_seconds.map(|floor| floor / self.net_seconds);
    }
}

/// What is run, and how often.
#[derive(Clone, Copy)]
struct Case {
    question: Question,
    batch: usize,
    weights: WeightsPlace,
    rounds: usize,
}

/// Runs every combination that was asked for. Call it inside the thread pool that should do the work.
///
/// # Errors
/// Where the question makes no sense, a run fails, or a signal has come.
pub(super) fn measure<B: Backend>(
    options: &BenchOptions,
    default: ShapeChoice,
    backend: &B,
    report: &Report,
) -> anyhow::Result<Vec<WindowTiming>> {
    let model = Model::of(options.shape.unwrap_or(default));
    if options.scored >= options.ctx {
        bail!(
            "--scored {} of a window of {} tokens: the first token has nothing before it; score at most {}",
            options.scored,
            options.ctx,
            options.ctx - 1
        );
    }
    let mut timings = Vec::new();
    for scheme in or(&options.scheme, &[BenchScheme::W4a16]) {
        for acts in or(&options.acts, &[BenchActs::Off]) {
            if !scheme.has(acts) {
                continue;
            }
            for compute in or(&options.compute, &[BenchCompute::Bf16]) {
                let question = Question {
                    model,
                    scheme,
                    acts,
                    compute: compute.compute(),
                    layers: options.layers.unwrap_or(model.layers).min(model.layers),
                    windows: options.windows,
                    context: options.ctx,
                    scored: options.scored,
                };
                let rounds = options.rounds.unwrap_or(ROUNDS);
                let case = Case { question, batch: options.batch, weights: options.weights, rounds };
                timings.push(case.measure(backend, report)?);
            }
        }
    }
    Ok(timings)
}

/// One round, or one group of windows of it.
struct Round {
    /// Seconds to the first layer, of each layer, and of the head; of several groups their sums.
    embedding: f64,
    layers: Vec<f64>,
    head: f64,
    making: f64,
    scores: Vec<WindowScores>,
}

impl Round {
    fn seconds(&self) -> f64 {
        self.embedding + self.layers.iter().sum::<f64>() + self.head
    }

    /// Both, one after the other.
    fn and(mut self, other: Round) -> Round {
        self.layers.iter_mut().zip(&other.layers).for_each(|(one, other)| *one += other);
        self.scores.extend(other.scores);
        let embedding = self.embedding + other.embedding;
        let (head, making) = (self.head + other.head, self.making + other.making);
        Round { embedding, head, making, ..self }
    }
}

impl Case {
    fn name(&self) -> String {
        let Question { model, scheme, acts, compute, windows, context, .. } = self.question;
        format!(
            "window {} {} acts {} {compute} {windows} x {context}",
            model.name,
            scheme.name(),
            acts.acts()
        )
    }

    fn windows(&self) -> Vec<Window> {
        let Question { model, windows, context, scored, .. } = self.question;
        let window = |index: usize| {
            let id = |at: usize| ((at * 7919 + index * 104_729 + 13) % model.vocabulary) as u32;
            let ids = (0..context).map(id).collect();
            Window { index, start: index * context, ids, scored: context - scored..context }
        };
        (0..windows).map(window).collect()
    }

    /// The engine that runs the model of `source`.
    fn engine<'a, B: Backend>(&self, backend: &'a B, source: &'a Synthetic) -> Engine<'a, B> {
        let settings = Settings { acts: self.question.acts.acts(), compute: self.question.compute };
        let resident_layers = match self.weights {
            WeightsPlace::Nowhere | WeightsPlace::Host => 0,
            WeightsPlace::Device => self.question.layers,
        };
        let schedule = Schedule { batch_tokens: self.batch, hidden: HiddenPlace::Device, resident_layers };
        Engine::new(backend, source, settings).with_schedule(schedule)
    }

    fn measure<B: Backend>(&self, backend: &B, report: &Report) -> anyhow::Result<WindowTiming> {
        let source = Synthetic::new(&self.question.model, self.question.scheme, self.question.layers)?;
        let (source, warms_up) = match self.weights {
            WeightsPlace::Nowhere => (source, false),
            WeightsPlace::Host => (source.keeping_layers(), true),
            WeightsPlace::Device => (source, true),
        };
        let windows = self.windows();
        let engine = self.engine(backend, &source);
        let loading = if warms_up { Some(self.round(&engine, &source, &windows)?.seconds()) } else { None };
        loading
            .into_iter()
            .for_each(|seconds| report.note(&format!("{}: ready, {seconds:.3} s", self.name())));
        let (rounds, memory) = watched(|| {
            let round = |number| {
                let round = self.round(&engine, &source, &windows)?;
                let seconds = round.seconds();
                report.note(&format!("{}: round {number} of {}, {seconds:.3} s", self.name(), self.rounds));
                go_on()?;
                Ok(round)
            };
            (1..=self.rounds).map(round).collect::<anyhow::Result<Vec<Round>>>()
        });
        let mut timing = self.timing(&rounds?, source.layer_bytes());
        timing.loading_seconds = loading;
        timing.peak_anonymous_bytes = memory.anonymous;
        timing.peak_resident_bytes = memory.resident;
        Ok(timing)
    }

    /// All windows: as one group, or where layers stay on the device as groups no larger than a batch, as `ctq eval` cuts
    /// them.
    fn round<B: Backend>(
        &self,
        engine: &Engine<'_, B>,
        source: &Synthetic,
        windows: &[Window],
    ) -> anyhow::Result<Round> {
        let tokens = match self.weights {
            WeightsPlace::Nowhere | WeightsPlace::Host => usize::MAX,
            WeightsPlace::Device => self.batch,
        };
        let lengths: Vec<usize> = windows.iter().map(|window| window.ids.len()).collect();
        let mut groups = groups(&lengths, tokens).into_iter();
        let first = groups.next().unwrap_or(0..0);
        let first = self.group(engine, source, &windows[first])?;
        groups.try_fold(first, |round, group| Ok(round.and(self.group(engine, source, &windows[group])?)))
    }

    fn group<B: Backend>(
        &self,
        engine: &Engine<'_, B>,
        source: &Synthetic,
        windows: &[Window],
    ) -> anyhow::Result<Round> {
        let watch = Watch::default();
        source.take_making();
        let start = Instant::now();
        let scores = engine.score(windows, usize::MAX, None, &watch);
        let end = Instant::now();
        go_on()?;
        let scores = scores?;
        let marks = watch.marks.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut at = start;
        let mut since = |mark: Instant| mark.duration_since(std::mem::replace(&mut at, mark)).as_secs_f64();
        let mut steps: Vec<f64> = marks.into_iter().take(self.question.layers + 1).map(&mut since).collect();
        let head = since(end);
        let embedding = if steps.is_empty() { 0.0 } else { steps.remove(0) };
        let making = source.take_making().as_secs_f64();
        Ok(Round { embedding, layers: steps, head, making, scores })
    }

    fn timing(&self, rounds: &[Round], layer_bytes: u64) -> WindowTiming {
        let Question { model, scheme, acts, compute, layers, windows, context, scored } = self.question;
        let of = |part: &dyn Fn(&Round) -> f64| Spread::of(rounds.iter().map(part).collect()).median;
        let seconds = Spread::of(rounds.iter().map(Round::seconds).collect());
        let making = of(&|round| round.making);
        let one_thread = rayon::current_num_threads() == 1;
        let net = of(&|round| if one_thread { round.seconds() - round.making } else { round.seconds() });
        let layer = of(&|round| {
            let all_but_last = round.layers.len().saturating_sub(1).max(1);
            Spread::of(round.layers.iter().take(all_but_last).copied().collect()).median
        });
        // What making a layer took is in its time.
        let making_of_layer = if one_thread { making / layers as f64 } else { 0.0 };
        let left = (model.layers - layers) as f64;
        let work = Work::of(&self.question);
        let scores = rounds.iter().flat_map(|round| &round.scores);
        let nll: Vec<f64> = scores.flat_map(|scores| scores.nll.iter().copied()).collect();
        WindowTiming {
            shape: model.name.to_owned(),
            scheme: scheme.name().to_owned(),
            acts: acts.acts(),
            compute,
            layers,
            all_layers: model.layers,
            windows,
            batch: self.batch,
            weights: self.weights,
            context,
            scored,
            layer_bytes,
            seconds,
            loading_seconds: None,
            making_seconds: making,
            net_seconds: net,
            tokens_per_second: (windows * context) as f64 / net,
            operations: work.operations(),
            floor_seconds: None,
            share_of_floor: None,
            embedding_seconds: of(&|round| round.embedding),
            layer_seconds: layer,
            last_layer_seconds: of(&|round| round.layers.last().copied().unwrap_or(0.0)),
            head_seconds: of(&|round| round.head),
            all_layers_seconds: net + left * (layer - making_of_layer),
            peak_anonymous_bytes: None,
            peak_resident_bytes: None,
            work,
            mean_nll: nll.iter().sum::<f64>() / nll.len().max(1) as f64,
        }
    }
}

/// Notes when each step is done.
#[derive(Default)]
struct Watch {
    marks: Mutex<Vec<Instant>>,
}

impl Observer for Watch {
    fn advanced(&self, _layers: usize) {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
    }

    fn interrupted(&self) -> bool {
        interrupt::requested()
    }
}

/// One line a combination.
pub(super) fn table(timings: &[WindowTiming]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "shape",
        "scheme",
        "acts",
        "compute",
        "layers",
        "tokens",
        "s",
        "fastest",
        "slowest",
        "making",
        "net s",
        "tok/s",
        "TFLOP",
        "% of floor",
        "s/layer",
        "all layers s",
        "anon MiB",
        "RSS MiB",
    ]);
    let mebibytes =
        |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), |bytes| (bytes >> 20).to_string());
    for timing in timings {
        table.add_row([
            timing.shape.clone(),
            timing.scheme.clone(),
            timing.acts.to_string(),
            timing.compute.to_string(),
            format!("{} of {}", timing.layers, timing.all_layers),
            format!("{} x {}, {} scored", timing.windows, timing.context, timing.scored),
            format!("{:.3}", timing.seconds.median),
            format!("{:.3}", timing.seconds.fastest),
            format!("{:.3}", timing.seconds.slowest),
            format!("{:.3}", timing.making_seconds),
            format!("{:.3}", timing.net_seconds),
            format!("{:.1}", timing.tokens_per_second),
            format!("{:.3}", timing.operations / 1e12),
            timing.share_of_floor.map_or_else(|| "-".to_owned(), |share| format!("{:.1}", share * 100.0)),
            format!("{:.3}", timing.layer_seconds),
            format!("{:.2}", timing.all_layers_seconds),
            mebibytes(timing.peak_anonymous_bytes),
            mebibytes(timing.peak_resident_bytes),
        ]);
    }
    for column in table.column_iter_mut().skip(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
