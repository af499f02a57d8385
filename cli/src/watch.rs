//! Follows a run: keeps its scores and hidden states for the same command, tells how far it is.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ctq_model::window::{Window, WindowScores};
use ctq_runtime::crew::{Replanned, Watcher};
use ctq_runtime::{Error, Layout, Plans, Seat, Snapshot};

use crate::interrupt;
use crate::progress::{Progress, Unit};
use crate::report::Report;
use crate::resume::{ResumeState, group_name};

/// What is followed.
pub(crate) struct Followed<'a> {
    /// What progress calls it.
    pub(crate) name: &'a str,
    /// Windows in all.
    pub(crate) windows: usize,
    /// All seats.
    pub(crate) layout: Layout,
    /// Hidden states are kept no more often.
    pub(crate) save_every: Duration,
    /// Where scores and hidden states are kept.
    pub(crate) state: &'a ResumeState,
}

/// Follows a run.
pub(crate) struct Watch<'a> {
    followed: Followed<'a>,
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

impl<'a> Watch<'a> {
    /// Of a run some windows of which have their scores.
    pub(crate) fn new(followed: Followed<'a>, scores: Vec<WindowScores>, report: &'a Report) -> Watch<'a> {
        let inner = Inner { scores, progress: None, steps: Vec::new(), saved: Vec::new() };
        Watch { followed, report, inner: Mutex::new(inner) }
    }

    /// Windows that have no scores yet.
    pub(crate) fn left(&self) -> usize {
        self.followed.windows - self.inner().scores.len()
    }

    /// Keeps the scores of a group.
    pub(crate) fn keep(&self, scores: Vec<WindowScores>) -> Result<(), Error> {
        let mut inner = self.inner();
        let before = inner.scores.len();
        inner.scores.extend(scores);
        let saved = self.followed.state.save(&inner.scores);
        if saved.is_err() {
            inner.scores.truncate(before);
        }
        saved
    }

    /// The hidden states of a replica's group are wanted no more.
    pub(crate) fn forget_snapshot(&self, seat: Seat) {
        self.followed.state.forget_snapshot(seat.replica);
    }

    /// The seats.
    pub(crate) fn layout(&self) -> &Layout {
        &self.followed.layout
    }

    fn inner(&self) -> MutexGuard<'_, Inner<'a>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end: all scores.
    pub(crate) fn finish(self) -> Vec<WindowScores> {
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
        let name = self.followed.name;
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
        inner.steps = vec![0; self.followed.layout.seats()];
        inner.saved = vec![Instant::now(); self.followed.layout.replicas];
    }

    fn replanned(&self, replanned: &Replanned) {
        // A snapshot stays: where the next group has the same windows, it goes on from there.
        self.report.warning(&format!("{}: {replanned}", self.followed.name));
    }

    fn advanced(&self, seat: Seat, steps: usize) {
        let mut inner = self.inner();
        if let Some(done) = inner.steps.get_mut(self.followed.layout.index(seat)) {
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
        let due = self.inner().saved[seat.replica].elapsed() >= self.followed.save_every;
        due || interrupt::requested()
    }

    fn save(&self, seat: Seat, windows: &[Window], snapshot: Snapshot) -> Result<(), Error> {
        snapshot.save(&self.followed.state.snapshot_path(seat.replica), &group_name(windows))?;
        self.inner().saved[seat.replica] = Instant::now();
        Ok(())
    }

    fn saved(&self, seat: Seat, windows: &[Window]) -> Option<Snapshot> {
        self.followed.state.snapshot(&group_name(windows), seat.replica, self.report)
    }

    fn scored(&self, seat: Seat, scores: Vec<WindowScores>) -> Result<(), Error> {
        self.keep(scores)?;
        self.forget_snapshot(seat);
        Ok(())
    }
}
