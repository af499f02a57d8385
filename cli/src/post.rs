//! What several processes tell one another while they score: each sends its scores and how far it is to the first, which
//! keeps them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use ctq_kernels::bench::Ends;
use ctq_kernels::collective::Pipe;
use ctq_kernels::{Backend, KernelError};
use ctq_model::window::{Window, WindowScores};
use ctq_runtime::crew::{Member, Replanned, Watcher};
use ctq_runtime::{Error, Layout, Plans, Seat, Snapshot, Workers};
use serde::{Deserialize, Serialize};

use crate::party::{Several, ToldByParty};
use crate::seats::Seats;
use crate::watch::Watch;

/// How often the first process looks whether it is done.
const LOOK: Duration = Duration::from_millis(50);
/// No news of progress sooner than this after the last.
const NEWS_EVERY: Duration = Duration::from_millis(200);

/// What one process tells the first.
#[derive(Serialize, Deserialize)]
enum Letter {
    /// Steps of its plan that a seat has done.
    Advanced { seat: usize, steps: usize },
    /// Scores of a group: window, first position, bits of each nll.
    Scored { scores: Vec<(usize, usize, Vec<u64>)> },
}

impl Several {
    /// This process's seat.
    pub(crate) fn member<B: Backend>(
        &self,
        layout: &Layout,
        seats: &dyn Seats<B>,
        workers: Workers,
    ) -> Result<Member<B>, Error> {
        let seat = layout.seat(self.world.rank());
        let stage: Vec<usize> = layout.stage_of(seat).collect();
        let (of_stage, of_pipe) = self.channels();
        let backend = seats.one(ToldByParty(self.world.group(&stage, of_stage)))?;
        let neighbour = |stage: usize| layout.index(Seat { stage, ..seat });
        let incoming = seat.stage.checked_sub(1).map(neighbour);
        let outgoing = (seat.stage + 1 < layout.stages).then(|| neighbour(seat.stage + 1));
        let from = |rank| Box::new(ToldByParty(self.world.pipe_from(rank, of_pipe))) as Box<dyn Pipe>;
        let to = |rank| Box::new(ToldByParty(self.world.pipe_to(rank, of_pipe))) as Box<dyn Pipe>;
        Ok(Member { seat, backend, incoming: incoming.map(from), outgoing: outgoing.map(to), workers })
    }

    /// Pipes between the first two processes, there and back, where this is one of them.
    pub(crate) fn ends(&self) -> Option<Ends> {
        let (_, channel) = self.channels();
        let other = 1_usize.checked_sub(self.world.rank())?;
        Some(Ends {
            outgoing: Box::new(ToldByParty(self.world.pipe_to(other, channel))),
            incoming: Box::new(ToldByParty(self.world.pipe_from(other, channel))),
        })
    }

