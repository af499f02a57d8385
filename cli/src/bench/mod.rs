//! `ctq bench`: how fast the heavy operations are on a device, on the shapes of a Llama 8B; or what ranks hand one another.

mod collective;

use std::fs;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use ctq_kernels::bench::{self, CollectiveTiming, Effort, Timing};
use ctq_kernels::{AttentionShape, Backend, Compute};
use serde::Serialize;

use crate::args::BenchOptions;
use crate::device::{OnBackend, Opened};
use crate::exit::Verdict;
use crate::party::Party;
use crate::report::{self, Report};
use crate::{eval, interrupt, machine};

/// What is written as JSON: a stable object.
#[derive(Debug, Serialize)]
struct Measurements {
    bench_version: u32,
    backend: String,
    isa: String,
    timings: Vec<Timing>,
    /// The ranks of `collectives`, where these were asked for.
    team: Option<Team>,
    collectives: Vec<CollectiveTiming>,
}

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

/// Rows of activations where none are named.
const ROWS: usize = 8192;

/// Query and key-value heads of a Llama 8B.
const ATTENTION: AttentionShape = AttentionShape { heads: 32, kv_heads: 8, head_dim: 128, window: None };

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
    } else {
        let pool = machine::pool(options.threads)?;
        let device = Opened::open(options.device, None, report)?;
        pool.install(|| device.on(Measure { options, report }))?
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

struct Measure<'a> {
    options: &'a BenchOptions,
    report: &'a Report,
}

impl OnBackend for Measure<'_> {
    type Output = anyhow::Result<Measurements>;

    fn run<B: Backend>(self, backend: &B) -> anyhow::Result<Measurements> {
        let rows = self.options.rows.unwrap_or(ROWS);
        let effort = Effort { rounds: self.options.rounds, seconds: 0.05 };
        let identity = backend.identity();
        let mut timings = Vec::new();
        let mut keep = |timing: Timing| {
            self.report.note(&line(&timing));
            timings.push(timing);
            go_on()
        };
        for scheme in bench::SCHEMES {
            for (n, k) in bench::LLAMA_8B {
                keep(bench::linear(backend, scheme, (rows, n, k), Compute::Bf16, effort)?)?;
            }
        }
        let length = rows.min(2048);
        let windows = (rows / length, length);
        keep(bench::attention(backend, &ATTENTION, windows, Compute::Bf16, effort)?)?;
        Ok(Measurements {
            bench_version: 1,
            backend: identity.name,
            isa: identity.isa,
            timings,
            team: None,
            collectives: Vec::new(),
        })
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

fn line(timing: &Timing) -> String {
    let Timing { operation, what, m, n, k, seconds, operations, .. } = timing;
    format!(
        "{operation} {what} {m} x {n} x {k}: {:.3} ms, {:.2} TFLOP/s",
        seconds * 1e3,
        operations / seconds / 1e12
    )
}

fn text(measurements: &Measurements) -> String {
    let table = match &measurements.team {
        Some(team) => collective::table(team, &measurements.collectives),
        None => table(&measurements.timings).to_string(),
    };
    format!("{} {}\n{table}", measurements.backend, measurements.isa)
}

fn table(timings: &[Timing]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["operation", "weights", "m", "n", "k", "ms", "TFLOP/s", "GB/s"]);
    for timing in timings {
        table.add_row([
            timing.operation.clone(),
            timing.what.clone(),
            timing.m.to_string(),
            timing.n.to_string(),
            timing.k.to_string(),
            format!("{:.3}", timing.seconds * 1e3),
            format!("{:.2}", timing.operations / timing.seconds / 1e12),
            format!("{:.1}", timing.bytes / timing.seconds / 1e9),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
