//! The processes that work on one command: this one alone, or one of several that a launcher has started. What they agree
//! on before they begin, and how they end together.

use std::collections::BTreeMap;
use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use ctq_cluster::{Failure, Group, Launch, Launcher, Limits, World};
use ctq_kernels::KernelError;
use ctq_kernels::collective::{Peers, Pipe};

use crate::args::{LaunchOptions, LauncherChoice};
use crate::exit::{Verdict, code_number, verdict_of};
use crate::interrupt;
use crate::report::{self, Report};

/// Time that a process has to end by itself when another is lost, before it is ended: it may wait for a device that waits
/// for the lost one.
const GRACE: Duration = Duration::from_secs(6);

/// How often the wait for other processes looks for a signal.
const LOOK: Duration = Duration::from_millis(50);

/// The channel of all processes.
const EVERYONE: u16 = 0;

/// The processes that work on one command.
pub(crate) enum Party {
    /// This one.
    Alone,
    /// Several, of which this is one.
    Several(Several),
}

/// One of several processes.
pub(crate) struct Several {
    pub(crate) world: Arc<World>,
    pub(crate) launch: Launch,
    everyone: Group,
    /// Runs that were begun: each has channels of its own.
    runs: AtomicU16,
}

/// What reaches other processes, without a word of its own about an end: the party tells them, with the exit code that is
/// due.
#[derive(Debug)]
pub(crate) struct ToldByParty<T>(pub(crate) T);

impl<P: Peers> Peers for ToldByParty<P> {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn ranks(&self) -> usize {
        self.0.ranks()
    }

    fn exchange(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, KernelError> {
        self.0.exchange(parts)
    }

    fn abort(&self, _reason: &str) {}
}

impl<P: Pipe> Pipe for ToldByParty<P> {
    fn send(&self, hidden: Vec<f32>) -> Result<(), KernelError> {
        self.0.send(hidden)
    }

    fn receive(&self) -> Result<Vec<f32>, KernelError> {
        self.0.receive()
    }

    fn abort(&self, _reason: &str) {}
}

/// What processes must have in common, by name.
pub(crate) type Facts = BTreeMap<&'static str, String>;

impl Party {
    /// Looks whether a launcher has started several processes, and waits for the others where it has.
    ///
    /// # Errors
    /// Where the launcher's variables contradict one another, or not all processes come together.
    pub(crate) fn join(options: &LaunchOptions, report: &Report) -> anyhow::Result<Party> {
        let Some(launch) = Party::launch(options)? else { return Ok(Party::Alone) };
        report.as_rank(launch.rank)?;
        report.note(&format!(
            "waiting for {} processes at {}:{}, at most {:.0} s",
            launch.ranks, launch.address, launch.port, options.wait
        ));
        let limits = Limits { wait: Duration::from_secs_f64(options.wait), ..Limits::default() };
        let world = join(launch.clone(), limits)?;
        world.notes().iter().for_each(|note| report.warning(note));
        let everyone = world.group(&(0..world.ranks()).collect::<Vec<_>>(), EVERYONE);
        world.on_failure(|failure| end_soon(failure.clone()));
        Ok(Party::Several(Several { world, launch, everyone, runs: AtomicU16::new(0) }))
    }

    /// What a launcher has said of this process; nothing where it is alone.
    ///
    /// # Errors
    /// Where that contradicts itself.
    pub(crate) fn launch(options: &LaunchOptions) -> anyhow::Result<Option<Launch>> {
        Ok(Launch::detect(options.launcher.into(), &|name| env::var(name).ok())?)
    }

    /// Whether to stop before what comes next: on all processes where one has had a signal.
    pub(crate) fn stops(&self) -> bool {
        let own = interrupt::requested();
        match self {
            Party::Alone => own,
            Party::Several(several) => {
                let said = several.everyone.exchange(vec![vec![u8::from(own)]; several.world.ranks()]);
                said.map_or(true, |said| said.iter().any(|said| said == &[1]))
            }
        }
    }

    /// Whether this process prints the results and keeps the scores.
    pub(crate) fn leads(&self) -> bool {
        match self {
            Party::Alone => true,
            Party::Several(several) => several.world.rank() == 0,
        }
    }

    /// Which of the processes on this machine this is, where there are several.
    pub(crate) fn process(&self) -> Option<usize> {
        match self {
            Party::Alone => None,
            Party::Several(several) => Some(several.launch.local_rank),
        }
    }

    /// Processes that share this machine, this one among them, as far as the launcher tells.
    pub(crate) fn neighbours(&self) -> usize {
        match self {
            Party::Alone => 1,
            Party::Several(several) => several.launch.local_ranks.unwrap_or(1),
        }
    }

    /// Fails on all processes where one has failed, or some of what they do is not the same. `own`: this one's, or why it
    /// cannot go on.
    ///
    /// # Errors
    /// As said; where a process is lost.
    pub(crate) fn agree(&self, own: Result<Facts, String>) -> anyhow::Result<()> {
        let Party::Several(several) = self else {
            return own.map(drop).map_err(|reason| anyhow!("{reason}"));
        };
        let said = serde_json::to_vec(&own).context("facts are text")?;
        let all = several.everyone.exchange(vec![said; several.world.ranks()])?;
        let all = all.iter().map(|said| serde_json::from_slice(said));
        let all: Vec<Result<BTreeMap<String, String>, String>> =
            all.collect::<Result<_, _>>().context("what another process does is not understood")?;
        if let Err(reason) = own {
            bail!("{reason}");
        }
        for (rank, said) in all.iter().enumerate() {
            let name = several.world.name(rank);
            let facts = said.as_ref().map_err(|reason| anyhow!("{name}: {reason}"))?;
            let Ok(first) = &all[0] else { continue };
            if let Some((what, here)) = facts.iter().find(|(what, here)| first.get(*what) != Some(here)) {
                let there = first.get(what).map_or("nothing", String::as_str);
                bail!(
                    "{name} has another {what} than {}: {here} and {there}; give all processes the same command, files and version, on machines of one kind",
                    several.world.name(0)
                );
            }
        }
        Ok(())
    }

