//! `ctq verify`: which checks apply to what was given, and how their outcome is shown. The checks themselves are those
//! of `ctq-verify` and `ctq-convert`.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use ctq_container::{Container, LayerSource};
use ctq_convert::{RestoredSource, RoundTrip, check_round_trip};
use ctq_kernels::{Backend, Compute};
use ctq_model::inventory::{Inventory, Part};
use ctq_model::{Checkpoint, TensorSource};
use ctq_reference::Reference;
use ctq_runtime::{Acts, Engine, Settings};
use ctq_verify::{
    ArithmeticReport, Mode, OperandReport, Plan, bounds, check_arithmetic, check_operands, token_ids,
};
use serde::Serialize;

use crate::args::{ModelOptions, VerifyOptions};
use crate::device::{OnBackend, Opened};
use crate::exit::Verdict;
use crate::open::Model;
use crate::progress::{Progress, Unit};
use crate::report::{self, Report};
use crate::{interrupt, machine};

/// Outcome of one verification: a stable object.
#[derive(Debug, Serialize)]
pub(crate) struct Verification {
    verification_version: u32,
    path: String,
    /// What the runtime was held against.
    against: String,
    round_trip: Option<RoundTripRecord>,
    /// None where the two are not the same model.
    operands: Option<OperandReport>,
    arithmetic: Vec<ArithmeticReport>,
    /// What was not checked, and why.
    not_checked: Vec<String>,
    pub(crate) passed: bool,
}

#[derive(Debug, Serialize)]
struct RoundTripRecord {
    tensors: usize,
    bytes: u64,
    mismatches: Vec<String>,
}

/// What to check.
struct Checks<'a> {
    /// Checkpoint to hold it against; `None`: the one it was made from.
    against: Option<&'a Path>,
    /// Tokens of the forward pass.
    tokens: usize,
    /// Layers, ascending; `None`: all.
    layers: Option<&'a [usize]>,
    arithmetic: Arithmetic,
}

/// Whether a forward pass is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arithmetic {
    Run,
    Skip,
}

pub(crate) fn run(options: &VerifyOptions, report: &Report) -> anyhow::Result<Verdict> {
    let model = Model::open(&options.path, &options.model)?;
    let pool = machine::pool(options.threads)?;
    let device = Opened::open(options.device, None, report)?;
    let mut layers = options.layers.clone();
    layers.sort_unstable();
    let checks = Checks {
        against: options.against.as_deref(),
        tokens: options.tokens,
        layers: (!layers.is_empty()).then_some(layers.as_slice()),
        arithmetic: if options.bits_only { Arithmetic::Skip } else { Arithmetic::Run },
    };
    let started = Instant::now();
    let verification = pool.install(|| verify(&model, &device, &checks, &options.model, report))?;
    report.detail(&format!("verified in {:.1} s", started.elapsed().as_secs_f64()));
    if options.json {
        report::result(&serde_json::to_string_pretty(&verification)?)?;
    } else {
        report::result(&text(&verification))?;
    }
    Ok(if verification.passed { Verdict::Good } else { Verdict::Failed })
}

/// Where the reference reads from.
enum Oracle<'a> {
    Borrowed(&'a Checkpoint),
    Opened(Box<Checkpoint>),
    Restored(Box<RestoredSource>),
}

impl Oracle<'_> {
    fn source(&self) -> &dyn TensorSource {
        match self {
            Oracle::Borrowed(checkpoint) => *checkpoint,
            Oracle::Opened(checkpoint) => checkpoint.as_ref(),
            Oracle::Restored(restored) => restored.as_ref(),
        }
    }
}

