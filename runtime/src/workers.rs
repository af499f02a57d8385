//! The threads that compute for a seat: how many, and which cores they are bound to. Decides neither.

use std::num::NonZero;

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// Workers of a seat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workers {
    count: NonZero<usize>,
    /// Of each worker; empty: wherever the system puts them.
    cores: Vec<usize>,
}

impl Workers {
    /// So many, wherever the system puts them.
    pub fn anywhere(count: NonZero<usize>) -> Workers {
        Workers { count, cores: Vec::new() }
    }

    /// One on each of `cores`, as the system numbers them; `None` where there are none. Where the system does not bind
    /// threads, they run anywhere.
    pub fn bound(cores: Vec<usize>) -> Option<Workers> {
        Some(Workers { count: NonZero::new(cores.len())?, cores })
    }

    /// How many.
    pub fn count(&self) -> NonZero<usize> {
        self.count
    }

    /// Starts them.
    ///
    /// # Errors
    /// Where the system starts no more threads.
    pub fn pool(&self) -> Result<ThreadPool, ThreadPoolBuildError> {
        let cores = self.cores.clone();
        let start = move |worker: usize| {
            if let Some(core) = cores.get(worker) {
                bind(*core);
            }
        };
        ThreadPoolBuilder::new().num_threads(self.count.get()).start_handler(start).build()
    }
}

/// Binds the calling thread. One that cannot be bound runs anywhere, which is only slower.
#[cfg(target_os = "linux")]
fn bind(core: usize) {
    use rustix::thread::{CpuSet, sched_setaffinity};

    if core < CpuSet::MAX_CPU {
        let mut set = CpuSet::new();
        set.set(core);
        let _ = sched_setaffinity(None, &set);
    }
}

#[cfg(not(target_os = "linux"))]
fn bind(_core: usize) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::thread::{CpuSet, sched_getaffinity};

    use super::*;

    fn own_cores() -> Vec<usize> {
        let set = sched_getaffinity(None).expect("cores of a thread");
        (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect()
    }

    #[test]
    fn every_worker_has_its_core_and_the_caller_keeps_all() {
        let cores = own_cores();
        let pool = Workers::bound(cores.clone()).expect("a core").pool().expect("threads");
        let mut found = pool.broadcast(|_| own_cores()).concat();
        found.sort_unstable();
        assert_eq!(found, cores);
        assert_eq!(own_cores(), cores);
        let anywhere = Workers::anywhere(NonZero::<usize>::MIN).pool().expect("a thread");
        assert_eq!(anywhere.broadcast(|_| own_cores()), [cores]);
    }
}
