//! All seats of a layout that are in this process, each in a thread of its own, from windows to scores; planned again
//! with less where a device has no room. Saves nothing and tells nobody: the [`Watcher`] does.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use ctq_container::LayerSource;
use ctq_kernels::collective::{Handover, Pipe, Rank, team};
use ctq_kernels::{Backend, KernelError};
use ctq_model::window::{Window, WindowScores};

use crate::engine::{Engine, Settings};
use crate::error::{Error, Result};
use crate::layout::{Layout, Seat};
use crate::needs::Needs;
use crate::observer::Observer;
use crate::plan::Resources;
use crate::plans::Plans;
use crate::snapshot::Snapshot;
use crate::stage::Stage;
use crate::workers::Workers;

/// A seat that is taken: a rank, and how hidden states reach it and leave it.
pub struct Member<B: Backend> {
    /// Which seat.
    pub seat: Seat,
    /// What computes.
    pub backend: Rank<B>,
    /// From the stage before.
    pub incoming: Option<Box<dyn Pipe>>,
    /// To the stage after.
    pub outgoing: Option<Box<dyn Pipe>>,
    /// Workers on the CPU.
    pub workers: Workers,
}

/// The ranks of a layout on backends that read one another's buffers, in the order of its seats.
pub fn ranks<B: Backend + 'static>(layout: &Layout, backend: impl Fn() -> B) -> Vec<Rank<B>> {
    let stage = |_| team::in_process(std::iter::repeat_with(&backend).take(layout.ranks).collect());
    (0..layout.replicas * layout.stages).flat_map(stage).collect()
}

/// Seats of one process that pass hidden states from thread to thread. `ranks` and `workers`: in the order of the
/// layout's seats, as many as it has.
pub fn in_process<B: Backend>(layout: &Layout, ranks: Vec<Rank<B>>, workers: Vec<Workers>) -> Vec<Member<B>> {
    let mut incoming: Vec<Option<Box<dyn Pipe>>> = ranks.iter().map(|_| None).collect();
    let mut members = Vec::with_capacity(ranks.len());
    for (index, (backend, workers)) in ranks.into_iter().zip(workers).enumerate() {
        let seat = layout.seat(index);
        let mut outgoing: Option<Box<dyn Pipe>> = None;
        if seat.stage + 1 < layout.stages {
            let pipe = Handover::default();
            let next = layout.index(Seat { stage: seat.stage + 1, ..seat });
            incoming[next] = Some(Box::new(pipe.clone()));
            outgoing = Some(Box::new(pipe));
        }
        members.push(Member { seat, backend, incoming: incoming[index].take(), outgoing, workers });
    }
    members
}

/// What is to be scored, and how.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The model.
    pub source: &'a dyn LayerSource,
    /// Arithmetic.
    pub settings: Settings,
    /// Rows of the head that the softmax runs over.
    pub vocabulary: usize,
    /// All seats, in this process or others.
    pub layout: Layout,
    /// What each seat may take.
    pub resources: Resources,
}

/// What a run asks and tells. Called from the threads of all seats.
pub trait Watcher: Sync {
    /// The run has a plan: at the beginning, and again where it had to be made anew.
    fn planned(&self, plans: &Plans) {
        let _ = plans;
    }

    /// A device had no room, and what is left will be done with less.
    fn replanned(&self, replanned: &Replanned) {
        let _ = replanned;
    }

    /// A seat has done so many steps of its plan, as [`Plans::steps`] counts them.
    fn advanced(&self, seat: Seat, steps: usize) {
        let _ = (seat, steps);
    }

    /// Whether the run should stop at the next layer.
    fn interrupted(&self) -> bool {
        false
    }

    /// Whether the hidden states of a seat's group are wanted; asked once a layer.
    fn wants_snapshot(&self, seat: Seat) -> bool {
        let _ = seat;
        false
    }

    /// Takes the hidden states that were asked for.
    ///
    /// # Errors
    /// Where they cannot be kept; the run stops.
    fn save(&self, seat: Seat, windows: &[Window], snapshot: Snapshot) -> Result<()> {
        let _ = (seat, windows, snapshot);
        Ok(())
    }

