//! What emulated devices know of one another's work: a count of what each has queued, and up to which count of each
//! other one it waits. Everything happens at once in the emulation, so that a wait which is missing shows nowhere else.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Work that devices had queued at some moment, by their numbers.
#[derive(Clone, Debug, Default)]
pub struct EmulatedMark(BTreeMap<u64, u64>);

/// One device's work.
#[derive(Debug)]
pub(super) struct Order {
    number: u64,
    /// Work of this device, and that of others which it waits for.
    seen: Mutex<BTreeMap<u64, u64>>,
    /// Work that the host has waited for.
    finished: AtomicU64,
    /// Bytes allocated now.
    used: AtomicUsize,
    /// Times that the host waited for all that was queued.
    waits: AtomicUsize,
    launches: AtomicUsize,
}

impl Order {
    /// A device with a number of its own.
    pub(super) fn new() -> Order {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let (used, waits, launches) = Default::default();
        Order { number, seen: Mutex::default(), finished: AtomicU64::new(0), used, waits, launches }
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    fn seen(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues something; returns how much that makes.
    pub(super) fn work(&self) -> u64 {
        let mut seen = self.seen();
        let count = seen.entry(self.number).or_default();
        *count += 1;
        *count
    }

    /// How much was queued.
    pub(super) fn worked(&self) -> u64 {
        self.sees(self)
    }

    /// Up to how much of another device's work this one waits for.
    pub(super) fn sees(&self, other: &Order) -> u64 {
        self.seen().get(&other.number).copied().unwrap_or(0)
    }

    pub(super) fn mark(&self) -> EmulatedMark {
        EmulatedMark(self.seen().clone())
    }

    pub(super) fn wait_for(&self, mark: &EmulatedMark) {
        let mut seen = self.seen();
        for (device, count) in &mark.0 {
            let known = seen.entry(*device).or_default();
            *known = (*known).max(*count);
        }
    }

    /// The host waits for everything.
    pub(super) fn finish(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.finish_until(self.worked());
    }

    /// The host waits for so much.
    pub(super) fn finish_until(&self, worked: u64) {
        self.finished.fetch_max(worked, Ordering::Relaxed);
    }

    /// How much the host has waited for.
    pub(super) fn finished(&self) -> u64 {
        self.finished.load(Ordering::Relaxed)
    }

    /// A kernel is queued.
    pub(super) fn launch(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
        self.work();
    }

    /// Kernels that were queued.
    pub(super) fn launches(&self) -> usize {
        self.launches.load(Ordering::Relaxed)
    }

    /// Times that the host waited for all that was queued.
    pub(super) fn waits(&self) -> usize {
        self.waits.load(Ordering::Relaxed)
    }

    pub(super) fn allocated(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn freed(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes allocated now.
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}