    /// What the first process says, on all of them.
    ///
    /// # Errors
    /// Where a process is lost.
    pub(crate) fn of_first(&self, own: Vec<u8>) -> anyhow::Result<Vec<u8>> {
        let Party::Several(several) = self else { return Ok(own) };
        let said = if self.leads() { own } else { Vec::new() };
        Ok(several.everyone.exchange(vec![said; several.world.ranks()])?.swap_remove(0))
    }

    /// The least that any process has of each of several numbers.
    ///
    /// # Errors
    /// Where a process is lost.
    pub(crate) fn least<const N: usize>(&self, own: [u64; N]) -> anyhow::Result<[u64; N]> {
        let Party::Several(several) = self else { return Ok(own) };
        let said: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
        let mut least = own;
        for said in several.everyone.exchange(vec![said; several.world.ranks()])? {
            for (least, number) in least.iter_mut().zip(said.chunks_exact(8)) {
                *least = (*least).min(u64::from_le_bytes(number.try_into().context("eight bytes")?));
            }
        }
        Ok(least)
    }

    /// Ends the work of the other processes, because of an error of this one.
    pub(crate) fn abort(&self, error: &anyhow::Error) {
        if let Party::Several(several) = self {
            several.abort(error);
        }
    }

    /// The verdict of all where the party is over before its end.
    pub(crate) fn verdict_of_failure(&self) -> Option<Verdict> {
        match self {
            Party::Alone => None,
            Party::Several(several) => {
                several.world.failure().map(|failure| Verdict::of_number(failure.exit))
            }
        }
    }

    /// The end of the command, which all processes come to together and with the verdict of the first.
    pub(crate) fn leave(self, own: Verdict, report: &Report) -> Verdict {
        let Party::Several(several) = &self else { return own };
        if let Some(verdict) = self.verdict_of_failure() {
            return verdict;
        }
        let said = self.of_first(vec![code_number(own)]);
        several.world.leave();
        match (said.as_deref(), several.world.failure()) {
            (Ok([number]), _) => Verdict::of_number(*number).max(own),
            (Ok(_) | Err(_), Some(failure)) if self.leads() => {
                report.warning(&format!("the result is whole, and then: {}", failure.what));
                own
            }
            (Ok(_) | Err(_), Some(failure)) => {
                report.failure(&anyhow!("{}", failure.what));
                Verdict::of_number(failure.exit)
            }
            (Ok(_) | Err(_), None) => Verdict::Unfinished,
        }
    }
}

impl Several {
    /// As [`Party::abort`].
    pub(crate) fn abort(&self, error: &anyhow::Error) {
        // What went wrong, without what is true of this process alone.
        let cause = error.chain().find(|cause| cause.is::<ctq_runtime::Error>());
        let what = cause.map_or_else(|| report::chain(error), ToString::to_string);
        self.world.abort(&what, code_number(verdict_of(error)));
    }

    /// The channels of the next run: among the ranks of a stage, and from one stage to the next. All processes begin the
    /// same runs in the same order.
    pub(crate) fn channels(&self) -> (u16, u16) {
        let run = self.runs.fetch_add(1, Ordering::Relaxed) % (u16::MAX / 2);
        (2 * run + 1, 2 * run + 2)
    }

    /// Waits until all processes have come here.
    pub(crate) fn together(&self) -> Result<(), KernelError> {
        self.everyone.exchange(vec![Vec::new(); self.world.ranks()]).map(drop)
    }
}

/// Brings all processes together; a signal ends the wait.
fn join(launch: Launch, limits: Limits) -> anyhow::Result<Arc<World>> {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(World::join(&launch, env!("CARGO_PKG_VERSION"), limits)));
    loop {
        match told.recv_timeout(LOOK) {
            Ok(joined) => return Ok(joined?),
            Err(RecvTimeoutError::Timeout) if interrupt::requested() => {
                let told = "interrupted while waiting for the other processes; the same command starts again";
                return Err(anyhow::Error::from(ctq_runtime::Error::Interrupted).context(told));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("the processes could not be brought together"),
        }
    }
}

/// Ends this process if it has not ended by itself soon.
#[expect(clippy::print_stderr, reason = "nobody is left to report")]
fn end_soon(failure: Failure) {
    std::thread::spawn(move || {
        std::thread::sleep(GRACE);
        eprintln!("error: {}", failure.what);
        std::process::exit(i32::from(failure.exit));
    });
}

impl From<LauncherChoice> for Launcher {
    fn from(choice: LauncherChoice) -> Launcher {
        match choice {
            LauncherChoice::Auto => Launcher::Auto,
            LauncherChoice::None => Launcher::None,
            LauncherChoice::Torchrun => Launcher::Torchrun,
            LauncherChoice::Slurm => Launcher::Slurm,
            LauncherChoice::Mpi => Launcher::Mpi,
        }
    }
}
