//! How ranks come together, and every way in which they do not.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ctq_cluster::{Error, Launch, Limits, Secret, World};

use crate::{LIMITS, free_port, launch, worlds};

type Joining = JoinHandle<Result<std::sync::Arc<World>, Error>>;

fn join_as(launch: Launch, version: &'static str, limits: Limits) -> Joining {
    thread::spawn(move || World::join(&launch, version, limits))
}

fn error(joining: Joining) -> Error {
    joining.join().expect("no panic").expect_err("they do not meet")
}

/// Connects to rank 0 when it listens.
fn connect(port: u16) -> TcpStream {
    let until = Instant::now() + LIMITS.wait;
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn short(wait: u64, handshake: u64) -> Limits {
    Limits { wait: Duration::from_millis(wait), handshake: Duration::from_millis(handshake), ..LIMITS }
}

#[test]
fn ranks_meet_and_know_one_another() {
    let worlds = worlds(4);
    for (rank, world) in worlds.iter().enumerate() {
        assert_eq!((world.rank(), world.ranks()), (rank, 4));
        assert_eq!(world.name(2), "rank 2 (127.0.0.1)");
        assert!(world.notes().is_empty() && world.failure().is_none(), "{:?}", world.notes());
    }
}

#[test]
fn rank_0_may_come_last_and_have_a_name() {
    let port = free_port();
    let named = |rank| Launch { address: "localhost".to_owned(), ..launch(rank, 2, port) };
    let first = join_as(named(1), "1", LIMITS);
    thread::sleep(Duration::from_millis(200));
    let second = join_as(named(0), "1", LIMITS);
    assert!(first.join().expect("no panic").is_ok() && second.join().expect("no panic").is_ok());
}

#[test]
fn a_world_may_be_open_to_other_machines() {
    let port = free_port();
    let open = |rank| join_as(Launch { local_ranks: Some(2), ..launch(rank, 3, port) }, "1", LIMITS);
    let joining = [open(0), open(1), open(2)];
    let worlds = joining.map(|joining| joining.join().expect("no panic").expect("they meet"));
    assert_eq!(worlds[2].name(1), "rank 1 (127.0.0.1)");
}

#[test]
fn a_job_without_a_secret_says_so() {
    let port = free_port();
    let open = |rank| join_as(Launch { secret: Secret::new(""), ..launch(rank, 2, port) }, "1", LIMITS);
    let joining = [open(0), open(1)];
    for world in joining.map(|joining| joining.join().expect("no panic").expect("they meet")) {
        assert!(world.notes().iter().any(|note| note.contains("CTQ_TOKEN")), "{:?}", world.notes());
    }
}

#[test]
fn strangers_are_dropped_and_noted_and_the_job_goes_on() {
    let port = free_port();
    let limits = short(20_000, 300);
    let first = join_as(launch(0, 2, port), "1", limits);
    let silent = connect(port);
    connect(port).write_all(b"GET / HTTP/1.1\r\n\r\n").expect("a request");
    let mut half = connect(port);
    half.write_all(b"ctq-m").expect("a beginning");
    // A stranger that has been dropped for its silence reads the end.
    let mut rest = Vec::new();
    (&silent).read_to_end(&mut rest).expect("an end");
    half.read_to_end(&mut rest).expect("an end");
    let second = join_as(launch(1, 2, port), "1", limits);
    let world = first.join().expect("no panic").expect("they meet");
    second.join().expect("no panic").expect("they meet");
    let notes = world.notes().join("\n");
    assert_eq!(world.notes().len(), 3, "{notes}");
    assert!(notes.contains("GET / HTTP/1.1"), "{notes}");
    assert_eq!(notes.matches("it said nothing in time").count(), 2, "{notes}");
}

#[test]
fn another_program_at_the_port_is_told_by_its_answer() {
    let other = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = other.local_addr().expect("an address").port();
    thread::spawn(move || {
        let (mut visitor, _) = other.accept().expect("a visitor");
        visitor.write_all(b"SSH-2.0-OpenSSH_9.6\r\n").expect("an answer");
        let _ = visitor.read_to_end(&mut Vec::new());
    });
    let error = error(join_as(launch(1, 2, port), "1", LIMITS));
    assert!(matches!(&error, Error::NotCtq { answer, .. } if answer.contains("SSH-2.0")), "{error}");
    assert!(error.to_string().contains("CTQ_PORT") && !error.may_pass(), "{error}");
}

#[test]
fn a_port_that_says_nothing_is_given_up() {
    let other = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = other.local_addr().expect("an address").port();
    let error = error(join_as(launch(1, 2, port), "1", short(20_000, 200)));
    assert!(matches!(error, Error::Silent { .. }), "{error}");
}

#[test]
fn a_port_that_is_taken_is_told_at_once() {
    for address in ["127.0.0.1", "0.0.0.0"] {
        let other = TcpListener::bind((address, 0)).expect("a port");
        let port = other.local_addr().expect("an address").port();
        for local_ranks in [Some(2), Some(1)] {
            let error = error(join_as(Launch { local_ranks, ..launch(0, 2, port) }, "1", LIMITS));
            assert!(matches!(error, Error::PortTaken { port: taken } if taken == port), "{error}");
            assert!(error.to_string().contains("CTQ_PORT"), "{error}");
        }
    }
}

#[test]
fn a_rank_with_another_secret_does_not_come_in() {
    let port = free_port();
    let first = join_as(launch(0, 2, port), "1", short(1500, 1000));
    let other = Launch { secret: Secret::new("of another job"), ..launch(1, 2, port) };
    let refused = error(join_as(other, "1", LIMITS));
    assert!(matches!(refused, Error::Secret { .. }), "{refused}");
    let missing = error(first);
    assert!(matches!(&missing, Error::Missing { missing, .. } if *missing == [1]), "{missing}");
    assert!(missing.to_string().contains("does not have the secret"), "{missing}");
}

#[test]
fn another_build_ends_the_job_for_all() {
    let port = free_port();
    let [first, second] = [0, 1].map(|rank| join_as(launch(rank, 3, port), "1", LIMITS));
    let third = error(join_as(launch(2, 3, port), "2", LIMITS));
    assert!(matches!(third, Error::Version { .. }), "{third}");
    let first = error(first).to_string();
    assert!(first.contains("rank 2 (127.0.0.1) runs ctq 2, this is 1"), "{first}");
    let second = error(second).to_string();
    assert!(second.contains("rank 0 has ended the job") && second.contains("runs ctq 2"), "{second}");
}

#[test]
fn another_number_of_ranks_ends_the_job_for_all() {
    let port = free_port();
    let first = join_as(launch(0, 3, port), "1", LIMITS);
    let second = error(join_as(launch(1, 2, port), "1", LIMITS));
    assert!(matches!(second, Error::Ranks { theirs: 3, ours: 2, .. }), "{second}");
    let first = error(first);
    assert!(matches!(first, Error::Ranks { theirs: 2, ours: 3, .. }), "{first}");
}

#[test]
fn a_rank_that_is_there_twice_ends_the_job_for_all() {
    let port = free_port();
    let first = join_as(launch(0, 3, port), "1", LIMITS);
    let twins = [(); 2].map(|()| join_as(launch(1, 3, port), "1", LIMITS));
    let first = error(first);
    assert!(matches!(first, Error::Twice { rank: 1, .. }), "{first}");
    for twin in twins.map(error) {
        assert!(
            matches!(&twin, Error::Refused { reason, .. } if reason.contains("rank 1 is there twice")),
            "{twin}"
        );
    }
}

#[test]
fn ranks_that_do_not_come_are_listed_for_all() {
    let port = free_port();
    let first = join_as(launch(0, 4, port), "1", short(1000, 1000));
    let third = error(join_as(launch(2, 4, port), "1", LIMITS));
    assert!(
        matches!(&third, Error::Refused { reason, .. } if reason.contains("ranks 1, 3 did not come")),
        "{third}"
    );
    assert!(third.may_pass());
    let first = error(first);
    assert!(matches!(&first, Error::Missing { missing, came: 2, .. } if *missing == [1, 3]), "{first}");
    assert!(first.may_pass());
}

#[test]
fn a_rank_0_that_is_not_there_is_given_up() {
    let port = free_port();
    let error = error(join_as(launch(1, 2, port), "1", short(300, 200)));
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}")), "{error}");
}

#[test]
fn an_address_that_does_not_resolve_is_named() {
    for rank in [0, 1] {
        let launch = Launch { address: "no-such-host.invalid".to_owned(), ..launch(rank, 2, 9) };
        let error = error(join_as(launch, "1", short(5000, 200)));
        assert!(error.to_string().contains("`no-such-host.invalid`, does not resolve"), "{error}");
    }
}
