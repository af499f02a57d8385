//! `ctq bench`: every operation of a model by itself. Which are measured, in which order, and how they are told.

use comfy_table::{CellAlignment, Table, presets};
use ctq_kernels::bench::{self, Effort, LinearCase, PeakTiming, Prepared, Timing, Weights};
use ctq_kernels::cpu::peak::{Arithmetic, Instruction};
use ctq_kernels::{AttentionShape, Backend, Compute, KernelError, Rotation};
use ctq_model::rope::{Rope, RopeScaling};
use serde::Serialize;

use super::shapes::Model;
use super::{ROUNDS, go_on};
use crate::bench::options::{
    BenchActs, BenchCompute, BenchOperation, BenchOptions, BenchScheme, HeadsChoice, ShapeChoice,
};
use crate::report::Report;

/// Least seconds of one round.
const SECONDS: f64 = 0.05;

/// Rows of the head that a window asks for: its scored positions.
const SCORED: usize = 512;

/// A measured operation beside the most that the machine could do.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    #[serde(flatten)]
    timing: Timing,
    /// The instruction that its arithmetic uses, on a CPU.
    instruction: Option<Instruction>,
    /// Its operations a second by those of the instruction alone.
    share_of_peak: Option<f64>,
}

impl Row {
    /// A timing beside its instruction's peak.
    pub(super) fn new(timing: Timing, peaks: &[PeakTiming]) -> Row {
        let peak = timing.arithmetic.and_then(|arithmetic| peak_of(peaks, arithmetic));
        Row {
            instruction: peak.map(|peak| peak.instruction),
            share_of_peak: peak.map(|peak| timing.operations / timing.seconds / peak.operations_per_second),
            timing,
        }
    }
}

/// The measured peak of the instruction that an arithmetic uses.
pub(super) fn peak_of(peaks: &[PeakTiming], arithmetic: Arithmetic) -> Option<&PeakTiming> {
    peaks.iter().find(|peak| peak.instruction == Instruction::fastest(arithmetic))
}

/// What is measured.
pub(super) struct Choices<'a> {
    model: Model,
    /// Of attention.
    heads: AttentionShape,
    /// Tokens of the windows that attention sees.
    context: usize,
    schemes: Vec<BenchScheme>,
    acts: Vec<BenchActs>,
    compute: Vec<BenchCompute>,
    only: Vec<BenchOperation>,
    rows: usize,
    effort: Effort,
    /// Times the decoding of weights to operands, where that is what a device does to them.
    operands: Option<&'a Operands<'a>>,
}

/// Times the decoding of an `n` x `k` matrix of these weights.
pub(super) type Operands<'a> =
    dyn Fn(Weights, (usize, usize), Effort) -> Result<Timing, KernelError> + Sync + 'a;

