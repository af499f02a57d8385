//! Scoring windows with one model: groups by memory, progress, and the resume state that a kill leaves behind.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;
use ctq_container::LayerSource;
use ctq_eval::partial::{self, Saved};
use ctq_kernels::Backend;
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::{Error, Observer, Outcome, Plan, Resources, Settings, Snapshot};
use sha2::{Digest, Sha256};

use crate::args::EngineOptions;
use crate::device::{HeadUse, OnBackend, Opened};
use crate::exit::{Verdict, verdict_of};
use crate::progress::{Progress, Unit};
use crate::report::Report;
use crate::{cache, interrupt, machine};

/// One scoring run.
pub(crate) struct Run<'a> {
    pub(crate) source: &'a dyn LayerSource,
    pub(crate) settings: Settings,
    pub(crate) engine: &'a EngineOptions,
    pub(crate) device: &'a Opened,
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

/// A run on a backend.
struct Task<'a> {
    run: &'a Run<'a>,
    resources: Resources,
    report: &'a Report,
}

impl OnBackend for Task<'_> {
    type Output = anyhow::Result<Scored>;

    fn run<B: Backend>(self, backend: &B) -> anyhow::Result<Scored> {
        self.run.on(backend, self.resources, self.report)
    }
}

/// What a run gives.
pub(crate) struct Scored {
    /// One for each window, in order.
    pub(crate) scores: Vec<WindowScores>,
    /// Tokens that this run fed to the model; those of an earlier, killed run are not among them.
    pub(crate) fed: usize,
    /// The scores on disk, kept until the whole command is done.
    pub(crate) kept: ResumeState,
}