    /// Hidden states of exactly these windows that an earlier run has left.
    fn saved(&self, seat: Seat, windows: &[Window]) -> Option<Snapshot> {
        let _ = (seat, windows);
        None
    }

    /// Takes the scores of a group.
    ///
    /// # Errors
    /// Where they cannot be kept; the run stops.
    fn scored(&self, seat: Seat, scores: Vec<WindowScores>) -> Result<()>;
}

/// Why a run has a new plan, and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replanned {
    /// The device.
    pub device: String,
    /// Bytes that it had no room for.
    pub wanted: u64,
    /// Windows that are left.
    pub windows: usize,
    /// Groups that they make now.
    pub groups: usize,
    /// Tokens of a batch now.
    pub batch_tokens: usize,
}

impl std::fmt::Display for Replanned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Replanned { device, wanted, windows, groups, batch_tokens } = self;
        write!(
            f,
            "{device} had no room for {wanted} more bytes: going on with less memory, {windows} windows in {groups} groups, {batch_tokens} tokens at a time"
        )
    }
}

/// Scores `windows` on the seats that `seats` hands out, which is asked anew for every plan. Where it hands out all of
/// the layout's and one has no room, what is left is planned again with less.
///
/// # Errors
/// Where a part cannot be read, a hidden state is not finite, a device fails or has no room for one window, a rank is
/// lost, or the watcher interrupts. Of several errors, the one that others follow from.
pub fn run<B: Backend>(
    job: &Job<'_>,
    mut windows: Vec<Window>,
    mut seats: impl FnMut() -> Result<Vec<Member<B>>>,
    watcher: &dyn Watcher,
) -> Result<()> {
    let needs = Needs::of(job.source.inventory());
    let mut resources = job.resources;
    let mut plans = Plans::new(&job.layout, &needs, resources, &windows)?;
    loop {
        watcher.planned(&plans);
        let members = seats()?;
        let all_are_here = members.len() == job.layout.seats();
        let attempt = Attempt {
            job,
            plans: &plans,
            windows: &windows,
            watcher,
            scored: Mutex::default(),
            failed: AtomicBool::new(false),
        };
        let Err(error) = attempt.run(members) else { return Ok(()) };
        let (Some((device, wanted)), true) = (error.out_of_memory(), all_are_here) else { return Err(error) };
        let scored = attempt.scored.into_inner().unwrap_or_else(PoisonError::into_inner);
        let device = device.to_owned();
        windows.retain(|window| !scored.contains(&window.index));
        let Some((pool, smaller)) = plans.smaller(&job.layout, &needs, resources, &windows) else {
            return Err(Error::NoRoom { device, wanted, needed: plans.device_bytes() });
        };
        resources.pool = pool;
        plans = smaller;
        watcher.replanned(&Replanned {
            device,
            wanted,
            windows: windows.len(),
            groups: plans.groups(),
            batch_tokens: plans.batch_tokens(),
        });
    }
}

/// One plan carried out.
struct Attempt<'a> {
    job: &'a Job<'a>,
    plans: &'a Plans,
    windows: &'a [Window],
    watcher: &'a dyn Watcher,
    /// Windows that have their scores.
    scored: Mutex<BTreeSet<usize>>,
    /// A seat has failed: others need not go on.
    failed: AtomicBool,
}

