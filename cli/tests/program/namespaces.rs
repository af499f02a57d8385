//! Processes in network namespaces of their own, which are to one another as machines are. Needs root and `ip` of
//! iproute2; where they are missing, it is said and nothing is tested.
#![cfg(target_os = "linux")]

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::session::{Session, wait_until};

/// Longest silence that ranks bear, and what it takes to notice and to end.
const END: Duration = Duration::from_secs(15);

/// Two namespaces that a cable joins; gone when dropped.
struct Machines {
    names: [String; 2],
}

fn ip(words: &str) -> Result<(), String> {
    let output = Command::new("ip").args(words.split_whitespace()).output().map_err(|e| e.to_string())?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(format!("ip {words}: {told}")) }
}

impl Machines {
    /// `which`: tells the machines of one test from those of another.
    fn new(which: u32) -> Result<Machines, String> {
        let id = std::process::id() % 10_000 * 10 + which;
        let machines = Machines { names: [format!("ctq{id}a"), format!("ctq{id}b")] };
        let [a, b] = &machines.names;
        ip(&format!("netns add {a}"))?;
        ip(&format!("netns add {b}"))?;
        ip(&format!("link add {a} netns {a} type veth peer name {b} netns {b}"))?;
        for (name, address) in [(a, "10.91.0.1/24"), (b, "10.91.0.2/24")] {
            ip(&format!("-n {name} addr add {address} dev {name}"))?;
            ip(&format!("-n {name} link set {name} up"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        Ok(machines)
    }

    /// Pulls the cable.
    fn part(&self) {
        let [a, _] = &self.names;
        ip(&format!("-n {a} link set {a} down")).expect("a link");
    }

    /// A command as rank `rank` of four, two on each machine.
    fn start(&self, session: &Session, rank: usize, line: &str) -> Child {
        let program = session.command(line);
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.names[rank / 2]])
            .arg(program.get_program())
            .args(program.get_args());
        command.current_dir(session.root());
        for (name, value) in program.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        for (name, value) in [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", "4".to_owned()),
            ("LOCAL_RANK", (rank % 2).to_string()),
            ("LOCAL_WORLD_SIZE", "2".to_owned()),
            ("MASTER_ADDR", "10.91.0.1".to_owned()),
            ("MASTER_PORT", "29500".to_owned()),
            ("CTQ_TOKEN", "a secret of this test".to_owned()),
        ] {
            command.env(name, value);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("a process")
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

/// Machines, or why there are none.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn machines(which: u32) -> Option<Machines> {
    Machines::new(which).map_err(|why| eprintln!("skipped: no network namespaces here: {why}")).ok()
}

#[test]
fn machines_give_the_bits_of_one() {
    let Some(machines) = machines(1) else { return };
    let session = Session::with(&["NVFP4"]);
    let line = "eval NVFP4 --data text.txt --ctx 256 --stride 64 --json";
    session.ctq(&format!("{line} one.json")).expect(0);
    let nll = |file: &str| -> Vec<u64> {
        let records = session.json(file);
        let records = records.as_array().expect("records");
        records.iter().map(|record| record["total_nll"].as_f64().expect("a number").to_bits()).collect()
    };
    for layout in ["--tp 4", "--tp 2 --pp 2", ""] {
        let line = format!("{line} several.json {layout}");
        let ranks: Vec<Child> = (0..4).map(|rank| machines.start(&session, rank, &line)).collect();
        for rank in ranks {
            session.wait(rank).expect(0);
        }
        assert_eq!(nll("several.json"), nll("one.json"), "{layout}");
    }
}

#[test]
fn a_network_that_goes_away_ends_all_ranks() {
    let Some(machines) = machines(2) else { return };
    let session = Session::with(&["NVFP4"]);
    let line = "eval NVFP4 --data text.txt --preset hf-strided --ctx 256 --stride 64 --acts off --save-every 0 \
                --memory 24M --threads 1 --tp 4 --json several.json";
    let mut ranks: Vec<Child> = (0..4).map(|rank| machines.start(&session, rank, line)).collect();
    let scored = || {
        let folder = std::fs::read_dir(session.path("cache/eval")).into_iter().flatten().flatten();
        folder.into_iter().any(|entry| entry.path().extension().is_some_and(|x| x == "scores"))
    };
    assert!(wait_until(&mut ranks[0], scored), "the run is too short");
    machines.part();
    let parted = Instant::now();
    for rank in &mut ranks {
        while rank.try_wait().expect("a child").is_none() {
            assert!(parted.elapsed() < END, "a rank goes on without the others");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    for rank in ranks {
        let ran = session.wait(rank).expect(3);
        assert!(ran.stderr.contains("rank "), "{}", ran.stderr);
    }
    assert!(!session.path("several.json").exists(), "a run that lost its ranks has left a result");
}
