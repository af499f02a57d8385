//! All connections of one rank, seen as one: what has come from whom, who is still there, and why the job has failed.
//!
//! Each connection has a thread that writes and one that reads; one more watches how long each rank has been silent.
//! Readers never wait for whoever should take a message, and writers never for a reader of ours, so that signs of life
//! go on whatever the rest of the process does.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ctq_kernels::KernelError;

use crate::limits::Limits;
use crate::link::{Ended, Failure, Incoming, Outgoing, read_frames, write_frames};

/// Exit code of a job that the same command continues.
pub(crate) const UNFINISHED: u8 = 3;
/// How long a rank that ends waits until it has told the others.
const FAREWELL: Duration = Duration::from_secs(1);
/// The tag of mail. Other tags have the kind of channel in their upper half.
pub(crate) const MAIL: u32 = 0;

type Callback = Box<dyn FnOnce(&Failure) + Send>;

pub(crate) struct Mesh {
    rank: usize,
    names: Vec<String>,
    limits: Limits,
    /// One a rank; none for this one.
    links: Vec<Option<Link>>,
    state: Mutex<State>,
    changed: Condvar,
    /// As in the state, for writers in the middle of a message.
    failed: AtomicBool,
    start: Instant,
    /// When the watch looked last, and when it found last that this process had stood still; milliseconds since the start.
    ticked: AtomicU64,
    woke: AtomicU64,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Link {
    socket: TcpStream,
    queue: Sender<Outgoing>,
    /// When bytes last came, in milliseconds since the start.
    heard: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Presence {
    Here,
    /// It has said goodbye.
    Left,
    /// Its connection is closed.
    Closed,
}

struct State {
    /// What has come and was not taken, by rank and tag.
    messages: BTreeMap<(usize, u32), VecDeque<Vec<u8>>>,
    /// Mail from all ranks, in the order of coming.
    mail: VecDeque<(usize, Vec<u8>)>,
    presence: Vec<Presence>,
    /// Ranks that have read everything up to the goodbye of this one.
    seen: Vec<bool>,
    /// Ranks to which nothing more is written.
    written: Vec<bool>,
    failure: Option<Failure>,
    /// This rank has said goodbye, or ends without.
    leaving: bool,
    callbacks: Vec<Callback>,
}

impl fmt::Debug for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mesh").field("rank", &self.rank).field("names", &self.names).finish_non_exhaustive()
    }
}

impl Mesh {
    /// Takes over `sockets`, one a rank and none for this one.
    pub(crate) fn start(
        rank: usize,
        names: Vec<String>,
        sockets: Vec<Option<TcpStream>>,
        limits: Limits,
    ) -> io::Result<Arc<Mesh>> {
        let ranks = sockets.len();
        let (mut links, mut queues) = (Vec::new(), Vec::new());
        for socket in sockets {
            let Some(socket) = socket else {
                links.push(None);
                queues.push(None);
                continue;
            };
            socket.set_nodelay(true)?;
            socket.set_read_timeout(None)?;
            socket.set_write_timeout(Some(limits.silence))?;
            let (queue, queued) = mpsc::channel();
            links.push(Some(Link { socket, queue, heard: AtomicU64::new(0) }));
            queues.push(Some(queued));
        }
        let alone = |index: usize| index == rank;
        let state = State {
            messages: BTreeMap::new(),
            mail: VecDeque::new(),
            presence: vec![Presence::Here; ranks],
            seen: (0..ranks).map(alone).collect(),
            written: (0..ranks).map(alone).collect(),
            failure: None,
            leaving: false,
            callbacks: Vec::new(),
        };
        let mesh = Arc::new(Mesh {
            rank,
            names,
            limits,
            links,
            state: Mutex::new(state),
            changed: Condvar::new(),
            failed: AtomicBool::new(false),
            start: Instant::now(),
            ticked: AtomicU64::new(0),
            woke: AtomicU64::new(0),
            threads: Mutex::default(),
        });
        mesh.spawn_all(queues).inspect_err(|_| mesh.close())?;
        Ok(mesh)
    }