impl Attempt<'_> {
    /// All seats at a time.
    fn run<B: Backend>(&self, members: Vec<Member<B>>) -> Result<()> {
        let outcomes: Vec<Result<()>> = std::thread::scope(|scope| {
            let start = |member| scope.spawn(move || self.seat(&member));
            let threads: Vec<_> = members.into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("a seat does not panic")).collect()
        });
        let errors = outcomes.into_iter().filter_map(Result::err);
        errors.min_by_key(consequence).map_or(Ok(()), Err)
    }

    /// One seat, in a pool of its own: ranks that wait for one another must not share workers.
    fn seat<B: Backend>(&self, member: &Member<B>) -> Result<()> {
        let leave = Leave { attempt: self, member };
        let pool = member.workers.pool().map_err(|error| {
            let what = format!("threads cannot be started ({error}); ask for fewer with --threads");
            Error::Device(KernelError::Device { device: "cpu".to_owned(), what })
        });
        let done = pool.and_then(|pool| pool.install(|| self.groups(member)));
        if let Err(error) = &done {
            leave.because(&error.to_string());
        }
        done
    }

    /// All groups of a seat's plan.
    fn groups<B: Backend>(&self, member: &Member<B>) -> Result<()> {
        let Member { seat, backend, .. } = member;
        let replica = &self.plans.replicas[seat.replica];
        let (windows, plan) = (&self.windows[replica.windows.clone()], &replica.stages[seat.stage]);
        let stage = Stage {
            layers: self.plans.layers[seat.stage].clone(),
            incoming: member.incoming.as_deref(),
            outgoing: member.outgoing.as_deref(),
        };
        let (steps, is_whole, is_last) = (stage.steps(), stage.is_whole(), stage.outgoing.is_none());
        let engine = Engine::new(backend, self.job.source, self.job.settings)
            .with_stage(stage)
            .with_schedule(plan.schedule);
        for (index, group) in plan.groups.iter().enumerate() {
            let windows = &windows[group.clone()];
            let follow = Follow { attempt: self, seat: *seat, before: index * steps, windows };
            let snapshot = if is_whole {
                let own = if seat.rank == 0 { self.watcher.saved(*seat, windows) } else { None };
                Snapshot::shared(backend.peers(), own)?
            } else {
                None
            };
            let scores = engine.score(windows, self.job.vocabulary, snapshot, &follow)?;
            if is_last && seat.rank == 0 {
                let indices: Vec<usize> = scores.iter().map(|scores| scores.window).collect();
                self.watcher.scored(*seat, scores)?;
                self.scored.lock().unwrap_or_else(PoisonError::into_inner).extend(indices);
            }
        }
        Ok(())
    }
}

/// How far an error is from what went wrong first: what a seat failed at, then that it had no room, which another plan may
/// mend, then that it was told to stop, then that another was gone.
fn consequence(error: &Error) -> usize {
    if error.out_of_memory().is_some() {
        return 1;
    }
    match error {
        Error::Kernel { source: KernelError::Lost { .. }, .. } | Error::Device(KernelError::Lost { .. }) => 3,
        Error::Interrupted => 2,
        Error::Kernel { .. }
        | Error::Device(_)
        | Error::Source { .. }
        | Error::TooSmall(_)
        | Error::NoRoom { .. }
        | Error::NonFinite { .. }
        | Error::TokenOutOfRange { .. }
        | Error::Scores(_)
        | Error::Snapshot { .. } => 0,
    }
}

/// Lets nobody wait for a seat that has ended before its time.
struct Leave<'a, B: Backend> {
    attempt: &'a Attempt<'a>,
    member: &'a Member<B>,
}

impl<B: Backend> Leave<'_, B> {
    fn because(&self, reason: &str) {
        self.attempt.failed.store(true, Ordering::Relaxed);
        let reason = format!("{}: {reason}", self.member.seat);
        self.member.backend.peers().abort(&reason);
        [&self.member.incoming, &self.member.outgoing]
            .into_iter()
            .flatten()
            .for_each(|pipe| pipe.abort(&reason));
    }
}

impl<B: Backend> Drop for Leave<'_, B> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.because("panicked");
        }
    }
}

/// Follows one group of one seat.
struct Follow<'a> {
    attempt: &'a Attempt<'a>,
    seat: Seat,
    /// Steps of the groups before.
    before: usize,
    windows: &'a [Window],
}

impl Observer for Follow<'_> {
    fn advanced(&self, layers: usize) {
        // Ranks of a stage go on together.
        if self.seat.rank == 0 {
            self.attempt.watcher.advanced(self.seat, self.before + layers);
        }
    }

    fn interrupted(&self) -> bool {
        self.attempt.failed.load(Ordering::Relaxed) || self.attempt.watcher.interrupted()
    }

    fn wants_snapshot(&self) -> bool {
        self.seat.rank == 0 && self.attempt.watcher.wants_snapshot(self.seat)
    }

    fn snapshot(&self, snapshot: Snapshot) -> Result<()> {
        self.attempt.watcher.save(self.seat, self.windows, snapshot)
    }
}
