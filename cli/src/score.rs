//! Scoring windows with one model: seats by devices, groups by memory, progress; what is done is kept for the same command.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::time::Duration;

use anyhow::Context;
use ctq_container::LayerSource;
use ctq_kernels::Backend;
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::crew::{self, Job};
use ctq_runtime::{Arranged, Layout, Needs, Plans, Pool, Resources, Settings, Wish, Workers, arrange};

use crate::device::{HeadUse, Opened};
use crate::dry_run::{DryRun, Subject, bytes};
use crate::exit::{Verdict, verdict_of};
use crate::floor;
use crate::machine;
use crate::party::Party;
use crate::post::Posting;
use crate::report::Report;
use crate::resume::ResumeState;
use crate::seats::{OnSeats, Seats, threads_of_seat};
use crate::watch::{Followed, Watch};

/// One scoring run.
pub(crate) struct Run<'a> {
    pub(crate) source: &'a dyn LayerSource,
    pub(crate) settings: Settings,
    pub(crate) wish: Wish,
    pub(crate) device: &'a Opened,
    pub(crate) party: &'a Party,
    pub(crate) threads: Option<usize>,
    pub(crate) windows: &'a [Window],
    /// Rows of the head that the softmax runs over.
    pub(crate) vocabulary: usize,
    /// Bytes that may be taken, as [`Opened::resources`] has it.
    pub(crate) memory: Option<u64>,
    pub(crate) save_every: Duration,
    /// Everything the scores depend on, in one string.
    pub(crate) key: &'a str,
    /// What progress calls it.
    pub(crate) name: &'a str,
}

/// What a run gives.
pub(crate) struct Scored {
    /// One for each window, in order.
    pub(crate) scores: Vec<WindowScores>,
    /// Tokens that this run fed to the model; those of an earlier, killed run are not among them.
    pub(crate) fed: usize,
    /// Who did it.
    pub(crate) layout: Layout,
    /// Workers of all of them.
    pub(crate) threads: usize,
    /// The scores on disk, kept until the whole command is done.
    pub(crate) kept: ResumeState,
}

