//! Several worlds in threads of one process, over the loopback: what ranks say to one another, and how they fail.

mod collective;
mod exchange;
mod join;
mod launch;
mod loss;
mod pipes;

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use ctq_cluster::{Launch, Launcher, Limits, Secret, World};

const LIMITS: Limits = Limits {
    wait: Duration::from_secs(20),
    silence: Duration::from_secs(10),
    handshake: Duration::from_secs(5),
};

/// A port that nobody has, below those that the system gives out by itself.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let next = NEXT.fetch_add(1, Ordering::Relaxed) as u32;
        let port = 10_000 + (std::process::id() * 61 + next) % 20_000;
        let port = u16::try_from(port).expect("below 30 000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn launch(rank: usize, ranks: usize, port: u16) -> Launch {
    Launch {
        launcher: Launcher::Torchrun,
        rank,
        ranks,
        local_rank: rank,
        local_ranks: Some(ranks),
        address: "127.0.0.1".to_owned(),
        port,
        secret: Secret::new("of this test"),
    }
}

/// All ranks of one world, in order.
fn worlds(ranks: usize) -> Vec<Arc<World>> {
    let port = free_port();
    let join = move |rank| thread::spawn(move || World::join(&launch(rank, ranks, port), "1", LIMITS));
    let joining: Vec<_> = (0..ranks).map(join).collect();
    joining.into_iter().map(|world| world.join().expect("no panic").expect("they meet")).collect()
}

/// Runs every rank in a thread of its own; returns what each returns.
fn all<T: Send>(worlds: &[Arc<World>], work: impl Fn(&World) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let working: Vec<_> = worlds.iter().map(|world| scope.spawn(|| work(world))).collect();
        working.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}
