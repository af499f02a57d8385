//! Who has started this process, and as which of how many. Reads variables that launchers set; opens nothing.
//!
//! torchrun, as seen with torch 2.14, single-node, `--standalone`, c10d and static with two nodes alike: RANK,
//! WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and TORCHELASTIC_RUN_ID are set,
//! TORCHELASTIC_USE_AGENT_STORE is `True`, and then the agent of rank 0's node listens on MASTER_PORT itself.
//! TORCHELASTIC_RUN_ID is `none` for a static rendezvous without `--rdzv-id`.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::hosts::{first_host, tasks_of_node};

/// What starts the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Whatever has left its variables.
    Auto,
    /// Nothing: this process is alone, whatever is set.
    None,
    /// torchrun, or whoever sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    Torchrun,
    /// srun.
    Slurm,
    /// mpirun of Open MPI, MPICH or Intel MPI.
    Mpi,
}

/// One of several ranks, and where they meet.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Who started it: never [`Launcher::Auto`] or [`Launcher::None`].
    pub launcher: Launcher,
    /// Which it is, from 0.
    pub rank: usize,
    /// How many there are, at least 2.
    pub ranks: usize,
    /// Which it is on its machine, from 0.
    pub local_rank: usize,
    /// How many are on its machine, where that is known.
    pub local_ranks: Option<usize>,
    /// Host name or address of rank 0.
    pub address: String,
    /// Port where rank 0 listens.
    pub port: u16,
    /// What all ranks of the job know.
    pub secret: Secret,
}

/// What all ranks of a job know, so that ranks of two jobs do not mix: CTQ_TOKEN, or the job's name. A job's name keeps
/// off accidents, not people.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Of a text.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The environment: the value of a variable, where it is set.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Launch {
    /// What the variables of `choice` say; `None` where this process is alone.
    ///
    /// # Errors
    /// Where variables are missing or contradict one another.
    pub fn detect(choice: Launcher, env: Lookup<'_>) -> Result<Option<Launch>, Error> {
        // An empty variable is one that somebody tried to unset.
        let variables = Variables { env: &|name| env(name).filter(|value| !value.trim().is_empty()) };
        let launcher = match choice {
            Launcher::Auto => variables.launcher()?,
            Launcher::None | Launcher::Torchrun | Launcher::Slurm | Launcher::Mpi => choice,
        };
        match launcher {
            Launcher::Auto | Launcher::None => Ok(None),
            Launcher::Torchrun => variables.torchrun(),
            Launcher::Slurm => variables.slurm(),
            Launcher::Mpi => variables.mpi(),
        }
    }
}

/// Names of rank, size, rank on the node and ranks on the node.
type Names = [&'static str; 4];

const OPEN_MPI: Names = [
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
];
/// MPICH and Intel MPI.
const HYDRA: Names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
const TORCHRUN: Names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"];

struct Variables<'a> {
    env: Lookup<'a>,
}

/// Which rank of how many, here and in all.
struct Place {
    rank: usize,
    ranks: usize,
    local_rank: usize,
    local_ranks: Option<usize>,
}