impl Run<'_> {
    /// Scores all windows; goes on from what an earlier, killed run of the same key left. Of several processes, the first
    /// has all scores in the end.
    pub(crate) fn score(&self, report: &Report) -> anyhow::Result<Scored> {
        let (job, why) = self.job(None)?;
        let plan = format!("{:?}, {:?}", job.layout, job.resources);
        self.party.agree(Ok(BTreeMap::from([("plan", plan)])))?;
        report.detail(&format!("memory: {}", told_of_memory(self.memory, job.resources.pool)));
        if job.layout != Layout::ONE {
            report.note(&format!("{}: {}: {why}", self.name, job.layout));
        }
        let state = ResumeState::open(self.key, report)?;
        let scores = if self.party.leads() { state.scores(self.windows, report) } else { Vec::new() };
        let done = self.done(&scores)?;
        let is_open = |window: &&Window| !done.contains(&window.index);
        let open: Vec<Window> = self.windows.iter().filter(is_open).cloned().collect();
        let fed = open.iter().map(|window| window.ids.len()).sum();
        let (name, windows, save_every) = (self.name, self.windows.len(), self.save_every);
        let followed = Followed { name, windows, layout: job.layout, save_every, state: &state };
        let watch = Watch::new(followed, scores, report);
        let outcome = self.device.on_seats(Task { run: self, job: &job, open, watch: &watch, report });
        let mut scores = watch.finish();
        outcome.map_err(|error| self.told(error, scores.len()))?;
        scores.sort_by_key(|scores| scores.window);
        let threads = self.threads_of_seat(&job.layout).get() * job.layout.seats();
        Ok(Scored { scores, fed, layout: job.layout, threads, kept: state })
    }

    /// What would be done where; by so many processes, where there are to be several.
    pub(crate) fn dry_run(&self, acts: &str, processes: Option<usize>) -> anyhow::Result<DryRun> {
        let (job, why) = self.job(processes)?;
        let needs = Needs::of(self.source.inventory());
        let plans = Plans::new(&job.layout, &needs, job.resources, self.windows)?;
        let devices = self.device.names();
        let threads = self.threads_of_seat(&job.layout).get() * job.layout.seats();
        let peaks = match job.resources.pool {
            Pool::Shared(_) => floor::peaks(),
            Pool::Separate { .. } => None,
        };
        Ok(DryRun::new(&Subject {
            model: self.name,
            acts,
            job: &job,
            why: &why,
            plans: &plans,
            windows: self.windows,
            devices: &devices,
            threads,
            peaks: peaks.as_ref(),
            memory: &told_of_memory(self.memory, job.resources.pool),
        }))
    }

    /// Workers of each seat.
    fn threads_of_seat(&self, layout: &Layout) -> NonZero<usize> {
        match self.party {
            Party::Alone => threads_of_seat(self.threads, layout.seats()),
            Party::Several(_) => threads_of_seat(self.threads, self.party.neighbours()),
        }
    }

    /// Windows that have their scores, as the first process knows.
    fn done(&self, scores: &[WindowScores]) -> anyhow::Result<BTreeSet<usize>> {
        let own: Vec<usize> = scores.iter().map(|scores| scores.window).collect();
        let said = self.party.of_first(serde_json::to_vec(&own)?)?;
        serde_json::from_slice(&said).context("what the first process says is not understood")
    }

    /// What is to be done where, and why there. `processes`: that are not there yet.
    fn job(&self, processes: Option<usize>) -> anyhow::Result<(Job<'_>, String)> {
        let inventory = self.source.inventory();
        let processes = match self.party {
            Party::Several(several) => Some(several.world.ranks()),
            Party::Alone => processes,
        };
        let (seats, here) = match (processes, self.wish) {
            (Some(processes), _) => (processes, 1),
            (None, Wish { ranks: None, stages: None }) => (self.device.count(), self.device.count()),
            (None, Wish { ranks, stages }) => {
                let seats = ranks.unwrap_or(1) * stages.unwrap_or(1);
                (seats, seats)
            }
        };
        let neighbours = self.party.neighbours();
        let resources = self.device.resources(self.memory, here, neighbours, inventory, HeadUse::Blocks)?;
        // All plan alike: as the one with the least memory can.
        let resources = Resources {
            pool: match resources.pool {
                Pool::Shared(bytes) => Pool::Shared(self.party.least([bytes])?[0]),
                Pool::Separate { device, host } => {
                    let [device, host] = self.party.least([device, host])?;
                    Pool::Separate { device, host }
                }
            },
            ..resources
        };
        let longest = self.windows.iter().map(|window| window.ids.len()).max().unwrap_or(0);
        let needs = Needs::of(inventory);
        let Arranged { layout, why } =
            arrange(&needs, resources.pool, resources.scratch, self.wish, seats, longest)?;
        let (source, settings, vocabulary) = (self.source, self.settings, self.vocabulary);
        Ok((Job { source, settings, vocabulary, layout, resources }, why))
    }

    /// An error, and what is done already where the same command goes on.
    fn told(&self, error: anyhow::Error, done: usize) -> anyhow::Error {
        match verdict_of(&error) {
            // The first process knows what is done.
            Verdict::Unfinished if !self.party.leads() => error,
            Verdict::Unfinished => {
                let told = format!(
                    "{error}; {done} of {} windows are scored and kept, the same command goes on from there",
                    self.windows.len()
                );
                error.context(told)
            }
            Verdict::Good | Verdict::Failed | Verdict::Unusable => error,
        }
    }
}

/// What a run may take and why, for people.
fn told_of_memory(asked: Option<u64>, pool: Pool) -> String {
    let a_seat = |amount: u64| format!("{} a seat", bytes(amount));
    match (asked, pool) {
        (Some(_), Pool::Shared(amount)) => {
            format!("{} for hidden states and what a layer makes of them, as --memory says", a_seat(amount))
        }
        (None, Pool::Shared(amount)) => format!(
            "{} for hidden states and what a layer makes of them, which is half of what is free; --memory gives another amount",
            a_seat(amount)
        ),
        (Some(_), Pool::Separate { device, .. }) => {
            format!("{} of a device for everything, as --memory says", a_seat(device))
        }
        (None, Pool::Separate { device, .. }) => format!(
            "{} of a device for everything, which is nearly all that is free; --memory gives less",
            a_seat(device)
        ),
    }
}

/// A run on a backend.
struct Task<'a, 'w> {
    run: &'a Run<'a>,
    job: &'a Job<'a>,
    open: Vec<Window>,
    watch: &'a Watch<'w>,
    report: &'a Report,
}

impl OnSeats for Task<'_, '_> {
    type Output = anyhow::Result<()>;

    fn run<B: Backend + 'static>(self, seats: &dyn Seats<B>) -> anyhow::Result<()> {
        let Task { run, job, open, watch, report } = self;
        let threads = run.threads_of_seat(&job.layout);
        match run.party {
            Party::Alone => {
                let ranks = || seats.in_process(&job.layout);
                let (workers, why) = machine::workers(threads, job.layout.seats());
                report.detail(&why);
                let members = || Ok(crew::in_process(&job.layout, ranks(), workers.clone()));
                Ok(crew::run(job, open, members, watch)?)
            }
            Party::Several(several) => {
                // Others may share the machine.
                let workers = || Workers::anywhere(threads);
                let members = || Ok(vec![several.member(&job.layout, seats, workers())?]);
                several.run(|| Ok(crew::run(job, open, members, &Posting::new(several, watch))?), watch)
            }
        }
    }
}