    fn spawn_all(self: &Arc<Mesh>, queues: Vec<Option<Receiver<Outgoing>>>) -> io::Result<()> {
        for (peer, queue) in queues.into_iter().enumerate() {
            let Some(queue) = queue else { continue };
            self.spawn(format!("ctq-write-{peer}"), move |mesh| mesh.write(peer, &queue))?;
            self.spawn(format!("ctq-read-{peer}"), move |mesh| mesh.read(peer))?;
        }
        self.spawn("ctq-watch".to_owned(), |mesh| mesh.watch())
    }

    fn spawn(
        self: &Arc<Mesh>,
        name: String,
        work: impl FnOnce(&Arc<Mesh>) + Send + 'static,
    ) -> io::Result<()> {
        let mesh = Arc::clone(self);
        let thread = thread::Builder::new().name(name).spawn(move || work(&mesh))?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn ranks(&self) -> usize {
        self.names.len()
    }

    pub(crate) fn name(&self, rank: usize) -> &str {
        &self.names[rank]
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self, rank: usize) -> &Link {
        self.links[rank].as_ref().expect("a rank has no connection to itself, and its callers know")
    }

    /// Waits while `goes_on`, at most until `limit`.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        limit: Duration,
        goes_on: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout_while(state, limit, |state| goes_on(state));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    // What callers do.

    /// Hands `bytes` to a rank; returns at once.
    pub(crate) fn send(self: &Arc<Mesh>, to: usize, tag: u32, bytes: Vec<u8>) -> Result<(), KernelError> {
        let mut state = self.lock();
        if let Some(failure) = &state.failure {
            return Err(lost(failure));
        }
        if to == self.rank {
            state.take_in(to, tag, bytes);
            self.changed.notify_all();
            return Ok(());
        }
        match state.presence[to] {
            Presence::Here => {}
            Presence::Left | Presence::Closed => return Err(self.left_early(&mut state, to)),
        }
        // A writer that has ended will have told why, or its reader will.
        let _ = self.link(to).queue.send(Outgoing::Message { tag, bytes });
        Ok(())
    }

    /// Takes the next message of a rank.
    pub(crate) fn receive(self: &Arc<Mesh>, from: usize, tag: u32) -> Result<Vec<u8>, KernelError> {
        let mut state = self.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(lost(failure));
            }
            if let Some(bytes) = state.messages.get_mut(&(from, tag)).and_then(VecDeque::pop_front) {
                return Ok(bytes);
            }
            match state.presence[from] {
                Presence::Here => {}
                Presence::Left | Presence::Closed => return Err(self.left_early(&mut state, from)),
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the next mail of any rank, which may be older than a failure; `None` after `limit`.
    pub(crate) fn mail(&self, limit: Duration) -> Result<Option<(usize, Vec<u8>)>, KernelError> {
        let goes_on = |state: &State| state.mail.is_empty() && state.failure.is_none();
        let mut state = self.wait(self.lock(), limit, goes_on);
        match (state.mail.pop_front(), &state.failure) {
            (Some(mail), _) => Ok(Some(mail)),
            (None, Some(failure)) => Err(lost(failure)),
            (None, None) => Ok(None),
        }
    }

    /// Tells a rank, where it is still there, that something of it was taken.
    pub(crate) fn acknowledge(&self, to: usize, tag: u32) {
        if self.lock().presence[to] == Presence::Here {
            let _ = self.link(to).queue.send(Outgoing::Message { tag, bytes: Vec::new() });
        }
    }

    pub(crate) fn failure(&self) -> Option<Failure> {
        self.lock().failure.clone()
    }

    /// Gives up for all ranks; returns when they were told, or cannot be.
    pub(crate) fn abort(self: &Arc<Mesh>, reason: &str, exit: u8) {
        let what = format!("{} has given up: {reason}", self.names[self.rank]);
        self.fail(&mut self.lock(), Failure { rank: self.rank, what, exit });
        self.tell(FAREWELL);
    }

    /// Calls back at a failure, from a thread of its own, when other ranks were told.
    pub(crate) fn on_failure(self: &Arc<Mesh>, callback: Callback) {
        let mut state = self.lock();
        state.callbacks.push(callback);
        if state.failure.is_some() {
            self.call_back(&mut state);
        }
    }

    /// Says goodbye, waits until every rank has read it, and ends all connections.
    pub(crate) fn leave(&self) {
        let mut state = self.lock();
        if state.failure.is_none() && !state.leaving {
            state.leaving = true;
            for link in self.links.iter().flatten() {
                let _ = link.queue.send(Outgoing::Goodbye);
            }
            // An end before this is read could take what is still on its way with it.
            let unread = |state: &State| {
                let mut ranks = state.seen.iter().zip(&state.presence);
                state.failure.is_none() && ranks.any(|(seen, presence)| !seen && *presence == Presence::Here)
            };
            state = self.wait(state, self.limits.silence, unread);
        }
        drop(state);
        self.close();
    }

    /// Ends all connections; after a failure, when other ranks were told. What still waits fails.
    pub(crate) fn close(&self) {
        let failed = {
            let mut state = self.lock();
            state.leaving = true;
            state.failure.is_some()
        };
        if failed {
            self.tell(FAREWELL);
        }
        let what = format!("{} has left, and its callers still wait for others", self.names[self.rank]);
        self.lock().failure.get_or_insert(Failure { rank: self.rank, what, exit: UNFINISHED });
        self.failed.store(true, Ordering::Relaxed);
        self.changed.notify_all();
        for link in self.links.iter().flatten() {
            let _ = link.queue.send(Outgoing::Close);
            let _ = link.socket.shutdown(Shutdown::Both);
        }
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            let _ = thread.join();
        }
    }

    // What goes wrong.

    fn left_early(self: &Arc<Mesh>, state: &mut State, rank: usize) -> KernelError {
        let what = format!(
            "{} left early: it was done while others still needed it; start all ranks with the same command",
            self.names[rank]
        );
        let failure = Failure { rank, what, exit: UNFINISHED };
        let error = lost(&failure);
        self.fail(state, failure);
        error
    }

    /// Whoever sees that a rank is gone sees why: both are noted at once.
    fn lose(self: &Arc<Mesh>, rank: usize, how: &str) {
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.presence[rank], Presence::Closed);
        if !state.leaving && before == Presence::Here {
            // What the others have said of a rank that was stopped goes with their connections: it blames itself.
            let (rank, how) =
                if self.was_stopped() { (self.rank, self.silent()) } else { (rank, how.to_owned()) };
            let what =
                format!("{} is lost: {how}; the same command goes on where this one was", self.names[rank]);
            self.fail(&mut state, Failure { rank, what, exit: UNFINISHED });
        }
        self.changed.notify_all();
    }

