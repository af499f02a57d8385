//! `ctq bench`: how fast this machine is. Which kind of measurement was asked for, and what comes of it as text and as
//! JSON; the kinds are in files of their own.

mod collective;
mod convert;
mod mapped;
mod memory;
mod operations;
pub(crate) mod options;
mod shapes;
mod synthetic;
mod window;
mod work;

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use ctq_kernels::Backend;
use ctq_kernels::bench::{self, CollectiveTiming, PeakRounds, PeakTiming};
use ctq_kernels::cpu::Isa;
use serde::Serialize;

use self::convert::ConvertTiming;
use self::operations::{Choices, Operands, Row};
use self::window::WindowTiming;
use crate::bench::options::{BenchOptions, ShapeChoice};
use crate::device::{OnBackend, Opened};
use crate::exit::Verdict;
use crate::party::Party;
use crate::report::{self, Report};
use crate::{eval, interrupt, machine};

/// What is written as JSON: a stable object. What was not asked for is empty.
#[derive(Debug, Default, Serialize)]
struct Measurements {
    bench_version: u32,
    backend: String,
    isa: String,
    /// Workers on the CPU.
    threads: usize,
    /// What the threads do at most, on a CPU.
    peaks: Vec<PeakTiming>,
    timings: Vec<Row>,
    windows: Vec<WindowTiming>,
    convert: Option<ConvertTiming>,
    /// The ranks of `collectives`, where these were asked for.
    team: Option<Team>,
    collectives: Vec<CollectiveTiming>,
}

/// Version of the JSON object.
const VERSION: u32 = 2;

/// Ranks that hand one another things.
#[derive(Debug, Serialize)]
struct Team {
    ranks: usize,
    /// Devices that they share.
    devices: usize,
    /// Workers of each on the CPU.
    threads: usize,
    /// What `floor_seconds` are.
    floor: String,
}

/// Seconds of several rounds: the median, the least and the most.
#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    #[serde(rename = "seconds")]
    median: f64,
    #[serde(rename = "fastest_seconds")]
    fastest: f64,
    #[serde(rename = "slowest_seconds")]
    slowest: f64,
}

impl Spread {
    /// Of rounds; of none all is zero.
    fn of(mut rounds: Vec<f64>) -> Spread {
        rounds.sort_by(f64::total_cmp);
        let at = |index: usize| rounds.get(index).copied().unwrap_or(0.0);
        Spread { median: at(rounds.len() / 2), fastest: at(0), slowest: at(rounds.len().saturating_sub(1)) }
    }
}

/// Rounds where none are named: of operations, and of peaks before and after whatever is measured.
const ROUNDS: usize = 5;

pub(crate) fn run(options: &BenchOptions, report: &Report) -> anyhow::Result<Verdict> {
    if let Some(path) = &options.json {
        eval::check_writable(path)?;
    }
    // Ranks have something to tell one another; other measurements are of one device.
    let party = if options.collective { Party::join(&options.launch, report)? } else { Party::Alone };
    match measure(options, &party, report) {
        Ok(()) => Ok(party.leave(Verdict::Good, report)),
        Err(error) => {
            party.abort(&error);
            Err(error)
        }
    }
}

fn measure(options: &BenchOptions, party: &Party, report: &Report) -> anyhow::Result<()> {
    let measurements = if options.collective {
        collective::measure(options, party, report)?
    } else if let Some(checkpoint) = &options.convert {
        conversion(options, checkpoint, report)?
    } else {
        let pool = machine::pool(options.threads)?;
        let device = Opened::open(options.device, None, report)?;
        pool.install(|| match &device {
            Opened::Cpu(_) => device.on(Measure { options, operands: None, report }),
            Opened::Cuda(gpus) => {
                let operands =
                    |weights, shape, effort| bench::operands(&gpus.devices[0], weights, shape, effort);
                device.on(Measure { options, operands: Some(&operands), report })
            }
        })?
    };
    if !party.leads() {
        return Ok(());
    }
    report::result(&text(&measurements))?;
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&measurements)?;
        fs::write(path, json + "\n").with_context(|| {
            format!("{}: cannot be written; check that its folder is there", path.display())
        })?;
    }
    Ok(())
}