/// The tensors to hold a model against, what to call them, and what that leaves unchecked.
fn oracle<'a>(model: &'a Model, against: Option<&Path>) -> anyhow::Result<(Oracle<'a>, String, Vec<String>)> {
    if let Some(path) = against {
        let checkpoint = Checkpoint::open(path)?;
        return Ok((Oracle::Opened(Box::new(checkpoint)), path.display().to_string(), Vec::new()));
    }
    if let Some(checkpoint) = model.checkpoint() {
        return Ok((Oracle::Borrowed(checkpoint), format!("{} itself", model.path.display()), Vec::new()));
    }
    let container = model.container().context("a model is a container or a checkpoint")?;
    let recorded = &container.manifest().source;
    match recorded_source(container) {
        Some(checkpoint) => {
            Ok((Oracle::Opened(Box::new(checkpoint)), recorded.path.display().to_string(), Vec::new()))
        }
        None => {
            let restored = Box::new(RestoredSource::new(container.clone())?);
            let missing = format!(
                "the unpacking of the original: its source {} is gone or has changed, so that only the arithmetic can be checked, on tensors regenerated from the container; give --against CHECKPOINT to check all",
                recorded.path.display()
            );
            Ok((
                Oracle::Restored(restored),
                "tensors regenerated from the container".to_owned(),
                vec![missing],
            ))
        }
    }
}

/// The checkpoint a container was made from, where it is still there and still the same.
fn recorded_source(container: &Container) -> Option<Checkpoint> {
    let recorded = &container.manifest().source;
    let checkpoint = Checkpoint::open(&recorded.path).ok()?;
    let record = ctq_convert::source_record(&checkpoint).ok()?;
    (record.fingerprint == recorded.fingerprint).then_some(checkpoint)
}

fn verify(
    model: &Model,
    device: &Opened,
    checks: &Checks<'_>,
    options: &ModelOptions,
    report: &Report,
) -> anyhow::Result<Verification> {
    let (oracle, against, mut not_checked) = oracle(model, checks.against)?;
    let source = oracle.source();
    // The reference reads the source's own configuration: a container cannot talk it into another model.
    let inventory = Inventory::read(source, &options.accept_config_key)?;
    let last = inventory.spec.blocks.len().saturating_sub(1);
    if let Some(layer) = checks.layers.and_then(|layers| layers.iter().copied().find(|layer| *layer > last)) {
        return Err(ctq_verify::Error::NoSuchLayer { layer, last }.into());
    }
    let reference = Reference::open(source, &inventory)?;
    let round_trip = match model.container() {
        None => {
            not_checked.push("a round trip: this is a checkpoint, there is no container".to_owned());
            None
        }
        Some(container) => {
            let original = match &oracle {
                Oracle::Restored(_) => None,
                Oracle::Borrowed(_) | Oracle::Opened(_) => Some(source),
            };
            report.detail("checking the round trip");
            Some(round_trip_record(&check_round_trip(container, original)?))
        }
    };
    let mut verification = Verification {
        verification_version: 1,
        path: model.path.display().to_string(),
        against,
        round_trip,
        operands: None,
        arithmetic: Vec::new(),
        not_checked,
        passed: false,
    };
    if let Some(difference) = different_models(model.source().inventory(), &inventory) {
        let what = format!("weights and arithmetic: these are not the same model: {difference}");
        verification.not_checked.push(what);
        return Ok(verification);
    }
    let sides =
        Sides { runtime: model.source(), device, reference: &reference, inventory: &inventory, report };
    let operands = sides.operands(checks.layers)?;
    match checks.arithmetic {
        Arithmetic::Run => verification.arithmetic = sides.arithmetic(checks)?,
        Arithmetic::Skip => verification.not_checked.push("the arithmetic: --bits-only".to_owned()),
    }
    verification.passed = operands.passed()
        && verification.round_trip.as_ref().is_none_or(|round_trip| round_trip.mismatches.is_empty())
        && verification.arithmetic.iter().all(ArithmeticReport::passed);
    verification.operands = Some(operands);
    Ok(verification)
}

/// Runtime and reference of one model.
struct Sides<'a> {
    runtime: &'a dyn LayerSource,
    device: &'a Opened,
    reference: &'a Reference<'a>,
    inventory: &'a Inventory,
    report: &'a Report,
}