impl Variables<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.env)(name)
    }

    fn number<T: FromStr>(&self, name: &'static str) -> Result<Option<T>, Error> {
        let Some(value) = self.text(name) else { return Ok(None) };
        match value.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(wrong(name, &value, "not a number that it can be")),
        }
    }

    fn needed<T: FromStr>(&self, name: &'static str) -> Result<T, Error> {
        self.number(name)?.ok_or_else(|| missing(name))
    }

    fn any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.text(name).is_some())
    }

    /// Who has left variables. A launcher that was started by another one is the closer one: torchrun and Open MPI's
    /// daemons are themselves started by srun.
    fn launcher(&self) -> Result<Launcher, Error> {
        let step = self.text("SLURM_STEP_ID").is_some()
            && self.number::<usize>("SLURM_STEP_NUM_TASKS")?.is_some_and(|tasks| tasks > 1);
        // srun sets PMI_RANK itself with --mpi=pmi2; then both say the same.
        let same = |a, b| self.text(a).is_none_or(|value| Some(value) == self.text(b));
        let by_srun = step && same("PMI_RANK", "SLURM_PROCID") && same("PMI_SIZE", "SLURM_STEP_NUM_TASKS");
        Ok(if self.any(&TORCHRUN[..2]) {
            Launcher::Torchrun
        } else if self.any(&OPEN_MPI[..2]) {
            Launcher::Mpi
        } else if by_srun {
            Launcher::Slurm
        } else if self.any(&HYDRA[..2]) {
            Launcher::Mpi
        } else {
            Launcher::None
        })
    }

    /// Reads a place; `None` where it is a world of one.
    fn place(&self, names: Names) -> Result<Option<Place>, Error> {
        let [rank_name, size_name, local_rank_name, local_size_name] = names;
        let (rank, ranks): (usize, usize) = (self.needed(rank_name)?, self.needed(size_name)?);
        if rank >= ranks {
            return Err(wrong(
                rank_name,
                &rank.to_string(),
                &format!("ranks count from 0, and {size_name} is {ranks}"),
            ));
        }
        if ranks == 1 {
            return Ok(None);
        }
        let local_rank: usize = self.needed(local_rank_name)?;
        let local_ranks: Option<usize> = self.number(local_size_name)?;
        if let Some(here) = local_ranks {
            if local_rank >= here {
                let why = format!("ranks count from 0, and {local_size_name} is {here}");
                return Err(wrong(local_rank_name, &local_rank.to_string(), &why));
            }
            if here > ranks {
                return Err(wrong(
                    local_size_name,
                    &here.to_string(),
                    &format!("{size_name} is only {ranks}"),
                ));
            }
        }
        Ok(Some(Place { rank, ranks, local_rank, local_ranks }))
    }

    fn torchrun(&self) -> Result<Option<Launch>, Error> {
        let Some(place) = self.place(TORCHRUN)? else { return Ok(None) };
        let address = self.text("MASTER_ADDR").ok_or_else(|| missing("MASTER_ADDR"))?;
        let port = match (self.port("CTQ_PORT")?, self.port("MASTER_PORT")?) {
            (Some(port), _) => port,
            (None, None) => return Err(missing("MASTER_PORT")),
            // Its own store listens there.
            (None, Some(port))
                if self.text("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|on| on == "True") =>
            {
                port.checked_add(1).unwrap_or(port - 1)
            }
            (None, Some(port)) => port,
        };
        let job = self.text("TORCHELASTIC_RUN_ID").filter(|id| id != "none");
        Ok(Some(self.launch(Launcher::Torchrun, place, address, port, job)))
    }

    fn slurm(&self) -> Result<Option<Launch>, Error> {
        let (step, ranks): (u64, usize) =
            (self.needed("SLURM_STEP_ID")?, self.needed("SLURM_STEP_NUM_TASKS")?);
        if ranks <= 1 {
            return Ok(None);
        }
        let (rank, local_rank): (usize, usize) =
            (self.needed("SLURM_PROCID")?, self.needed("SLURM_LOCALID")?);
        if rank >= ranks {
            let why = format!("ranks count from 0, and SLURM_STEP_NUM_TASKS is {ranks}");
            return Err(wrong("SLURM_PROCID", &rank.to_string(), &why));
        }
        let node: usize = self.number("SLURM_NODEID")?.unwrap_or(0);
        let local_ranks = self.text("SLURM_STEP_TASKS_PER_NODE").and_then(|list| tasks_of_node(&list, node));
        let address = match self.text("MASTER_ADDR") {
            Some(address) => address,
            None => self.first_node()?,
        };
        let job = format!("{}.{step}", self.needed::<u64>("SLURM_JOB_ID")?);
        let port = self.port("CTQ_PORT")?.or(self.port("MASTER_PORT")?).unwrap_or_else(|| port_of(&job));
        let place = Place { rank, ranks, local_rank, local_ranks };
        Ok(Some(self.launch(Launcher::Slurm, place, address, port, Some(job))))
    }

    fn first_node(&self) -> Result<String, Error> {
        let lists = ["SLURM_STEP_NODELIST", "SLURM_NODELIST"];
        let found = lists.into_iter().find_map(|name| self.text(name).map(|list| (name, list)));
        let (name, list) = found.ok_or_else(|| missing("SLURM_STEP_NODELIST"))?;
        first_host(&list)
            .ok_or_else(|| wrong(name, &list, "not a list of hosts; MASTER_ADDR would do as well"))
    }

    fn mpi(&self) -> Result<Option<Launch>, Error> {
        let names = if self.any(&OPEN_MPI[..2]) { OPEN_MPI } else { HYDRA };
        let Some(place) = self.place(names)? else { return Ok(None) };
        let address = match self.text("MASTER_ADDR") {
            Some(address) => address,
            None if place.local_ranks == Some(place.ranks) => "127.0.0.1".to_owned(),
            None => return Err(missing("MASTER_ADDR")),
        };
        // Both name the job of all processes that one mpirun has started: PMIx says so of a namespace, and Open MPI 4
        // sets the other from the job's id (the rank is in ess_base_vpid). MPICH and Intel MPI set nothing of the kind.
        let job = self.text("PMIX_NAMESPACE").or_else(|| self.text("OMPI_MCA_ess_base_jobid"));
        let port = self.port("CTQ_PORT")?.or(self.port("MASTER_PORT")?);
        let port = port.unwrap_or_else(|| port_of(job.as_deref().unwrap_or("mpirun")));
        Ok(Some(self.launch(Launcher::Mpi, place, address, port, job)))
    }

    fn port(&self, name: &'static str) -> Result<Option<u16>, Error> {
        match self.number(name)? {
            Some(0) => Err(wrong(name, "0", "ranks could not find one another")),
            port => Ok(port),
        }
    }

    fn launch(
        &self,
        launcher: Launcher,
        place: Place,
        address: String,
        port: u16,
        job: Option<String>,
    ) -> Launch {
        let Place { rank, ranks, local_rank, local_ranks } = place;
        let secret = Secret(self.text("CTQ_TOKEN").or(job).unwrap_or_default());
        Launch { launcher, rank, ranks, local_rank, local_ranks, address, port, secret }
    }
}

/// A port below those that systems give out, the same for all ranks of a job and rarely that of another one.
fn port_of(job: &str) -> u16 {
    let digest = Sha256::digest(job.as_bytes());
    20_000 + u16::from_be_bytes([digest[0], digest[1]]) % 20_000
}

fn missing(name: &'static str) -> Error {
    let wrong = "it says where and as which rank this process runs".to_owned();
    Error::Variable { name, found: "is not set".to_owned(), wrong }
}

fn wrong(name: &'static str, value: &str, why: &str) -> Error {
    Error::Variable { name, found: format!("is `{value}`"), wrong: why.to_owned() }
}