impl Run<'_> {
    /// Scores all windows; goes on from what an earlier, killed run of the same key left.
    pub(crate) fn score(&self, report: &Report) -> anyhow::Result<Scored> {
        let pool = machine::pool(self.engine.threads)?;
        let ranks = self.engine.tp;
        let resources =
            self.device.resources(self.memory, ranks, self.source.inventory(), HeadUse::Blocks)?;
        pool.install(|| self.device.on(ranks, Task { run: self, resources, report }))
    }

    fn on<B: Backend>(&self, backend: &B, resources: Resources, report: &Report) -> anyhow::Result<Scored> {
        let state = ResumeState::open(self.key, report)?;
        let mut scores = state.scores(self.windows, report);
        let open: Vec<Window> = self
            .windows
            .iter()
            .filter(|window| !scores.iter().any(|s| s.window == window.index))
            .cloned()
            .collect();
        let fed = open.iter().map(|window| window.ids.len()).sum();
        let mut windows_left = open.len();
        let mut run =
            ctq_runtime::Run::new(backend, self.source, self.settings, open, self.vocabulary, resources)?;
        let mut progress = self.progress(run.plan(), windows_left, report);
        while let Some(windows) = run.next_group() {
            let watch = self.watch(&progress, run.groups_done(), &state, windows);
            let snapshot = state.snapshot(&watch.group, report);
            let done = scores.len();
            match run.score_group(snapshot, &watch).map_err(|error| self.told(error.into(), done))? {
                Outcome::Scored(group) => {
                    windows_left -= group.len();
                    scores.extend(group);
                    state.save(&scores).map_err(|error| self.told(error, done))?;
                    state.forget_snapshot();
                }
                // A snapshot stays: where the next group has the same windows, it goes on from there.
                Outcome::Replanned(replanned) => {
                    report.warning(&format!("{}: {replanned}", self.name));
                    progress.finish();
                    progress = self.progress(run.plan(), windows_left, report);
                }
            }
        }
        progress.finish();
        scores.sort_by_key(|scores| scores.window);
        Ok(Scored { scores, fed, kept: state })
    }

    /// Steps of a group: its layers, and the head.
    fn steps(&self) -> usize {
        self.source.inventory().spec.blocks.len() + 1
    }

    /// Progress over a plan, which is told too.
    fn progress<'r>(&self, plan: &Plan, windows: usize, report: &'r Report) -> Progress<'r> {
        let gibibytes = |bytes: u64| bytes as f64 / (1_u64 << 30) as f64;
        report.detail(&format!(
            "{}: {windows} windows in {} groups, {} tokens at a time, about {:.2} GiB",
            self.name,
            plan.groups.len(),
            plan.schedule.batch_tokens,
            gibibytes(plan.device_bytes + plan.host_bytes)
        ));
        Progress::new(report, self.name, Unit::Layers, (self.steps() * plan.groups.len()) as u64)
    }

    fn watch<'w>(
        &self,
        progress: &'w Progress<'w>,
        groups_done: usize,
        state: &'w ResumeState,
        windows: &[Window],
    ) -> Watch<'w> {
        Watch {
            progress,
            before: groups_done * self.steps(),
            state,
            group: group_name(windows),
            every: self.save_every,
            last: Mutex::new(Cell::new(Instant::now())),
        }
    }

    /// An error, and what is done already where the same command goes on.
    fn told(&self, error: anyhow::Error, done: usize) -> anyhow::Error {
        match verdict_of(&error) {
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

/// A group by its windows: a snapshot belongs to exactly these.
fn group_name(windows: &[Window]) -> String {
    windows.iter().map(|window| window.index.to_string()).collect::<Vec<_>>().join(",")
}

/// Scores of finished groups, and the hidden states of the one under way, in the cache folder.
pub(crate) struct ResumeState {
    folder: PathBuf,
    key: String,
}

impl ResumeState {
    fn open(key: &str, report: &Report) -> anyhow::Result<ResumeState> {
        let folder = cache::folder()?.join("eval");
        // Found out now, not after the first hour.
        std::fs::create_dir_all(&folder).with_context(|| {
            format!("{}: cannot be made; set CTQ_CACHE to a folder that can be written", folder.display())
        })?;
        let digest = Sha256::digest(key.as_bytes());
        let key: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        report.detail(&format!("resume state: {}", folder.join(&key).display()));
        Ok(ResumeState { folder, key })
    }

    fn snapshot_path(&self) -> PathBuf {
        self.folder.join(format!("{}.snapshot", self.key))
    }

    fn scores(&self, windows: &[Window], report: &Report) -> Vec<WindowScores> {
        match partial::load(&self.folder, &self.key) {
            Ok(Saved::Scores(scores)) => {
                report.note(&format!(
                    "going on: {} of {} windows are scored already",
                    scores.len(),
                    windows.len()
                ));
                scores
            }
            Ok(Saved::Nothing) => Vec::new(),
            Ok(Saved::Ignored { reason }) => {
                report.warning(&format!("resume state is not usable and is ignored: {reason}"));
                Vec::new()
            }
            Err(error) => {
                report.warning(&format!("resume state is not usable and is ignored: {error}"));
                Vec::new()
            }
        }
    }

    fn snapshot(&self, group: &str, report: &Report) -> Option<Snapshot> {
        let snapshot = Snapshot::load(&self.snapshot_path(), group)?;
        report.note(&format!("going on after layer {} of this group", snapshot.layer));
        Some(snapshot)
    }

    fn save(&self, scores: &[WindowScores]) -> anyhow::Result<()> {
        Ok(partial::save(&self.folder, &self.key, scores)?)
    }

    fn forget_snapshot(&self) {
        remove(&self.snapshot_path());
    }

    /// Nothing is left to go on with.
    pub(crate) fn forget(&self) {
        let _ = partial::remove(&self.folder, &self.key);
        self.forget_snapshot();
    }
}

fn remove(path: &Path) {
    // It may never have been written; and a leftover is harmless, for it only fits its own key.
    let _ = std::fs::remove_file(path);
}

/// Follows one group.
struct Watch<'a> {
    progress: &'a Progress<'a>,
    /// Steps of the groups before.
    before: usize,
    state: &'a ResumeState,
    group: String,
    every: Duration,
    last: Mutex<Cell<Instant>>,
}

impl Observer for Watch<'_> {
    fn advanced(&self, layers: usize) {
        self.progress.at((self.before + layers) as u64);
    }

    fn interrupted(&self) -> bool {
        interrupt::requested()
    }

    fn wants_snapshot(&self) -> bool {
        let due = self.last.lock().is_ok_and(|last| last.get().elapsed() >= self.every);
        due || interrupt::requested()
    }

    fn snapshot(&self, snapshot: Snapshot) -> Result<(), Error> {
        snapshot.save(&self.state.snapshot_path(), &self.group)?;
        if let Ok(last) = self.last.lock() {
            last.set(Instant::now());
        }
        Ok(())
    }
}