impl Sides<'_> {
    /// Weights of embedding, head and the chosen layers, bit for bit.
    fn operands(&self, layers: Option<&[usize]>) -> anyhow::Result<OperandReport> {
        let parts = parts(self.inventory, layers);
        let matrices: usize = parts.iter().map(|part| self.inventory.part(*part).linears.len()).sum();
        Ok(self.device.on(Operands { sides: self, parts: &parts, matrices })?)
    }

    /// Each step without quantized activations, and with them where the checkpoint quantizes any.
    fn arithmetic(&self, checks: &Checks<'_>) -> anyhow::Result<Vec<ArithmeticReport>> {
        let spec = &self.inventory.spec;
        let mut modes = vec![(Mode::Off, Acts::Off)];
        if self.inventory.quantizes_activations() {
            modes.push((Mode::Library, Acts::Library));
        }
        let plan =
            Plan { ids: token_ids(checks.tokens, spec.vocab), layers: checks.layers.map(<[usize]>::to_vec) };
        // Embedding, layers, head.
        let steps = plan.layers.as_ref().map_or(spec.blocks.len(), Vec::len) + 2;
        let one = |(mode, acts)| Ok(self.device.on(Steps { sides: self, plan: &plan, steps, mode, acts })?);
        modes.into_iter().map(one).collect()
    }

    fn engine<'b, B: Backend>(&'b self, backend: &'b B, acts: Acts) -> Engine<'b, B> {
        Engine::new(backend, self.runtime, Settings { acts, compute: Compute::F32 })
    }

    /// A check under a progress bar. It calls what it is given after each step, and stops where that says false.
    fn watched<T>(
        &self,
        what: &str,
        steps: usize,
        check: impl FnOnce(&mut dyn FnMut() -> bool) -> ctq_verify::Result<T>,
    ) -> ctq_verify::Result<T> {
        let progress = Progress::new(self.report, what, Unit::Steps, steps as u64);
        let mut done = 0;
        let result = check(&mut || {
            done += 1;
            progress.at(done);
            !interrupt::requested()
        });
        progress.finish();
        result
    }
}

/// The weights of some parts, on a backend.
struct Operands<'a> {
    sides: &'a Sides<'a>,
    parts: &'a [Part],
    matrices: usize,
}

impl OnBackend for Operands<'_> {
    type Output = ctq_verify::Result<OperandReport>;

    fn run<B: Backend>(self, backend: &B) -> Self::Output {
        let Operands { sides, parts, matrices } = self;
        let engine = sides.engine(backend, Acts::Off);
        sides.watched("weights", matrices, |advance| {
            check_operands(&engine, sides.reference, sides.inventory, parts, advance)
        })
    }
}

/// The steps of a model in one mode, on a backend.
struct Steps<'a> {
    sides: &'a Sides<'a>,
    plan: &'a Plan,
    steps: usize,
    mode: Mode,
    acts: Acts,
}

impl OnBackend for Steps<'_> {
    type Output = ctq_verify::Result<ArithmeticReport>;

    fn run<B: Backend>(self, backend: &B) -> Self::Output {
        let Steps { sides, plan, steps, mode, acts } = self;
        let engine = sides.engine(backend, acts);
        sides.watched("layers", steps, |advance| {
            check_arithmetic(&engine, sides.reference, &sides.inventory.spec, plan, mode, advance)
        })
    }
}

/// The first matrix that only one of two models has, or that has other sides: nothing can be compared then.
fn different_models(found: &Inventory, expected: &Inventory) -> Option<String> {
    let matrices = |inventory: &Inventory| -> Vec<(String, [usize; 2])> {
        inventory.linears().map(|linear| (linear.module.clone(), [linear.n, linear.k])).collect()
    };
    let (found, expected) = (matrices(found), matrices(expected));
    let tell = |matrix: Option<&(String, [usize; 2])>| {
        matrix.map_or_else(|| "nothing more".to_owned(), |(module, sides)| format!("`{module}` {sides:?}"))
    };
    (0..found.len().max(expected.len()))
        .find(|at| found.get(*at) != expected.get(*at))
        .map(|at| format!("{} where {} is expected", tell(found.get(at)), tell(expected.get(at))))
}

