//! How much memory a piece of work takes at most: looked at while it runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::machine;

/// How long between two looks. A look takes some tens of microseconds.
const EVERY: Duration = Duration::from_millis(25);

/// The most that was seen, in bytes; `None` where the system does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Peaks {
    /// Memory that is no page of a file.
    pub(super) anonymous: Option<u64>,
    /// All resident pages, of files too.
    pub(super) resident: Option<u64>,
}

/// Does `work` and watches. What was resident before counts.
pub(super) fn watched<T>(work: impl FnOnce() -> T) -> (T, Peaks) {
    machine::reset_peak_memory();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut most = None;
            while !done.load(Ordering::Relaxed) {
                most = most.max(machine::anonymous_memory());
                thread::park_timeout(EVERY);
            }
            most
        });
        // Also where the work unwinds, for the scope waits.
        let ended = End { done: &done, watcher: watcher.thread().clone() };
        let outcome = work();
        drop(ended);
        let anonymous = watcher.join().ok().flatten().max(machine::anonymous_memory());
        (outcome, Peaks { anonymous, resident: machine::peak_memory() })
    })
}

struct End<'a> {
    done: &'a AtomicBool,
    watcher: thread::Thread,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        self.watcher.unpark();
    }
}
