//! Ranks that are processes: killed, stopped, and on machines whose network dies. This program is also what those
//! processes run: the test `member`, which does nothing where it was not started as one.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use ctq_cluster::{Launch, Launcher, Limits, Secret, World};
use ctq_kernels::collective::Peers;

/// The variable that makes a process a rank.
const MEMBER: &str = "CTQ_TEST_MEMBER";
/// The longest that anything here may take: far more than it does.
const PATIENCE: Duration = Duration::from_secs(30);

/// Meets the others and exchanges bytes with them until something fails.
#[test]
#[ignore = "a rank of the other tests, which start it"]
fn member() {
    let Ok(text) = env::var(MEMBER) else { return };
    let words: Vec<&str> = text.split_whitespace().collect();
    let number = |index: usize| words[index].parse::<u64>().expect("a number");
    let launch = Launch {
        launcher: Launcher::Torchrun,
        rank: number(0) as usize,
        ranks: number(1) as usize,
        local_rank: 0,
        local_ranks: Some(number(2) as usize),
        address: words[3].to_owned(),
        port: number(4) as u16,
        secret: Secret::new("of this test"),
    };
    let limits = Limits { silence: Duration::from_millis(number(5)), ..Limits::default() };
    let say = |line: &str| writeln!(std::io::stderr(), "\n{line}").expect("somebody listens");
    let world = World::join(&launch, "1", limits).expect("they meet");
    let members: Vec<usize> = (0..launch.ranks).collect();
    let group = world.group(&members, 1);
    let mut rounds = 0;
    let error = loop {
        match group.exchange(vec![vec![1; 100_000]; launch.ranks]) {
            Ok(_) => rounds += 1,
            Err(error) => break error,
        }
        if rounds == 3 {
            say("under way");
        }
        thread::sleep(Duration::from_millis(1));
    };
    say(&format!("ended: {error}"));
    drop(world);
    std::process::exit(3);
}

/// A process that is a rank; killed when dropped.
struct Rank {
    child: Child,
    lines: Receiver<String>,
}

impl Rank {
    /// Starts one: `before` is what runs it, `words` what it is.
    fn start(before: &[&str], words: &str) -> Rank {
        let own = env::current_exe().expect("this program");
        let own = own.to_str().expect("a path in UTF-8");
        let line = [before, &[own, "member", "--exact", "--ignored", "--nocapture"]].concat();
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).env(MEMBER, words).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("a process");
        let errors = child.stderr.take().expect("a pipe");
        let (tell, lines) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(errors).lines().map_while(Result::ok).try_for_each(|line| tell.send(line))
        });
        Rank { child, lines }
    }

    /// The rest of the next line that begins so.
    fn says(&self, beginning: &str) -> String {
        let mut before = Vec::new();
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                panic!("it never says `{beginning}`, but {before:#?}");
            };
            if let Some(rest) = line.strip_prefix(beginning) {
                return rest.to_owned();
            }
            before.push(line);
        }
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill").success());
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that nobody has, below those that the system gives out by itself: ranks listen on such.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (std::process::id() * 61 + next) % 20_000;
        let port = u16::try_from(port).expect("below 30 000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Ranks on this machine, all under way.
fn ranks(ranks: usize, silence: Duration) -> Vec<Rank> {
    let port = free_port();
    let words = |rank| format!("{rank} {ranks} {ranks} 127.0.0.1 {port} {}", silence.as_millis());
    let started: Vec<Rank> = (0..ranks).map(|rank| Rank::start(&["env"], &words(rank))).collect();
    for rank in &started {
        rank.says("under way");
    }
    started
}

#[test]
fn a_rank_that_is_killed_is_named_without_waiting_for_silence() {
    let mut ranks = ranks(3, PATIENCE * 10);
    ranks.remove(2).signal("-KILL");
    for rank in &mut ranks {
        let ended = rank.says("ended: ");
        assert!(ended.starts_with("rank 2 (127.0.0.1) is lost: its connection closed"), "{ended}");
        assert_eq!(rank.child.wait().expect("an end").code(), Some(3));
    }
}

#[test]
fn a_rank_that_is_stopped_is_named_after_silence() {
    let mut ranks = ranks(3, Duration::from_millis(1500));
    let stopped = ranks.remove(1);
    stopped.signal("-STOP");
    for rank in &ranks {
        let ended = rank.says("ended: ");
        assert!(
            ended.starts_with("rank 1 (127.0.0.1) is lost: nothing was heard of it for 1.5 s"),
            "{ended}"
        );
    }
    // It learns what the others think, and blames nobody else.
    stopped.signal("-CONT");
    let ended = stopped.says("ended: ");
    assert!(ended.starts_with("rank 1 (127.0.0.1) is lost: nothing was heard"), "{ended}");
}

/// Two network namespaces joined by a cable; gone when dropped.
struct Machines {
    names: [String; 2],
    cables: [String; 2],
}

impl Machines {
    /// `Err` says why there are none.
    fn new() -> Result<Machines, String> {
        let id = std::process::id();
        let names = ["a", "b"].map(|side| format!("ctq-{side}-{id}"));
        let cables = ["a", "b"].map(|side| format!("ctq{side}{id}"));
        let machines = Machines { names, cables };
        let ([here, there], [near, far]) = (&machines.names, &machines.cables);
        for line in [
            format!("netns add {here}"),
            format!("netns add {there}"),
            format!("link add {near} netns {here} type veth peer name {far} netns {there}"),
            format!("-n {here} addr add 10.213.7.1/24 dev {near}"),
            format!("-n {there} addr add 10.213.7.2/24 dev {far}"),
            format!("-n {here} link set {near} up"),
            format!("-n {there} link set {far} up"),
            format!("-n {here} link set lo up"),
            format!("-n {there} link set lo up"),
        ] {
            ip(&line)?;
        }
        Ok(machines)
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(line: &str) -> Result<(), String> {
    let output = Command::new("ip").args(line.split(' ')).output().map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

#[test]
fn a_network_that_dies_ends_both_sides() {
    let machines = match Machines::new() {
        Ok(machines) => machines,
        Err(why) => {
            let _ = writeln!(std::io::stderr(), "skipped: no network namespaces ({why})");
            return;
        }
    };
    let start = |rank: usize, side: usize, here: usize| {
        let words = format!("{rank} 3 {here} 10.213.7.1 17171 1500");
        Rank::start(&["ip", "netns", "exec", &machines.names[side]], &words)
    };
    let ranks = [start(0, 0, 2), start(1, 0, 2), start(2, 1, 1)];
    for rank in &ranks {
        rank.says("under way");
    }
    ip(&format!("-n {} link set {} down", machines.names[1], machines.cables[1])).expect("it was up");
    let ended = ranks.each_ref().map(|rank| rank.says("ended: "));
    for near in &ended[..2] {
        assert!(near.starts_with("rank 2 (10.213.7.2) is lost: nothing was heard of it for 1.5 s"), "{near}");
    }
    let far = &ended[2];
    assert!(far.contains(" (10.213.7.1) is lost: nothing was heard of it for 1.5 s"), "{far}");
}
