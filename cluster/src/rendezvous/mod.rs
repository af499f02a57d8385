//! How ranks come together: all come to rank 0, learn where the others are, and connect every two.
//!
//! 1. Rank 0 listens; every other rank connects, again and again until it is there. The two make sure that they belong
//!    to one job.
//! 2. When all have come, rank 0 hands out a roster: where each rank listens.
//! 3. Every rank connects to those between rank 0 and itself, and reports to rank 0.
//! 4. When all have reported, rank 0 tells them to go on. Connections to rank 0 serve on.
//!
//! Where anything goes wrong, rank 0 learns it and tells all, so that all fail for one reason.

mod door;
mod guest;
mod host;
mod reach;

use std::io;
use std::net::{IpAddr, TcpStream};
use std::thread;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::handshake::{Greeting, read_message};
use crate::launch::Launch;
use crate::limits::Limits;

/// The connections of one rank to all others.
pub(crate) struct Joined {
    /// One a rank; none for this one.
    pub(crate) sockets: Vec<Option<TcpStream>>,
    /// "rank 2 (10.0.0.3)".
    pub(crate) names: Vec<String>,
    /// What happened that should not have, and did no harm.
    pub(crate) notes: Vec<String>,
}

pub(crate) fn join(launch: &Launch, version: &str, limits: Limits) -> Result<Joined, Error> {
    if launch.rank == 0 {
        host::gather(launch, version, limits)
    } else {
        guest::join(launch, version, limits)
    }
}

/// What rank 0 and the others say to each other after the greeting.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Rank 0: where each rank listens, in the order of ranks.
    Roster(Vec<Place>),
    /// Connected to all.
    Ready,
    /// Could not be connected to all.
    Failed(Reason),
    /// Rank 0: all are connected.
    Go,
    /// Rank 0: there will be no job.
    Refused(Reason),
}

/// An [`Error`] on its way to other ranks.
#[derive(Debug, Serialize, Deserialize)]
struct Reason {
    text: String,
    may_pass: bool,
}

impl From<&Error> for Reason {
    fn from(error: &Error) -> Reason {
        Reason { text: error.to_string(), may_pass: error.may_pass() }
    }
}

/// Where a rank listens, as rank 0 sees it: a loopback address is that of rank 0's machine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Place {
    ip: IpAddr,
    port: u16,
}

/// What happens while ranks come together.
enum Event {
    /// A rank has connected, and belongs to this job.
    Arrived { greeting: Greeting, socket: TcpStream, ip: IpAddr },
    /// Somebody has connected who does not.
    Stranger { note: String },
    /// This rank has connected to another one.
    Reached { rank: usize, socket: TcpStream },
    /// This rank could not connect to another one.
    NotReached { error: Error },
    /// A rank has said something.
    Said { rank: usize, message: Message },
    /// A rank has closed its connection.
    Gone { rank: usize },
}

/// Notes about strangers are kept up to this many.
const MOST_NOTES: usize = 20;

fn note(notes: &mut Vec<String>, note: String) {
    if notes.len() < MOST_NOTES {
        notes.push(note);
    }
}

/// Reads what `rank` says, up to and with a message that is `last`.
fn listen(
    rank: usize,
    socket: &TcpStream,
    last: fn(&Message) -> bool,
    tell: impl Fn(Event) + Send + 'static,
) -> Result<(), Error> {
    let spawned = socket.try_clone().and_then(|mut socket| {
        thread::Builder::new().name(format!("ctq-hear-{rank}")).spawn(move || {
            loop {
                match read_message::<Message>(&mut socket) {
                    Ok(message) => {
                        let last = last(&message);
                        tell(Event::Said { rank, message });
                        if last {
                            return;
                        }
                    }
                    Err(_) => return tell(Event::Gone { rank }),
                }
            }
        })
    });
    spawned.map(drop).map_err(|source| system("listening to another rank", source))
}

fn system(what: &str, source: io::Error) -> Error {
    Error::System { what: what.to_owned(), source }
}

fn name(rank: usize, ip: IpAddr) -> String {
    format!("rank {rank} ({ip})")
}

