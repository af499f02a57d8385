//! `ctq bench --collective`: what ranks that share a model hand one another, and how fast.

use comfy_table::{CellAlignment, Table, presets};
use ctq_kernels::bench::{CollectiveTiming, Effort, Ends, Floor, Probe, cases};
use ctq_kernels::collective::{Rank, team};
use ctq_kernels::{Backend, KernelError};
use ctq_runtime::{Layout, Workers};

use super::{Measurements, ROUNDS, Team, VERSION, go_on};
use crate::bench::options::BenchOptions;
use crate::device::{Opened, Wanted};
use crate::machine;
use crate::party::{Party, Several};
use crate::report::Report;
use crate::seats::{OnSeats, Seats, threads_of_seat};

/// Tokens at a time: one, a short window, a long one.
const TOKENS: [usize; 3] = [1, 256, 2048];

/// Least seconds of one round.
const SECONDS: f64 = 0.02;

pub(super) fn measure(
    options: &BenchOptions,
    party: &Party,
    report: &Report,
) -> anyhow::Result<Measurements> {
    let wanted = match party.process() {
        Some(process) => Wanted::OfProcess(process),
        None => options.tp.map_or(Wanted::All, Wanted::AtMost),
    };
    let device = Opened::open_several(options.device, wanted, None, report)?;
    let floor = match &device {
        Opened::Cpu(_) => Floor::Host,
        Opened::Cuda(_) => Floor::Device,
    };
    let tokens = options.rows.map_or(TOKENS.to_vec(), |rows| vec![rows]);
    let effort = Effort { rounds: options.rounds.unwrap_or(ROUNDS), seconds: SECONDS };
    let program = Program { tokens, effort, floor, report };
    let (ranks, devices, threads) = match party {
        Party::Several(several) => {
            let ranks = several.world.ranks();
            (ranks, ranks, threads_of_seat(options.threads, party.neighbours()))
        }
        Party::Alone => {
            let ranks = options.tp.unwrap_or(device.count().max(2));
            (ranks, device.count(), threads_of_seat(options.threads, ranks))
        }
    };
    if matches!(device, Opened::Cuda(_)) && devices < ranks {
        report.note(&format!("{ranks} ranks on {devices} GPU(s): some share one, and copy within it"));
    }
    let team = Team { ranks, devices, threads: threads.get(), floor: told(floor).to_owned() };
    let collectives = match party {
        Party::Alone => device.on_seats(InProcess { program: &program, ranks, threads })?,
        Party::Several(several) => device.on_seats(OneProcess { program: &program, several, threads })?,
    };
    let identity = device.identity();
    Ok(Measurements {
        bench_version: VERSION,
        backend: identity.name,
        isa: identity.isa,
        threads: team.threads,
        team: Some(team),
        collectives,
        ..Measurements::default()
    })
}

/// What a time is held against.
fn told(floor: Floor) -> &'static str {
    match floor {
        Floor::Host => "a copy of as many bytes in host memory, by every rank's threads at a time",
        Floor::Device => {
            "all-gather: a copy of as many bytes within its device, by every rank at a time; others: in host memory, by every rank's threads"
        }
    }
}

/// What every rank runs, wherever it is.
struct Program<'a> {
    tokens: Vec<usize>,
    effort: Effort,
    floor: Floor,
    report: &'a Report,
}

impl Program<'_> {
    /// As one rank: its times. Those of rank 0 count, and it tells of them.
    fn run<B: Backend>(&self, rank: &Rank<B>, ends: Option<&Ends>) -> anyhow::Result<Vec<CollectiveTiming>> {
        let probe = Probe { rank, ends, effort: self.effort, floor: self.floor };
        let tells = rank.peers().rank() == 0;
        let one = |case| {
            let timing = probe.measure(&case)?;
            if tells {
                self.report.note(&line(&timing));
                go_on()?;
            }
            Ok(timing)
        };
        cases(&self.tokens).into_iter().map(one).collect()
    }
}

/// Ranks that are threads of this process.
struct InProcess<'a> {
    program: &'a Program<'a>,
    ranks: usize,
    threads: std::num::NonZero<usize>,
}

impl OnSeats for InProcess<'_> {
    type Output = anyhow::Result<Vec<CollectiveTiming>>;

    fn run<B: Backend + 'static>(self, seats: &dyn Seats<B>) -> Self::Output {
        let ranks = seats.in_process(&Layout { ranks: self.ranks, ..Layout::ONE });
        let ends = Ends::in_process(self.ranks);
        let outcomes = team::run(&ranks, self.threads, |rank| {
            self.program.run(rank, ends[rank.peers().rank()].as_ref())
        });
        let (mut timings, mut errors) = (Vec::new(), Vec::new());
        for outcome in outcomes {
            match outcome {
                Ok(of_rank) => timings.push(of_rank),
                Err(error) => errors.push(error),
            }
        }
        // Not that another rank is gone, but why.
        let follows = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(KernelError::Lost { .. }));
        match errors.into_iter().min_by_key(follows) {
            Some(error) => Err(error),
            None => Ok(timings.swap_remove(0)),
        }
    }
}

/// One rank, of which each process is one.
struct OneProcess<'a> {
    program: &'a Program<'a>,
    several: &'a Several,
    threads: std::num::NonZero<usize>,
}

impl OnSeats for OneProcess<'_> {
    type Output = anyhow::Result<Vec<CollectiveTiming>>;

    fn run<B: Backend + 'static>(self, seats: &dyn Seats<B>) -> Self::Output {
        let layout = Layout { ranks: self.several.world.ranks(), ..Layout::ONE };
        let member = self.several.member(&layout, seats, Workers::anywhere(self.threads))?;
        let ends = self.several.ends();
        let pool = machine::pool(Some(self.threads.get()))?;
        pool.install(|| self.program.run(&member.backend, ends.as_ref()))
    }
}

fn name(timing: &CollectiveTiming) -> String {
    let CollectiveTiming { operation, what, model, tokens, .. } = timing;
    match model {
        Some(model) => format!("{operation} {what}, {model}, {tokens} tokens"),
        None => format!("{operation} {what}"),
    }
}

fn line(timing: &CollectiveTiming) -> String {
    let speed = timing.bytes as f64 / timing.seconds / 1e9;
    format!("{}: {:.4} ms, {speed:.2} GB/s", name(timing), timing.seconds * 1e3)
}

pub(super) fn table(team: &Team, timings: &[CollectiveTiming]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "operation",
        "of",
        "model",
        "tokens",
        "MB",
        "ms",
        "fastest",
        "slowest",
        "GB/s",
        "x floor",
    ]);
    let milliseconds = |seconds: f64| format!("{:.4}", seconds * 1e3);
    for timing in timings {
        let CollectiveTiming { seconds, bytes, floor_seconds, .. } = timing;
        table.add_row([
            timing.operation.clone(),
            timing.what.clone(),
            timing.model.clone().unwrap_or_default(),
            if timing.model.is_some() { timing.tokens.to_string() } else { String::new() },
            format!("{:.3}", *bytes as f64 / 1e6),
            milliseconds(*seconds),
            milliseconds(timing.fastest_seconds),
            milliseconds(timing.slowest_seconds),
            format!("{:.2}", *bytes as f64 / seconds / 1e9),
            floor_seconds.map_or_else(|| "-".to_owned(), |floor| format!("{:.1}", seconds / floor)),
        ]);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let Team { ranks, devices, threads, floor } = team;
    format!(
        "{ranks} ranks on {devices} device(s), {threads} thread(s) each; MB: what comes to a rank\nfloor: {floor}\n{table}"
    )
}
