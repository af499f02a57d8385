//! All windows of a run, group by group, planned again with less where the device has no room. Saves nothing and tells
//! nobody: the caller does, between the groups.

use ctq_container::LayerSource;
use ctq_kernels::Backend;
use ctq_model::window::{Window, WindowScores};

use crate::engine::{Engine, Settings};
use crate::error::{Error, Result};
use crate::needs::Needs;
use crate::observer::Observer;
use crate::plan::{Plan, Pool, plan};
use crate::snapshot::Snapshot;

/// What a run may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Memory.
    pub pool: Pool,
    /// Bytes that the backend takes on its device whatever runs.
    pub scratch: u64,
    /// Ranks that share each linear.
    pub ranks: usize,
}

/// Windows that are scored group by group.
pub struct Run<'a, B: Backend> {
    engine: Engine<'a, B>,
    needs: Needs,
    resources: Resources,
    /// Rows of the head that the softmax runs over.
    vocabulary: usize,
    /// All that were not scored when the plan was made.
    windows: Vec<Window>,
    plan: Plan,
    /// The next group of the plan.
    next: usize,
}

/// What became of a group.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Its scores, in the order of its windows.
    Scored(Vec<WindowScores>),
    /// There was no room: a new plan has been made for all windows that are left.
    Replanned(Replanned),
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

impl<'a, B: Backend> Run<'a, B> {
    /// Plans a run over `windows`. `vocabulary`: rows of the head that the softmax runs over.
    ///
    /// # Errors
    /// Where there is no room for one window.
    pub fn new(
        backend: &'a B,
        source: &'a dyn LayerSource,
        settings: Settings,
        windows: Vec<Window>,
        vocabulary: usize,
        resources: Resources,
    ) -> Result<Run<'a, B>> {
        let needs = Needs::of(source.inventory(), resources.ranks);
        let plan = plan(&needs, resources.pool, resources.scratch, &lengths(&windows))?;
        let engine = Engine::new(backend, source, settings).with_schedule(plan.schedule);
        Ok(Run { engine, needs, resources, vocabulary, windows, plan, next: 0 })
    }

    /// How the windows that are left, and those scored since it was made, are cut.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Groups of the plan that are scored.
    pub fn groups_done(&self) -> usize {
        self.next
    }

    /// Windows of the group that comes next; `None`: all are scored.
    pub fn next_group(&self) -> Option<&[Window]> {
        self.plan.groups.get(self.next).map(|group| &self.windows[group.clone()])
    }

    /// Scores the next group; nothing where none is left. `resume` continues from a snapshot of it.
    ///
    /// # Errors
    /// As [`Engine::score`]; without room only where no plan with less is left.
    pub fn score_group(&mut self, resume: Option<Snapshot>, observer: &dyn Observer) -> Result<Outcome> {
        let Some(windows) = self.next_group() else { return Ok(Outcome::Scored(Vec::new())) };
        match self.engine.score(windows, self.vocabulary, resume, observer) {
            Ok(scores) => {
                self.next += 1;
                Ok(Outcome::Scored(scores))
            }
            Err(error) => match error.out_of_memory() {
                Some((device, wanted)) => {
                    let device = device.to_owned();
                    self.replan(device, wanted).map(Outcome::Replanned)
                }
                None => Err(error),
            },
        }
    }

    /// Makes a plan for the windows that are left that takes less than the last.
    fn replan(&mut self, device: String, wanted: u64) -> Result<Replanned> {
        let scored = self.plan.groups.get(self.next).map_or(self.windows.len(), |group| group.start);
        let Some((pool, plan)) = self.smaller(&lengths(&self.windows[scored..])) else {
            return Err(Error::NoRoom { device, wanted, needed: self.plan.device_bytes });
        };
        self.engine.reschedule(plan.schedule);
        self.resources.pool = pool;
        (self.plan, self.next) = (plan, 0);
        self.windows.drain(..scored);
        Ok(Replanned {
            device,
            wanted,
            windows: self.windows.len(),
            groups: self.plan.groups.len(),
            batch_tokens: self.plan.schedule.batch_tokens,
        })
    }

    /// A plan with half the memory, or less where half makes no difference; in the end with what one window needs.
    fn smaller(&self, lengths: &[usize]) -> Option<(Pool, Plan)> {
        let Resources { mut pool, scratch, .. } = self.resources;
        let taken = |plan: &Plan| plan.device_bytes;
        while !pool.is_empty() {
            pool = pool.half();
            match plan(&self.needs, pool, scratch, lengths) {
                Ok(plan) if taken(&plan) < taken(&self.plan) => return Some((pool, plan)),
                Ok(_) => {}
                Err(least) => {
                    pool = pool.with_device(least.needed);
                    let plan = plan(&self.needs, pool, scratch, lengths).ok()?;
                    return (taken(&plan) < taken(&self.plan)).then_some((pool, plan));
                }
            }
        }
        None
    }
}

fn lengths(windows: &[Window]) -> Vec<usize> {
    windows.iter().map(|window| window.ids.len()).collect()
}