fn conversion(options: &BenchOptions, checkpoint: &Path, report: &Report) -> anyhow::Result<Measurements> {
    let timing = convert::measure(options, checkpoint, report)?;
    Ok(Measurements {
        bench_version: VERSION,
        backend: "cpu".to_owned(),
        isa: Isa::detect().name().to_owned(),
        threads: options.threads.unwrap_or_else(machine::threads),
        convert: Some(timing),
        ..Measurements::default()
    })
}

struct Measure<'a> {
    options: &'a BenchOptions,
    /// Times the decoding of weights to operands, on a GPU.
    operands: Option<&'a Operands<'a>>,
    report: &'a Report,
}

impl OnBackend for Measure<'_> {
    type Output = anyhow::Result<Measurements>;

    fn run<B: Backend>(self, backend: &B) -> anyhow::Result<Measurements> {
        let Measure { options, operands, report } = self;
        let mut rounds = if operands.is_none() { PeakRounds::here() } else { PeakRounds::none() };
        rounds.measure(ROUNDS);
        rounds.timings().iter().for_each(|peak| report.note(&peak_line(peak)));
        go_on()?;
        let identity = backend.identity();
        let mut measurements = Measurements {
            bench_version: VERSION,
            backend: identity.name,
            isa: identity.isa,
            threads: rayon::current_num_threads(),
            ..Measurements::default()
        };
        let mut timings = Vec::new();
        if options.window {
            let default = if operands.is_none() { ShapeChoice::Llama1b } else { ShapeChoice::Llama8b };
            measurements.windows = window::measure(options, default, backend, report)?;
        } else {
            let choices = match operands {
                None => Choices::on_cpu(options),
                Some(operands) => Choices::on_gpu(options, operands),
            };
            timings = choices.measure(backend, report)?;
        }
        if timings.is_empty() && measurements.windows.is_empty() {
            bail!(
                "nothing is measured: these schemes do not quantize activations; give --acts off, or --scheme nvfp4, fp8, w8a8 or w4a8"
            );
        }
        // Once more, for a machine may be faster or slower by now.
        rounds.measure(ROUNDS);
        let peaks = rounds.timings();
        measurements.windows.iter_mut().for_each(|window| window.hold_against(&peaks));
        measurements.timings = timings.into_iter().map(|timing| Row::new(timing, &peaks)).collect();
        Ok(Measurements { peaks, ..measurements })
    }
}

/// # Errors
/// Where a signal has come.
fn go_on() -> anyhow::Result<()> {
    if interrupt::requested() {
        let told = "interrupted: nothing is kept, the same command starts again";
        return Err(anyhow::Error::from(ctq_runtime::Error::Interrupted).context(told));
    }
    Ok(())
}

fn peak_line(peak: &PeakTiming) -> String {
    let giga = |rate: f64| rate / 1e9;
    format!(
        "peak {}: {:.1} Gop/s ({:.1} to {:.1})",
        peak.instruction.name(),
        giga(peak.operations_per_second),
        giga(peak.slowest),
        giga(peak.fastest)
    )
}

fn text(measurements: &Measurements) -> String {
    let Measurements { backend, isa, threads, peaks, .. } = measurements;
    let mut lines = match &measurements.team {
        Some(_) => vec![format!("{backend} {isa}")],
        None => vec![format!("{backend} {isa}, {threads} thread(s)")],
    };
    lines.extend(peaks.iter().map(peak_line));
    if let Some(team) = &measurements.team {
        lines.push(collective::table(team, &measurements.collectives));
    }
    if !measurements.timings.is_empty() {
        lines.push(operations::table(&measurements.timings).to_string());
    }
    if !measurements.windows.is_empty() {
        lines.push(window::table(&measurements.windows));
    }
    lines.extend(measurements.convert.as_ref().map(convert::table));
    lines.join("\n")
}