/// Whether another rank was started as part of the same job.
fn check(own: &Greeting, other: &Greeting, name: &str) -> Result<(), Error> {
    if own.version != other.version {
        let (theirs, ours) = (other.version.clone(), own.version.clone());
        return Err(Error::Version { rank: name.to_owned(), theirs, ours });
    }
    if own.ranks != other.ranks {
        return Err(Error::Ranks { rank: name.to_owned(), theirs: other.ranks, ours: own.ranks });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::{call, write_message};
    use crate::launch::{Launcher, Secret};
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicU16, Ordering};
    use std::thread::JoinHandle;
    use std::time::Duration;

    /// A port that nobody has, below those that the system gives out by itself.
    fn free_port() -> u16 {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let first = 10_000 + (std::process::id() * 61 % 20_000) as u16;
        let ports = std::iter::repeat_with(|| first + NEXT.fetch_add(1, Ordering::Relaxed));
        ports.into_iter().find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a port")
    }

    fn launch(rank: usize, port: u16) -> Launch {
        Launch {
            launcher: Launcher::Torchrun,
            rank,
            ranks: 3,
            local_rank: rank,
            local_ranks: Some(3),
            address: "127.0.0.1".to_owned(),
            port,
            secret: Secret::new("of this test"),
        }
    }

    fn starts(rank: usize, port: u16) -> JoinHandle<Result<Joined, Error>> {
        let limits = Limits { handshake: Duration::from_secs(1), ..Limits::default() };
        thread::spawn(move || join(&launch(rank, port), "1", limits))
    }

    /// A rank that does no more than it must to come in; `listens` is the port that it tells the others.
    fn comes_in(rank: usize, port: u16, listens: u16) -> TcpStream {
        let socket = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(socket) => break socket,
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        let own = Greeting { version: "1".to_owned(), rank, ranks: 3, port: listens };
        let greeting = call(&socket, &launch(rank, port).secret, &own, Duration::from_secs(5));
        assert_eq!(greeting.expect("rank 0 answers").rank, 0);
        socket
    }

    fn error(joining: JoinHandle<Result<Joined, Error>>) -> Error {
        joining.join().expect("no panic").err().expect("they do not meet")
    }

    #[test]
    fn a_rank_that_dies_while_others_are_waited_for_is_lost() {
        let port = free_port();
        let first = starts(0, port);
        drop(comes_in(1, port, 1));
        let first = error(first);
        assert!(matches!(&first, Error::Lost { rank } if rank == "rank 1 (127.0.0.1)"), "{first}");
    }

    #[test]
    fn a_rank_0_that_dies_is_told_by_name() {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a port");
        let second = starts(1, port);
        let (socket, _) = listener.accept().expect("rank 1");
        let own = Greeting { version: "1".to_owned(), rank: 0, ranks: 3, port };
        let secret = launch(0, port).secret;
        let greeting = crate::handshake::answer(&socket, &secret, &own, Duration::from_secs(5));
        assert_eq!(greeting.expect("rank 1 speaks").rank, 1);
        drop(socket);
        let second = error(second);
        assert!(matches!(&second, Error::Lost { rank } if rank == "rank 0 (127.0.0.1)"), "{second}");
    }

    #[test]
    fn ranks_that_do_not_reach_one_another_end_the_job_for_all() {
        let port = free_port();
        let (first, third) = (starts(0, port), starts(2, port));
        // Rank 1 says that it listens where nobody does.
        let closed = free_port();
        let mut second = comes_in(1, port, closed);
        assert!(matches!(read_message(&mut second), Ok(Message::Roster(_))));
        let third = error(third).to_string();
        assert!(third.starts_with(&format!("rank 2 does not reach rank 1 at 127.0.0.1:{closed}")), "{third}");
        let first = error(first).to_string();
        assert!(first.starts_with("rank 2 (127.0.0.1) could not join: rank 2 does not reach"), "{first}");
        let told = read_message(&mut second).expect("rank 0 says it");
        assert!(matches!(&told, Message::Refused(reason) if reason.text == first), "{told:?}");
    }

    #[test]
    fn a_rank_that_says_it_failed_ends_the_job_for_all() {
        let port = free_port();
        let first = starts(0, port);
        let (mut second, mut third) = (comes_in(1, port, 1), comes_in(2, port, 1));
        let reason = Reason { text: "no threads".to_owned(), may_pass: true };
        write_message(&mut second, &Message::Failed(reason)).expect("rank 0 listens");
        let first = error(first);
        assert!(first.may_pass() && first.to_string().contains("could not join: no threads"), "{first}");
        let told =
            [read_message(&mut third), read_message(&mut third)].map(|told| told.expect("two messages"));
        assert!(matches!(told, [Message::Roster(_), Message::Refused(_)]), "{told:?}");
    }
}
