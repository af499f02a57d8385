//! Threads of one process that run the same program as ranks. Starts and joins them; computes nothing.

use std::fmt::Display;
use std::num::NonZero;

use super::Peers;
use super::in_process::InProcess;
use super::rank::Rank;
use crate::backend::Backend;

/// Gives up for a rank that ends without having come to the end of its program.
struct GiveUp<'a>(&'a dyn Peers);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort(&format!("rank {} panicked", self.0.rank()));
        }
    }
}

/// Ranks whose backends read one another's buffers.
pub fn in_process<B: Backend + 'static>(backends: Vec<B>) -> Vec<Rank<B>> {
    let collectives = InProcess::team(backends.len());
    backends.into_iter().zip(collectives).map(|(b, c)| Rank::new(b, Box::new(c))).collect()
}

/// Runs `program` on every backend, each in a thread with `threads` workers of its own; what each gives, in order.
///
/// A program that fails ends those of its peers: they fail with [`crate::KernelError::Lost`] of its error.
///
/// # Panics
/// Where threads cannot be started, or a program panics.
pub fn run<B: Backend, T: Send, E: Display + Send>(
    backends: &[B],
    threads: NonZero<usize>,
    program: impl Fn(&B) -> Result<T, E> + Sync,
) -> Vec<Result<T, E>> {
    let start = |backend: &B| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build();
        let pool = pool.expect("threads can be started");
        let peers = backend.peers();
        let _guard = GiveUp(peers);
        let done = pool.install(|| program(backend));
        if let Err(error) = &done {
            peers.abort(&format!("rank {}: {error}", peers.rank()));
        }
        done
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = backends.iter().map(|backend| scope.spawn(|| start(backend))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank does not panic")).collect()
    })
}