    fn silent(&self) -> String {
        format!("nothing was heard of it for {} s", self.limits.silence.as_secs_f32())
    }

    /// Whether this process stood still for so long, and until so lately, that the others may have given it up.
    fn was_stopped(&self) -> bool {
        let half = u64::try_from(self.limits.silence.as_millis() / 2).unwrap_or(u64::MAX);
        let (ticked, woke) = (self.ticked.load(Ordering::Relaxed), self.woke.load(Ordering::Relaxed));
        self.now().saturating_sub(ticked) > half || woke > 0 && self.now().saturating_sub(woke) < half
    }

    /// Ends the job for all ranks. The first failure is the one that counts.
    fn fail(self: &Arc<Mesh>, state: &mut State, failure: Failure) {
        if state.failure.is_some() {
            return;
        }
        state.failure = Some(failure.clone());
        self.failed.store(true, Ordering::Relaxed);
        for link in self.links.iter().flatten() {
            let _ = link.queue.send(Outgoing::Abort(failure.clone()));
        }
        self.call_back(state);
        self.changed.notify_all();
    }

    fn call_back(self: &Arc<Mesh>, state: &mut State) {
        let callbacks = std::mem::take(&mut state.callbacks);
        let Some(failure) = state.failure.clone().filter(|_| !callbacks.is_empty()) else { return };
        let mesh = Arc::clone(self);
        // Not one of the threads that are waited for at the end: what is called may end this rank.
        thread::spawn(move || {
            mesh.tell(FAREWELL);
            callbacks.into_iter().for_each(|callback| callback(&failure));
        });
    }

