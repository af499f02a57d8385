//! Scoring windows with one model: seats by devices, groups by memory, progress; what is done is kept for the same command.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use ctq_container::LayerSource;
use ctq_kernels::Backend;
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::crew::{self, Job, Replanned, Resources, Watcher};
use ctq_runtime::{Arranged, Error, Layout, Needs, Plans, Pool, Seat, Settings, Snapshot, Wish, arrange};

use crate::device::{HeadUse, OnSeats, Opened, Seats, threads_of_seat};
use crate::dry_run::{DryRun, Subject};
use crate::exit::{Verdict, verdict_of};
use crate::interrupt;
use crate::party::Party;
use crate::post::Posting;
use crate::progress::{Progress, Unit};
use crate::report::Report;
use crate::resume::{ResumeState, group_name};

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
        if job.layout != Layout::ONE {
            report.note(&format!("{}: {}: {why}", self.name, job.layout));
        }
        let state = ResumeState::open(self.key, report)?;
        let scores = if self.party.leads() { state.scores(self.windows, report) } else { Vec::new() };
        let done = self.done(&scores)?;
        let is_open = |window: &&Window| !done.contains(&window.index);
        let open: Vec<Window> = self.windows.iter().filter(is_open).cloned().collect();
        let fed = open.iter().map(|window| window.ids.len()).sum();
        let watch =
            Watch { run: self, job: &job, state: &state, report, inner: Mutex::new(Inner::new(scores)) };
        let outcome = self.device.on_seats(Task { run: self, job: &job, open, watch: &watch });
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
        Ok(DryRun::new(&Subject {
            model: self.name,
            acts,
            job: &job,
            why: &why,
            plans: &plans,
            windows: self.windows,
            devices: &devices,
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

/// A run on a backend.
struct Task<'a, 'w> {
    run: &'a Run<'a>,
    job: &'a Job<'a>,
    open: Vec<Window>,
    watch: &'a Watch<'w>,
}

impl OnSeats for Task<'_, '_> {
    type Output = anyhow::Result<()>;

    fn run<B: Backend + 'static>(self, seats: &dyn Seats<B>) -> anyhow::Result<()> {
        let Task { run, job, open, watch } = self;
        let threads = run.threads_of_seat(&job.layout);
        match run.party {
            Party::Alone => {
                let members = || Ok(crew::in_process(&job.layout, seats.in_process(&job.layout), threads));
                Ok(crew::run(job, open, members, watch)?)
            }
            Party::Several(several) => {
                let members = || Ok(vec![several.member(&job.layout, seats, threads)?]);
                several.run(|| Ok(crew::run(job, open, members, &Posting::new(several, watch))?), watch)
            }
        }
    }
}

/// Follows a run: keeps its scores, tells how far it is.
pub(crate) struct Watch<'a> {
    run: &'a Run<'a>,
    job: &'a Job<'a>,
    state: &'a ResumeState,
    report: &'a Report,
    inner: Mutex<Inner<'a>>,
}

struct Inner<'a> {
    scores: Vec<WindowScores>,
    progress: Option<Progress<'a>>,
    /// Steps that each seat has done.
    steps: Vec<usize>,
    /// When each replica's hidden states were saved last.
    saved: Vec<Instant>,
}

impl Inner<'_> {
    fn new(scores: Vec<WindowScores>) -> Self {
        Inner { scores, progress: None, steps: Vec::new(), saved: Vec::new() }
    }
}

impl<'a> Watch<'a> {
    /// Windows that have no scores yet.
    pub(crate) fn left(&self) -> usize {
        self.run.windows.len() - self.inner().scores.len()
    }

    /// Keeps the scores of a group.
    pub(crate) fn keep(&self, scores: Vec<WindowScores>) -> Result<(), Error> {
        let mut inner = self.inner();
        let before = inner.scores.len();
        inner.scores.extend(scores);
        let saved = self.state.save(&inner.scores);
        if saved.is_err() {
            inner.scores.truncate(before);
        }
        saved
    }

    /// The hidden states of a replica's group are wanted no more.
    pub(crate) fn forget_snapshot(&self, seat: Seat) {
        self.state.forget_snapshot(seat.replica);
    }

    /// The seats.
    pub(crate) fn layout(&self) -> &Layout {
        &self.job.layout
    }

    fn inner(&self) -> MutexGuard<'_, Inner<'a>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end: all scores.
    fn finish(self) -> Vec<WindowScores> {
        let inner = self.inner.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(progress) = inner.progress {
            progress.finish();
        }
        inner.scores
    }
}

impl Watcher for Watch<'_> {
    fn planned(&self, plans: &Plans) {
        let gibibytes = |bytes: u64| bytes as f64 / (1_u64 << 30) as f64;
        let name = self.run.name;
        let left = self.left();
        self.report.detail(&format!(
            "{name}: {left} windows in {} groups, {} tokens at a time, about {:.2} GiB",
            plans.groups(),
            plans.batch_tokens(),
            gibibytes(plans.device_bytes() + plans.host_bytes())
        ));
        let mut inner = self.inner();
        if let Some(progress) = inner.progress.take() {
            progress.finish();
        }
        inner.progress = Some(Progress::new(self.report, name, Unit::Layers, plans.steps() as u64));
        inner.steps = vec![0; self.job.layout.seats()];
        inner.saved = vec![Instant::now(); self.job.layout.replicas];
    }

    fn replanned(&self, replanned: &Replanned) {
        // A snapshot stays: where the next group has the same windows, it goes on from there.
        self.report.warning(&format!("{}: {replanned}", self.run.name));
    }

    fn advanced(&self, seat: Seat, steps: usize) {
        let mut inner = self.inner();
        if let Some(done) = inner.steps.get_mut(self.job.layout.index(seat)) {
            *done = steps;
        }
        let done: usize = inner.steps.iter().sum();
        if let Some(progress) = &inner.progress {
            progress.at(done as u64);
        }
    }

    fn interrupted(&self) -> bool {
        interrupt::requested()
    }

    fn wants_snapshot(&self, seat: Seat) -> bool {
        let due = self.inner().saved[seat.replica].elapsed() >= self.run.save_every;
        due || interrupt::requested()
    }

    fn save(&self, seat: Seat, windows: &[Window], snapshot: Snapshot) -> Result<(), Error> {
        snapshot.save(&self.state.snapshot_path(seat.replica), &group_name(windows))?;
        self.inner().saved[seat.replica] = Instant::now();
        Ok(())
    }

    fn saved(&self, seat: Seat, windows: &[Window]) -> Option<Snapshot> {
        self.state.snapshot(&group_name(windows), seat.replica, self.report)
    }

    fn scored(&self, seat: Seat, scores: Vec<WindowScores>) -> Result<(), Error> {
        self.keep(scores)?;
        self.forget_snapshot(seat);
        Ok(())
    }
}
