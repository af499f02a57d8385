//! What can go wrong before all ranks are connected. Afterwards there is one error only: a rank is lost.

use std::io;
use std::time::Duration;

/// Ranks that do not come together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A variable of the launcher is missing, or contradicts another.
    #[error("{name} {found}: {wrong}; {}", way_out(name))]
    Variable {
        /// Which.
        name: &'static str,
        /// Its value in words.
        found: String,
        /// What is wrong with it.
        wrong: String,
    },
    /// Rank 0 cannot be found.
    #[error(
        "the address of rank 0, `{address}`, does not resolve ({source}); set MASTER_ADDR to a host name or address that every node knows"
    )]
    Unresolved {
        /// As it was given.
        address: String,
        /// Of the resolver.
        source: io::Error,
    },
    /// The port that ranks should meet at is in use.
    #[error(
        "port {port} of this machine is taken, and ranks should meet there; set CTQ_PORT to a free port, the same for all ranks"
    )]
    PortTaken {
        /// Which.
        port: u16,
    },
    /// Rank 0 could not be reached in time.
    #[error(
        "rank 0 was not reached at {place} in {} s ({last}); see that it was started, that MASTER_ADDR names its machine, and that no firewall closes the port",
        wait.as_secs_f32()
    )]
    Unreachable {
        /// Address and port.
        place: String,
        /// How long it was tried.
        wait: Duration,
        /// What came of the last attempt.
        last: String,
    },
    /// Another program has the port.
    #[error(
        "what answers at {place} is not ctq: it says {answer}; set CTQ_PORT to a free port, the same for all ranks"
    )]
    NotCtq {
        /// Address and port.
        place: String,
        /// The beginning of its answer.
        answer: String,
    },
    /// Something accepts connections and says nothing.
    #[error(
        "something accepts connections at {place} and says nothing for {} s; where it is another program, set CTQ_PORT to a free port, the same for all ranks",
        limit.as_secs_f32()
    )]
    Silent {
        /// Address and port.
        place: String,
        /// How long it was listened to.
        limit: Duration,
    },
    /// The other side belongs to another job.
    #[error(
        "{place} does not have the secret of this job: another job may have the port; set CTQ_PORT to a free port and CTQ_TOKEN to one secret, the same for all ranks"
    )]
    Secret {
        /// Address and port.
        place: String,
    },
    /// Two builds of ctq.
    #[error("{rank} runs ctq {theirs}, this is {ours}; start all ranks with one build")]
    Version {
        /// Who.
        rank: String,
        /// Its version.
        theirs: String,
        /// The version here.
        ours: String,
    },
    /// Ranks were started as parts of different worlds.
    #[error(
        "{rank} was started as one of {theirs} ranks, this as one of {ours}; start all with the same number"
    )]
    Ranks {
        /// Who.
        rank: String,
        /// How many it expects.
        theirs: usize,
        /// How many are expected here.
        ours: usize,
    },
    /// A rank is not the one that was expected.
    #[error(
        "{place} is rank {found}, where rank {expected} was expected; set CTQ_PORT to a free port, the same for all ranks"
    )]
    Stranger {
        /// Address and port.
        place: String,
        /// Who answers.
        found: usize,
        /// Who should.
        expected: usize,
    },
    /// Two processes have the same rank.
    #[error(
        "rank {rank} is there twice, at {first} and at {second}; give every process a rank of its own, and see that no process of an earlier run is left"
    )]
    Twice {
        /// Which.
        rank: usize,
        /// Where one of them is.
        first: String,
        /// Where the other one is.
        second: String,
    },
    /// Some ranks did not come in time.
    #[error(
        "{} did not come in {} s, {came} of {ranks} are there; see that all were started, and that they reach port {port} of this machine, or pass `--launcher none` to run one process alone{}",
        listed(missing), wait.as_secs_f32(), noted(notes)
    )]
    Missing {
        /// Which, ascending.
        missing: Vec<usize>,
        /// How many came, this one included.
        came: usize,
        /// How many there should be.
        ranks: usize,
        /// How long they were waited for.
        wait: Duration,
        /// Where they should have come.
        port: u16,
        /// Connections that were dropped meanwhile.
        notes: Vec<String>,
    },
    /// A rank ended before all were connected.
    #[error(
        "{rank} is lost before all ranks were connected: its connection closed; the same command may be run again"
    )]
    Lost {
        /// Who.
        rank: String,
    },
    /// Two ranks do not reach each other.
    #[error(
        "rank {from} does not reach rank {to} at {place} ({last}); let all nodes reach one another on all TCP ports, or start the ranks on one node"
    )]
    NoWay {
        /// Who tried.
        from: usize,
        /// Whom.
        to: usize,
        /// Address and port.
        place: String,
        /// What came of it.
        last: String,
    },
    /// Rank 0 has ended the job before it began.
    #[error("rank 0 has ended the job: {reason}")]
    Refused {
        /// Why, with what to do.
        reason: String,
        /// Whether the same command may succeed later.
        may_pass: bool,
    },
    /// Another rank could not join.
    #[error("{rank} could not join: {reason}")]
    Failed {
        /// Who.
        rank: String,
        /// Why, with what to do.
        reason: String,
        /// Whether the same command may succeed later.
        may_pass: bool,
    },
    /// Something that this machine did not give.
    #[error("{what}: {source}; see that this machine has free ports, threads and file descriptors")]
    System {
        /// What was asked for.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// Whether the same command may succeed later: a rank was lost or late.
    pub fn may_pass(&self) -> bool {
        match self {
            Error::Refused { may_pass, .. } | Error::Failed { may_pass, .. } => *may_pass,
            Error::Unreachable { .. } | Error::Missing { .. } | Error::Lost { .. } | Error::System { .. } => {
                true
            }
            Error::Variable { .. }
            | Error::Unresolved { .. }
            | Error::PortTaken { .. }
            | Error::NotCtq { .. }
            | Error::Silent { .. }
            | Error::Secret { .. }
            | Error::Version { .. }
            | Error::Ranks { .. }
            | Error::Stranger { .. }
            | Error::Twice { .. }
            | Error::NoWay { .. } => false,
        }
    }
}

fn way_out(name: &str) -> &'static str {
    match name {
        "CTQ_PORT" => "set it to a free port above 1023, the same for all ranks",
        "MASTER_ADDR" => "set it to the host name or address of rank 0's machine, or pass `--launcher none`",
        _ => "start ctq by the launcher that sets it, or pass `--launcher none` to run one process alone",
    }
}

/// "rank 2", "ranks 2, 5, 6".
fn listed(ranks: &[usize]) -> String {
    let names: Vec<String> = ranks.iter().take(16).map(ToString::to_string).collect();
    let more = if ranks.len() > 16 { format!(" and {} more", ranks.len() - 16) } else { String::new() };
    format!("rank{} {}{more}", if ranks.len() == 1 { "" } else { "s" }, names.join(", "))
}

fn noted(notes: &[String]) -> String {
    if notes.is_empty() { String::new() } else { format!(" ({})", notes.join("; ")) }
}