    /// Waits until all writers have written their last.
    fn tell(&self, limit: Duration) {
        let unwritten = |state: &State| state.written.iter().any(|written| !written);
        drop(self.wait(self.lock(), limit, unwritten));
    }

    // What the threads do.

    fn write(self: &Arc<Mesh>, peer: usize, queue: &Receiver<Outgoing>) {
        let socket = &self.link(peer).socket;
        let written = write_frames(socket, queue, self.limits.beat(), &self.failed);
        // The other side reads to the end of what was written; this one goes on reading.
        let _ = socket.shutdown(Shutdown::Write);
        self.lock().written[peer] = true;
        self.changed.notify_all();
        // Where the connection is closed the reader finds out, after what came before, which may say why.
        if let Err(error) = written
            && matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
        {
            self.lose(peer, &format!("it has taken nothing for {} s", self.limits.silence.as_secs_f32()));
        }
    }

    fn read(self: &Arc<Mesh>, peer: usize) {
        let link = self.link(peer);
        let heard = || link.heard.store(self.now(), Ordering::Relaxed);
        let ended = read_frames(&link.socket, heard, |incoming| self.take_in(peer, incoming));
        match ended {
            Ended::Closed => self.lose(peer, "its connection closed"),
            Ended::Garbage => self.lose(peer, "what it sends is no message"),
            Ended::Failed(error) => self.lose(peer, &format!("its connection failed ({error})")),
        }
    }

    fn take_in(self: &Arc<Mesh>, peer: usize, incoming: Incoming) {
        match incoming {
            Incoming::Message { tag, bytes } => self.lock().take_in(peer, tag, bytes),
            Incoming::Abort(failure) => self.fail(&mut self.lock(), failure),
            Incoming::Goodbye => {
                self.lock().presence[peer] = Presence::Left;
                let _ = self.link(peer).queue.send(Outgoing::Seen);
            }
            Incoming::Seen => self.lock().seen[peer] = true,
        }
        self.changed.notify_all();
    }

    /// Milliseconds since the start.
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn watch(self: &Arc<Mesh>) {
        let (silence, tick) = (self.limits.silence, self.limits.silence / 16);
        loop {
            let before = Instant::now();
            let state = self.wait(self.lock(), tick, |state| state.failure.is_none());
            if state.failure.is_some() {
                return;
            }
            let here = state.presence.clone();
            drop(state);
            // This process itself was stopped: what others have said meanwhile is still to be read.
            let stopped = before.elapsed() > silence / 2;
            self.ticked.store(self.now(), Ordering::Relaxed);
            if stopped {
                self.woke.store(self.now(), Ordering::Relaxed);
            }
            for (peer, link) in self.links.iter().enumerate() {
                let Some(link) = link else { continue };
                if stopped {
                    link.heard.fetch_max(self.now(), Ordering::Relaxed);
                }
                let silent = self.now().saturating_sub(link.heard.load(Ordering::Relaxed));
                if here[peer] == Presence::Here && Duration::from_millis(silent) > silence {
                    self.lose(peer, &self.silent());
                }
            }
        }
    }
}

impl State {
    fn take_in(&mut self, from: usize, tag: u32, bytes: Vec<u8>) {
        if tag == MAIL {
            self.mail.push_back((from, bytes));
        } else {
            self.messages.entry((from, tag)).or_default().push_back(bytes);
        }
    }
}

fn lost(failure: &Failure) -> KernelError {
    KernelError::Lost { what: failure.what.clone() }
}
