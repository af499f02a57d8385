//! Several processes on the loopback, started as torchrun starts them: the same bits as one, and an end for all within
//! seconds, with the name of the rank, where one is lost, late or wrong.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::exit_codes::overflowing_at;
use crate::session::{Ran, Session, wait_until};

/// Ranks must have ended so long after one is lost.
const END: Duration = Duration::from_secs(10);

const EVAL: &str = "eval NVFP4 --data text.txt --ctx 256 --stride 64";

/// Many groups of few windows.
const SLOW: &str = "eval NVFP4 --data text.txt --preset hf-strided --ctx 256 --stride 64 --rows 300 --acts off \
                    --save-every 0 --memory 24M --threads 1";

/// A port that nobody listens on, and that the system gives to no outgoing connection.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (std::process::id() % 100) as u16 * 100;
    let mut ports = std::iter::repeat_with(|| first + NEXT.fetch_add(1, Ordering::Relaxed) % 100).take(100);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

/// A command as one of several ranks.
fn rank_of(session: &Session, (rank, ranks): (usize, usize), port: u16, line: &str) -> Command {
    let mut command = session.command(line);
    for (name, value) in [
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", ranks.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("LOCAL_WORLD_SIZE", ranks.to_string()),
        ("MASTER_ADDR", "127.0.0.1".to_owned()),
        ("MASTER_PORT", port.to_string()),
        ("CTQ_TOKEN", "a secret of this test".to_owned()),
    ] {
        command.env(name, value);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts rank r with the words of `lines[r]`.
fn start(session: &Session, lines: &[&str]) -> Vec<Child> {
    let port = free_port();
    let ranks = lines.len();
    let child = |(rank, line): (usize, &&str)| {
        rank_of(session, (rank, ranks), port, line).spawn().expect("a process")
    };
    lines.iter().enumerate().map(child).collect()
}

fn finish(session: &Session, children: Vec<Child>) -> Vec<Ran> {
    children.into_iter().map(|child| session.wait(child)).collect()
}

/// Waits for processes to end; those that have not in time are an error.
fn ended_in_time(children: &mut [Child]) {
    let begun = Instant::now();
    for child in children {
        while child.try_wait().expect("a child").is_none() {
            assert!(begun.elapsed() < END, "a rank goes on although another is lost");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What a result says of the model, without times and places.
fn numbers(session: &Session, file: &str) -> Vec<(u64, u64, String, String)> {
    let records = session.json(file);
    let number = |record: &serde_json::Value, key: &str| record[key].as_f64().expect("a number").to_bits();
    let of = |record: &serde_json::Value| {
        (
            number(record, "total_nll"),
            number(record, "perplexity_error"),
            record["method_id"].to_string(),
            record["paired"].to_string(),
        )
    };
    records.as_array().expect("records").iter().map(of).collect()
}

#[test]
fn processes_give_the_bits_of_one() {
    let session = Session::with(&["NVFP4", "FP8"]);
    let both = "eval NVFP4 FP8 --data text.txt --ctx 256 --stride 64 --json";
    session.ctq(&format!("{both} one.json")).expect(0);
    let one = numbers(&session, "one.json");
    assert_eq!(one.len(), 4, "two models in two modes");
    for (ranks, layout) in
        [(2, ""), (2, "--tp 2"), (2, "--pp 2"), (4, ""), (4, "--tp 4"), (4, "--tp 2"), (4, "--tp 2 --pp 2")]
    {
        let line = format!("{both} several.json {layout}");
        let ran = finish(&session, start(&session, &vec![line.as_str(); ranks]));
        for (rank, ran) in ran.into_iter().enumerate() {
            let ran = ran.expect(0);
            assert!((rank == 0) != ran.stdout.is_empty(), "only the first prints results");
        }
        assert_eq!(numbers(&session, "several.json"), one, "{ranks} processes {layout}");
        std::fs::remove_file(session.path("several.json")).expect("the result");
    }
}

#[test]
fn exact_products_too() {
    let session = Session::with(&["FP8"]);
    let line = "eval FP8 --data text.txt --ctx 256 --stride 64 --acts kernel --json";
    session.ctq(&format!("{line} one.json")).expect(0);
    let several = format!("{line} several.json --tp 2");
    for ran in finish(&session, start(&session, &[several.as_str(); 2])) {
        ran.expect(0);
    }
    assert_eq!(numbers(&session, "several.json"), numbers(&session, "one.json"));
}

/// Kills each rank in turn in the middle of the run; then the same command goes on.
fn killed_in_turn(ranks: usize, layout: &str) {
    let session = Session::with(&["NVFP4"]);
    session.ctq(&format!("{SLOW} --json one.json")).expect(0);
    let line = format!("{SLOW} --json several.json {layout}");
    let scores = || {
        let folder = std::fs::read_dir(session.path("cache/eval")).into_iter().flatten().flatten();
        let is_scores = |entry: &std::fs::DirEntry| entry.path().extension().is_some_and(|x| x == "scores");
        folder.filter(is_scores).find_map(|entry| entry.metadata().ok()).map_or(0, |file| file.len())
    };
    for victim in 0..ranks {
        let before = scores();
        let mut children = start(&session, &vec![line.as_str(); ranks]);
        let reached = wait_until(&mut children[victim], || scores() > before);
        assert!(reached, "the run is too short to be killed in its middle");
        std::thread::sleep(Duration::from_millis(7 * victim as u64));
        children[victim].kill().expect("a kill");
        ended_in_time(&mut children);
        for (rank, ran) in finish(&session, children).into_iter().enumerate() {
            if rank != victim {
                let ran = ran.expect(3);
                assert!(ran.stderr.contains(&format!("rank {victim}")), "rank {rank}: {}", ran.stderr);
            }
        }
        assert!(!session.path("several.json").exists(), "a run that lost a rank has left a result");
    }
    let last = finish(&session, start(&session, &vec![line.as_str(); ranks])).remove(0).expect(0);
    assert!(last.stderr.contains("going on: "), "{}", last.stderr);
    assert_eq!(numbers(&session, "several.json"), numbers(&session, "one.json"));
}

#[test]
fn a_rank_that_is_killed_ends_all_and_the_same_command_goes_on() {
    killed_in_turn(2, "--tp 2");
}

#[test]
fn a_replica_that_is_killed_too() {
    killed_in_turn(3, "");
}

#[test]
fn a_rank_of_stages_that_is_killed_too() {
    killed_in_turn(4, "--tp 2 --pp 2");
}

/// The first error of each rank names what differs.
fn refused(session: &Session, lines: &[&str], told: &[&str]) {
    let mut children = start(session, lines);
    ended_in_time(&mut children);
    for ran in finish(session, children) {
        let ran = ran.expect(2);
        for told in told {
            assert!(ran.stderr.contains(told), "`{told}` is not told:\n{}", ran.stderr);
        }
    }
}

#[test]
fn ranks_that_do_not_do_the_same_are_refused() {
    let session = Session::with(&["NVFP4", "W4A16"]);
    let other = EVAL.replace("NVFP4", "W4A16");
    refused(&session, &[EVAL, &other], &["rank 1", "another model"]);
    let shorter = format!("{EVAL} --rows 3");
    refused(&session, &[EVAL, EVAL, &shorter], &["rank 2", "another protocol"]);
    let f32 = format!("{EVAL} --compute f32");
    refused(&session, &[EVAL, &f32], &["rank 1", "another compute mode"]);
    refused(&session, &[EVAL, "eval nowhere --data text.txt --ctx 256 --stride 64"], &["nowhere"]);
    for (rank, options) in [(1, "--tp 2"), (1, "--pp 2"), (1, "--acts off"), (1, "FP8")] {
        let other = EVAL.replace("eval", &format!("eval {options}"));
        refused(&session, &[EVAL, &other], &[&format!("rank {rank}"), "than rank 0"]);
    }
    refused(&session, &[&format!("{EVAL} --tp 2"), &format!("{EVAL} --pp 2")], &["rank 1"]);
    let three = format!("{EVAL} --tp 3");
    refused(&session, &[three.as_str(); 2], &["2 processes", "--tp 3"]);
}

/// What one process finds is the result of all, and told as one process would.
#[test]
fn an_invalid_result_is_told_by_all() {
    let session = Session::with(&[]);
    let letter = 474;
    overflowing_at(&session, "broken", letter);
    let line = "eval broken --data text.txt --ctx 256 --stride 64 --json";
    session.ctq(&format!("{line} one.json")).expect(1);
    for layout in ["", "--tp 2", "--pp 2"] {
        let several = format!("{line} several.json {layout}");
        let mut children = start(&session, &[several.as_str(); 2]);
        ended_in_time(&mut children);
        for ran in finish(&session, children) {
            let ran = ran.expect(1);
            assert!(ran.stderr.contains("the hidden state is not finite"), "{}", ran.stderr);
        }
        let record = &session.json("several.json")[0];
        assert_eq!(record["status"], "invalid", "{layout}");
        std::fs::remove_file(session.path("several.json")).expect("the result");
    }
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let session = Session::with(&["NVFP4"]);
    let line = format!("{EVAL} --wait 1.5");
    let port = free_port();
    let mut children: Vec<Child> =
        [0, 2].map(|rank| rank_of(&session, (rank, 4), port, &line).spawn().expect("a process")).into();
    ended_in_time(&mut children);
    for ran in finish(&session, children) {
        let ran = ran.expect(3);
        assert!(ran.stderr.contains('1') && ran.stderr.contains('3'), "{}", ran.stderr);
    }
}

#[cfg(unix)]
#[test]
fn a_signal_ends_the_wait_for_others() {
    let session = Session::with(&["NVFP4"]);
    let port = free_port();
    let mut children = vec![rank_of(&session, (0, 2), port, EVAL).spawn().expect("a process")];
    assert!(wait_until(&mut children[0], || TcpStream::connect(("127.0.0.1", port)).is_ok()));
    let kill = Command::new("kill").args(["-TERM", &children[0].id().to_string()]).status();
    assert!(kill.expect("kill").success());
    ended_in_time(&mut children);
    let ran = session.wait(children.remove(0)).expect(3);
    assert!(ran.stderr.contains("while waiting for the other processes"), "{}", ran.stderr);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let session = Session::with(&["NVFP4"]);
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let mut children: Vec<Child> = vec![rank_of(&session, (0, 2), port, EVAL).spawn().expect("a process")];
    ended_in_time(&mut children);
    for ran in finish(&session, children) {
        let ran = ran.expect(2);
        assert!(ran.stderr.contains(&port.to_string()) && ran.stderr.contains("CTQ_PORT"), "{}", ran.stderr);
    }
}

/// What connects and says nothing, or nothing that makes sense, keeps nobody from working.
#[test]
fn strangers_at_the_port_are_let_go() {
    let session = Session::with(&["NVFP4"]);
    let port = free_port();
    let mut first = rank_of(&session, (0, 2), port, EVAL).spawn().expect("a process");
    let address = format!("127.0.0.1:{port}");
    assert!(wait_until(&mut first, || TcpStream::connect(&address).is_ok()));
    let _silent = TcpStream::connect(&address).expect("a connection");
    let mut garbage = TcpStream::connect(&address).expect("a connection");
    garbage.write_all(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n").expect("sent");
    let second = rank_of(&session, (1, 2), port, EVAL).spawn().expect("a process");
    for ran in finish(&session, vec![first, second]) {
        ran.expect(0);
    }
}

#[test]
fn what_is_no_ctq_at_the_port_is_told() {
    let session = Session::with(&["NVFP4"]);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let serve = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let _ = stream.write_all(&[b'x'; 4096]);
        stream
    });
    let mut children =
        vec![rank_of(&session, (1, 2), port, &format!("{EVAL} --wait 5")).spawn().expect("a process")];
    ended_in_time(&mut children);
    for ran in finish(&session, children) {
        let ran = ran.expect(2);
        assert!(ran.stderr.contains(&port.to_string()), "{}", ran.stderr);
    }
    drop(serve.join());
}

#[cfg(unix)]
#[test]
fn a_signal_to_one_rank_ends_all_and_keeps_what_is_done() {
    let session = Session::with(&["NVFP4"]);
    session.ctq(&format!("{SLOW} --json one.json")).expect(0);
    let line = format!("{SLOW} --json several.json --tp 2");
    let mut children = start(&session, &[line.as_str(); 2]);
    let scored = || {
        let folder = std::fs::read_dir(session.path("cache/eval")).into_iter().flatten().flatten();
        folder.into_iter().any(|entry| entry.path().extension().is_some_and(|x| x == "scores"))
    };
    assert!(wait_until(&mut children[0], scored), "the run is too short");
    let kill = Command::new("kill").args(["-TERM", &children[1].id().to_string()]).status();
    assert!(kill.expect("kill").success());
    ended_in_time(&mut children);
    for ran in finish(&session, children) {
        ran.expect(3);
    }
    for ran in finish(&session, start(&session, &[line.as_str(); 2])) {
        ran.expect(0);
    }
    assert_eq!(numbers(&session, "several.json"), numbers(&session, "one.json"));
}

#[test]
fn a_dry_run_of_several_processes_is_told_once_and_is_of_all() {
    let session = Session::with(&["NVFP4"]);
    let line = format!("{EVAL} --acts off --dry-run");
    let ran = finish(&session, start(&session, &[line.as_str(); 3]));
    assert!(ran[0].stdout.contains("3 replicas"), "{}", ran[0].stdout);
    assert!(
        ran.iter().all(|ran| ran.code == Some(0)) && ran[1].stdout.is_empty() && ran[2].stdout.is_empty()
    );
}

#[test]
fn half_a_launcher_is_an_error_that_says_what_to_do() {
    let session = Session::with(&["NVFP4"]);
    let mut command = session.command(EVAL);
    command.env("WORLD_SIZE", "4");
    let ran = session.run(command);
    let ran = ran.expect(2);
    assert!(ran.stderr.contains("RANK") && ran.stderr.contains("--launcher none"), "{}", ran.stderr);
    let mut alone = session.command(&format!("{EVAL} --launcher none"));
    alone.env("WORLD_SIZE", "4");
    session.run(alone).expect(0);
}