    /// Does this process's part; the first takes what the others send meanwhile, until it has all scores. All come to the
    /// end together.
    pub(crate) fn run(
        &self,
        part: impl FnOnce() -> anyhow::Result<()>,
        watch: &Watch<'_>,
    ) -> anyhow::Result<()> {
        let part = || part().map_err(|error| self.caused(error));
        if self.world.rank() > 0 {
            part()?;
        } else {
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let post = scope.spawn(|| self.take_letters(watch, &done));
                let own = part().and_then(|()| self.wait_for_all(watch));
                done.store(true, Ordering::Relaxed);
                let post = post.join().map_err(|_| anyhow!("the post was lost"))?;
                // What went wrong with the scores of others ends the own part too.
                post.and(own)
            })?;
        }
        Ok(self.together()?)
    }

    /// What made a run end that was stopped because of another process.
    fn caused(&self, error: anyhow::Error) -> anyhow::Error {
        let was_stopped = matches!(error.downcast_ref(), Some(Error::Interrupted));
        let failure = self.world.failure().filter(|_| was_stopped);
        failure.map_or(error, |failure| KernelError::Lost { what: failure.what }.into())
    }

    /// Waits until every window has its scores.
    fn wait_for_all(&self, watch: &Watch<'_>) -> anyhow::Result<()> {
        while watch.left() > 0 {
            if let Some(failure) = self.world.failure() {
                return Err(KernelError::Lost { what: failure.what }.into());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Takes what other processes send, until the own part is done and all scores are here.
    fn take_letters(&self, watch: &Watch<'_>, done: &AtomicBool) -> anyhow::Result<()> {
        while !done.load(Ordering::Relaxed) {
            // The loss of a rank is told by whatever waits for it.
            let Ok(letter) = self.world.inbox(LOOK) else { return Ok(()) };
            let Some((_, letter)) = letter else { continue };
            let taken = self.take(watch, &letter);
            if let Err(error) = taken {
                self.abort(&error);
                return Err(error);
            }
        }
        Ok(())
    }

    fn take(&self, watch: &Watch<'_>, letter: &[u8]) -> anyhow::Result<()> {
        match serde_json::from_slice(letter).context("what another process sends is not understood")? {
            Letter::Advanced { seat, steps } => watch.advanced(watch.layout().seat(seat), steps),
            Letter::Scored { scores } => {
                let scores = scores.into_iter().map(|(window, first, nll)| WindowScores {
                    window,
                    first,
                    nll: nll.into_iter().map(f64::from_bits).collect(),
                });
                watch.keep(scores.collect())?;
            }
        }
        Ok(())
    }
}

/// Watches the part of one process: keeps hidden states here, and sends the rest to the first process.
pub(crate) struct Posting<'a, 'w> {
    several: &'a Several,
    watch: &'a Watch<'w>,
    sent: Mutex<Option<Instant>>,
}

impl<'a, 'w> Posting<'a, 'w> {
    pub(crate) fn new(several: &'a Several, watch: &'a Watch<'w>) -> Posting<'a, 'w> {
        Posting { several, watch, sent: Mutex::new(None) }
    }

    fn leads(&self) -> bool {
        self.several.world.rank() == 0
    }

    fn send(&self, letter: &Letter) -> Result<(), Error> {
        let bytes = serde_json::to_vec(letter).map_err(|error| Error::Scores(error.into()))?;
        Ok(self.several.world.mail(0, bytes)?)
    }
}

impl Watcher for Posting<'_, '_> {
    fn planned(&self, plans: &Plans) {
        self.watch.planned(plans);
    }

    fn replanned(&self, replanned: &Replanned) {
        self.watch.replanned(replanned);
    }

    fn advanced(&self, seat: Seat, steps: usize) {
        if self.leads() {
            return self.watch.advanced(seat, steps);
        }
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if sent.is_none_or(|sent| sent.elapsed() >= NEWS_EVERY) {
            *sent = Some(Instant::now());
            // Whoever cannot be told is told of otherwise.
            let _ = self.send(&Letter::Advanced { seat: self.watch.layout().index(seat), steps });
        }
    }

    fn interrupted(&self) -> bool {
        // A replica waits for no other, and would go on.
        self.watch.interrupted() || self.several.world.failure().is_some()
    }

    fn wants_snapshot(&self, seat: Seat) -> bool {
        self.watch.wants_snapshot(seat) || self.several.world.failure().is_some()
    }

    fn save(&self, seat: Seat, windows: &[Window], snapshot: Snapshot) -> Result<(), Error> {
        self.watch.save(seat, windows, snapshot)
    }

    fn saved(&self, seat: Seat, windows: &[Window]) -> Option<Snapshot> {
        self.watch.saved(seat, windows)
    }

    fn scored(&self, seat: Seat, scores: Vec<WindowScores>) -> Result<(), Error> {
        if self.leads() {
            return self.watch.scored(seat, scores);
        }
        let bits = |scores: WindowScores| {
            (scores.window, scores.first, scores.nll.iter().map(|nll| nll.to_bits()).collect())
        };
        self.send(&Letter::Scored { scores: scores.into_iter().map(bits).collect() })?;
        self.watch.forget_snapshot(seat);
        Ok(())
    }
}