impl<'a> Choices<'a> {
    /// What was asked for, and on a CPU everything else.
    pub(super) fn on_cpu(options: &BenchOptions) -> Choices<'a> {
        use BenchOperation::{Attention, Decode, Elementwise, Head, Linear};
        let model = Model::of(options.shape.unwrap_or(ShapeChoice::Llama1b));
        Choices {
            heads: heads(options, &model),
            context: options.ctx,
            operands: None,
            model,
            schemes: or(&options.scheme, &BenchScheme::ALL),
            acts: or(&options.acts, &[BenchActs::Off, BenchActs::Kernel]),
            compute: or(&options.compute, &[BenchCompute::Bf16, BenchCompute::F32]),
            only: or(&options.only, &[Linear, Head, Attention, Decode, Elementwise]),
            rows: options.rows.unwrap_or(2048),
            effort: Effort { rounds: options.rounds.unwrap_or(ROUNDS), seconds: SECONDS },
        }
    }

    /// What was asked for, and on a GPU what a window is mostly made of.
    pub(super) fn on_gpu(options: &BenchOptions, operands: &'a Operands<'a>) -> Choices<'a> {
        use BenchOperation::{Attention, Decode, Linear};
        use BenchScheme::{Bf16, Fp8, Nvfp4, W4a16};
        let model = Model::of(options.shape.unwrap_or(ShapeChoice::Llama8b));
        Choices {
            heads: heads(options, &model),
            operands: Some(operands),
            model,
            schemes: or(&options.scheme, &[Bf16, W4a16, Nvfp4, Fp8]),
            acts: or(&options.acts, &[BenchActs::Off]),
            compute: or(&options.compute, &[BenchCompute::Bf16]),
            only: or(&options.only, &[Linear, Attention, Decode]),
            rows: options.rows.unwrap_or(8192),
            ..Choices::on_cpu(options)
        }
    }

    /// Measures one after the other and tells of each. Call it inside the thread pool that should do the work.
    ///
    /// # Errors
    /// Where an operation fails, or a signal has come.
    pub(super) fn measure<B: Backend>(&self, backend: &B, report: &Report) -> anyhow::Result<Vec<Timing>> {
        let mut timings = Vec::new();
        let mut keep = |timing: Timing| {
            report.note(&line(&timing));
            timings.push(timing);
            go_on()
        };
        for operation in &self.only {
            match operation {
                BenchOperation::Linear => self.linears(backend, &mut keep)?,
                BenchOperation::Head => self.head(backend, &mut keep)?,
                BenchOperation::Attention => self.attention(backend, &mut keep)?,
                BenchOperation::Decode => self.decode(backend, &mut keep)?,
                BenchOperation::Elementwise => self.elementwise(backend, &mut keep)?,
            }
        }
        Ok(timings)
    }

    fn computes(&self) -> impl Iterator<Item = Compute> {
        self.compute.iter().map(|compute| compute.compute())
    }

    /// Each scheme's products: of values in each precision, and of codes once.
    fn linears<B: Backend>(&self, backend: &B, keep: Keep<'_>) -> anyhow::Result<()> {
        let mut done: Vec<LinearCase> = Vec::new();
        for scheme in &self.schemes {
            for acts in self.acts.iter().filter(|acts| scheme.has(**acts)) {
                // Values that were quantized and dequantized are multiplied as others are.
                let inputs = match acts {
                    BenchActs::Off | BenchActs::Library => None,
                    BenchActs::Kernel => scheme.inputs(),
                };
                let computes = if inputs.is_some() { 1 } else { self.compute.len() };
                for compute in self.computes().take(computes) {
                    for (part, (n, k)) in self.model.linears() {
                        let case =
                            LinearCase { weights: scheme.weights(), inputs, compute, m: self.rows, n, k };
                        if !done.contains(&case) {
                            done.push(case);
                            keep(Timing {
                                part: part.to_owned(),
                                ..bench::linear(backend, &case, self.effort)?
                            })?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn head<B: Backend>(&self, backend: &B, keep: Keep<'_>) -> anyhow::Result<()> {
        let (n, k) = (self.model.vocabulary, self.model.hidden);
        for compute in self.computes() {
            let m = self.rows.min(SCORED);
            let case = LinearCase { weights: Weights::Bf16, inputs: None, compute, m, n, k };
            keep(bench::head(backend, &case, self.effort)?)?;
        }
        Ok(())
    }

    fn attention<B: Backend>(&self, backend: &B, keep: Keep<'_>) -> anyhow::Result<()> {
        let length = self.rows.min(self.context);
        for compute in self.computes() {
            let windows = (self.rows / length, length);
            keep(bench::attention(backend, &self.heads, windows, compute, self.effort)?)?;
        }
        Ok(())
    }

    fn decode<B: Backend>(&self, backend: &B, keep: Keep<'_>) -> anyhow::Result<()> {
        let [.., (part, shape)] = self.model.linears();
        let mut done: Vec<Weights> = Vec::new();
        for weights in self.schemes.iter().map(|scheme| scheme.weights()) {
            if !done.contains(&weights) {
                done.push(weights);
                let timing = match self.operands {
                    Some(operands) => operands(weights, shape, self.effort)?,
                    None => bench::decode(backend, weights, shape, self.effort)?,
                };
                keep(Timing { part: part.to_owned(), ..timing })?;
            }
        }
        Ok(())
    }

    fn elementwise<B: Backend>(&self, backend: &B, keep: Keep<'_>) -> anyhow::Result<()> {
        let (model, effort) = (&self.model, self.effort);
        let hidden = (self.rows, model.hidden);
        keep(bench::norm(backend, hidden, effort)?)?;
        keep(bench::gate(backend, (self.rows, model.inner), effort)?)?;
        keep(bench::add(backend, hidden, effort)?)?;
        let rope = Rope { theta: model.rope_theta, scaling: RopeScaling::Default };
        let rotation = Rotation::new(&rope, model.head_dim, self.rows);
        keep(bench::rotate(backend, &model.attention(), &rotation, self.rows, effort)?)?;
        for compute in self.computes() {
            keep(bench::prepare(backend, Prepared::Plain, compute, hidden, effort)?)?;
        }
        let Some(compute) = self.computes().next() else { return Ok(()) };
        let mut done = Vec::new();
        for activation in self.schemes.iter().filter_map(|scheme| scheme.inputs()) {
            if done.contains(&activation) {
                continue;
            }
            done.push(activation);
            for prepared in [Prepared::FakeQuantized(activation), Prepared::Exact(activation)] {
                keep(bench::prepare(backend, prepared, compute, hidden, effort)?)?;
            }
        }
        Ok(())
    }
}

/// The heads that were asked for, or the model's.
fn heads(options: &BenchOptions, model: &Model) -> AttentionShape {
    match options.heads {
        Some(HeadsChoice { queries, keys, dimensions }) => {
            AttentionShape { heads: queries, kv_heads: keys, head_dim: dimensions, window: None }
        }
        None => model.attention(),
    }
}

/// Takes a measurement; fails where a signal has come.
type Keep<'a> = &'a mut dyn FnMut(Timing) -> anyhow::Result<()>;

/// What was asked for, or else all of `default`.
pub(super) fn or<T: Copy>(asked: &[T], default: &[T]) -> Vec<T> {
    if asked.is_empty() { default.to_vec() } else { asked.to_vec() }
}

fn line(timing: &Timing) -> String {
    let Timing { operation, what, part, m, n, k, compute, seconds, operations, bytes, .. } = timing;
    let part = if part.is_empty() { String::new() } else { format!(" {part}") };
    let rate = if *operations > 0.0 {
        format!("{:.1} G/s", operations / seconds / 1e9)
    } else {
        format!("{:.1} GB/s", bytes / seconds / 1e9)
    };
    format!("{operation} {what}{part} {compute} {m} x {n} x {k}: {:.3} ms, {rate}", seconds * 1e3)
}

/// All of it, one line an operation.
pub(super) fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "operation",
        "what",
        "part",
        "acts",
        "compute",
        "m",
        "n",
        "k",
        "ms",
        "fastest",
        "slowest",
        "GB/s",
        "Gop/s",
        "% of peak",
        "instruction",
    ]);
    let milliseconds = |seconds: f64| format!("{:.3}", seconds * 1e3);
    for Row { timing, instruction, share_of_peak } in rows {
        let operations = timing.operations / timing.seconds / 1e9;
        table.add_row([
            timing.operation.clone(),
            timing.what.clone(),
            timing.part.clone(),
            timing.acts.clone(),
            timing.compute.to_string(),
            timing.m.to_string(),
            timing.n.to_string(),
            timing.k.to_string(),
            milliseconds(timing.seconds),
            milliseconds(timing.fastest_seconds),
            milliseconds(timing.slowest_seconds),
            format!("{:.1}", timing.bytes / timing.seconds / 1e9),
            if timing.operations > 0.0 { format!("{operations:.1}") } else { String::new() },
            share_of_peak.map(|share| format!("{:.1}", share * 100.0)).unwrap_or_default(),
            instruction.map(|instruction| instruction.name().to_owned()).unwrap_or_default(),
        ]);
    }
    for column in table.column_iter_mut().skip(5).take(9) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