fn round_trip_record(round_trip: &RoundTrip) -> RoundTripRecord {
    RoundTripRecord {
        tensors: round_trip.tensors,
        bytes: round_trip.bytes,
        mismatches: round_trip.mismatches.iter().map(|m| format!("{}: {}", m.tensor, m.what)).collect(),
    }
}

/// Embedding, head and the chosen layers.
fn parts(inventory: &Inventory, layers: Option<&[usize]>) -> Vec<Part> {
    let wanted = |part: &Part| match part {
        Part::Embedding | Part::Head => true,
        Part::Layer(index) => layers.is_none_or(|layers| layers.contains(index)),
    };
    inventory.parts().map(|(part, _)| part).filter(wanted).collect()
}

fn text(verification: &Verification) -> String {
    let verdict = |passed: bool| if passed { "ok" } else { "FAILED" };
    let mut lines = vec![format!("{} against {}", verification.path, verification.against)];
    if let Some(round_trip) = &verification.round_trip {
        lines.push(format!(
            "  round trip   {}: {} tensors, {} bytes, {} differ",
            verdict(round_trip.mismatches.is_empty()),
            round_trip.tensors,
            round_trip.bytes,
            round_trip.mismatches.len()
        ));
        lines.extend(round_trip.mismatches.iter().take(5).map(|mismatch| format!("    {mismatch}")));
    }
    if let Some(operands) = &verification.operands {
        lines.push(format!(
            "  weights      {}: {} matrices, {} weights, {} differ",
            verdict(operands.passed()),
            operands.matrices,
            operands.weights,
            operands.differing
        ));
        if let Some(first) = &operands.first {
            lines.push(format!(
                "    first: `{}` row {} k {}: runtime {:e}, reference {:e}",
                first.module, first.row, first.k, first.runtime, first.reference
            ));
        }
    }
    for arithmetic in &verification.arithmetic {
        lines.push(String::new());
        lines.extend(arithmetic_text(arithmetic));
    }
    lines.push(String::new());
    lines.extend(verification.not_checked.iter().map(|what| format!("not checked: {what}")));
    lines.push(format!("verdict: {}", if verification.passed { "PASSED" } else { "FAILED" }));
    lines.join("\n")
}

fn arithmetic_text(report: &ArithmeticReport) -> Vec<String> {
    let (title, bound) = match report.mode {
        Mode::Off => ("acts off", format!("relative error at most {:.0e}", bounds::LAYER)),
        Mode::Library => ("acts library", format!("median error at most {:.0e}", bounds::LAYER_MEDIAN)),
    };
    let mut lines = vec![format!("  {title}, each step from the reference's hidden state, {bound}:")];
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["    step", "relative", "median", "1 - cosine", "largest", "verdict"]);
    for step in &report.steps {
        table.add_row([
            format!("    {}", step.name),
            format!("{:.1e}", step.relative_error),
            format!("{:.1e}", step.median_error),
            format!("{:.1e}", 1.0 - step.cosine),
            format!("{:.1e}", step.largest_difference),
            if step.passed { "ok".to_owned() } else { "FAILED".to_owned() },
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    lines.push(table.to_string());
    if let Some(free) = &report.free {
        lines.push(format!(
            "    free-running logits: relative {:.1e}, KLD {:.1e}, top-1 agreement {:.1} %, nll difference {:+.1e}{}",
            free.relative_error,
            free.kl_divergence,
            free.top1_agreement * 100.0,
            free.nll_difference,
            match (report.mode, free.passed) {
                (Mode::Off, true) => ": ok",
                (Mode::Library, true) => " (for information)",
                (Mode::Off | Mode::Library, false) => ": FAILED",
            }
        ));
    }
    if let Some(first) = report.first_failure() {
        lines.push(format!("    first out of bounds: {}", first.name));
    }
    lines
}

/// Used by the demo: the bundled container verified in full.
pub(crate) fn verify_path(path: &Path, against: &Path, report: &Report) -> anyhow::Result<Verification> {
    let options = ModelOptions::default();
    let model = Model::open(path, &options)?;
    let checks = Checks { against: Some(against), tokens: 64, layers: None, arithmetic: Arithmetic::Run };
    verify(&model, &Opened::cpu(), &checks, &options, report)
}
