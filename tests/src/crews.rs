//! Runs on several seats of one process, without the `ctq` program in between.

use std::num::NonZero;
use std::sync::{Mutex, PoisonError};

use ctq_container::LayerSource;
use ctq_kernels::Backend;
use ctq_kernels::collective::Rank;
use ctq_kernels::cpu::Cpu;
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::crew::{self, Job, Replanned, Watcher};
use ctq_runtime::{Error, Layout, Plans, Pool, Resources, Seat, Settings, Workers};

/// Memory that is enough for anything here.
pub const PLENTY: Resources = Resources { pool: Pool::Shared(1 << 40), scratch: 0 };

/// A model and how it is run.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// The model.
    pub source: &'a dyn LayerSource,
    /// Arithmetic.
    pub settings: Settings,
    /// What each seat may take.
    pub resources: Resources,
}

/// What a run told.
#[derive(Default)]
pub struct Told {
    /// Scores, in the order of windows.
    pub scores: Vec<WindowScores>,
    /// Every plan.
    pub plans: Vec<Plans>,
    /// Why there was another.
    pub replanned: Vec<Replanned>,
}

/// Collects what is told; `before` hears of every group that is scored.
struct Collect<F> {
    told: Mutex<Told>,
    scored: F,
}

impl<F: Fn(usize) + Sync> Watcher for Collect<F> {
    fn planned(&self, plans: &Plans) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).plans.push(plans.clone());
    }

    fn replanned(&self, replanned: &Replanned) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).replanned.push(replanned.clone());
    }

    fn scored(&self, _: Seat, scores: Vec<WindowScores>) -> Result<(), Error> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.scores.extend(scores);
        (self.scored)(told.scores.len());
        Ok(())
    }
}

/// Scores windows on the seats of a layout. `scored` is called after each group with the number of windows that are.
///
/// # Errors
/// As [`crew::run`].
pub fn run<B: Backend + 'static>(
    model: Model<'_>,
    layout: Layout,
    windows: &[Window],
    seats: impl Fn() -> Vec<Rank<B>>,
    scored: impl Fn(usize) + Sync,
) -> Result<Told, Error> {
    let Model { source, settings, resources } = model;
    let job = Job { source, settings, vocabulary: usize::MAX, layout, resources };
    let workers = vec![Workers::anywhere(NonZero::<usize>::MIN); layout.seats()];
    let members = || Ok(crew::in_process(&layout, seats(), workers.clone()));
    let collect = Collect { told: Mutex::default(), scored };
    crew::run(&job, windows.to_vec(), members, &collect)?;
    let mut told = collect.told.into_inner().unwrap_or_else(PoisonError::into_inner);
    told.scores.sort_by_key(|scores| scores.window);
    Ok(told)
}

/// Scores of windows on the CPU, by a layout.
///
/// # Panics
/// If the run fails.
pub fn on_cpu(
    source: &dyn LayerSource,
    settings: Settings,
    layout: Layout,
    windows: &[Window],
) -> Vec<WindowScores> {
    let model = Model { source, settings, resources: PLENTY };
    let seats = || crew::ranks(&layout, Cpu::detect);
    run(model, layout, windows, seats, |_| {}).unwrap_or_else(|error| panic!("{layout}: {error}")).scores
}

/// All numbers of scores.
pub fn bits(scores: &[WindowScores]) -> Vec<(usize, Vec<u64>)> {
    scores.iter().map(|s| (s.window, s.nll.iter().map(|nll| nll.to_bits()).collect())).collect()
}
