//! What launchers set, and what is made of it.

use std::collections::BTreeMap;

use ctq_cluster::{Error, Launch, Launcher, Secret};

/// Detects in an environment such as "RANK=1 WORLD_SIZE=2".
fn detect_as(choice: Launcher, environment: &str) -> Result<Option<Launch>, Error> {
    let pair = |pair: &str| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    let variables: BTreeMap<String, String> = environment.split_whitespace().filter_map(pair).collect();
    Launch::detect(choice, &|name| variables.get(name).cloned())
}

fn detect(environment: &str) -> Launch {
    detect_as(Launcher::Auto, environment).expect("a launcher").expect("more than one rank")
}

fn error(environment: &str) -> String {
    detect_as(Launcher::Auto, environment).expect_err("variables that contradict").to_string()
}

/// As torchrun of torch 2.14 sets them for two processes on each of two nodes, on the second node.
const TORCHRUN: &str = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 ROLE_RANK=3 \
    MASTER_ADDR=node0 MASTER_PORT=29500 TORCHELASTIC_RUN_ID=job7 TORCHELASTIC_USE_AGENT_STORE=True";

const SLURM: &str = "SLURM_JOB_ID=4711 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=5 SLURM_PROCID=3 SLURM_LOCALID=1 \
    SLURM_NODEID=1 SLURM_STEP_TASKS_PER_NODE=2(x2),1 SLURM_STEP_NODELIST=gpu[03-04,7]";

const OPEN_MPI: &str = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 \
    OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=prterun-n1-77@1";

#[test]
fn torchrun_keeps_its_port_to_itself() {
    let launch = detect(TORCHRUN);
    assert_eq!((launch.launcher, launch.rank, launch.ranks), (Launcher::Torchrun, 3, 4));
    assert_eq!((launch.local_rank, launch.local_ranks), (1, Some(2)));
    assert_eq!((launch.address.as_str(), launch.port), ("node0", 29501));
    assert_eq!(launch.secret, Secret::new("job7"));
    let without = TORCHRUN.replace("USE_AGENT_STORE=True", "USE_AGENT_STORE=False").replace("job7", "none");
    let launch = detect(&without);
    assert_eq!((launch.port, launch.secret), (29500, Secret::new("")));
    assert_eq!(detect(&TORCHRUN.replace("29500", "65535")).port, 65534);
}

#[test]
fn srun_gives_hosts_and_a_port_of_the_step() {
    let launch = detect(SLURM);
    assert_eq!((launch.launcher, launch.rank, launch.ranks), (Launcher::Slurm, 3, 5));
    assert_eq!((launch.local_rank, launch.local_ranks), (1, Some(2)));
    assert_eq!(launch.address, "gpu03");
    assert_eq!(launch.secret, Secret::new("4711.0"));
    assert!((20_000..40_000).contains(&launch.port));
    let other_rank = detect(&SLURM.replace("PROCID=3", "PROCID=0"));
    assert_eq!(launch.port, other_rank.port);
    let other_step = detect(&SLURM.replace("STEP_ID=0", "STEP_ID=1"));
    assert_ne!((launch.port, launch.secret), (other_step.port, other_step.secret));
    let told = detect(&format!("{SLURM} MASTER_ADDR=10.0.0.9 MASTER_PORT=4000"));
    assert_eq!((told.address.as_str(), told.port), ("10.0.0.9", 4000));
}

#[test]
fn slurm_counts_only_in_a_step_of_several_tasks() {
    for environment in [
        "SLURM_JOB_ID=4711 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_NODELIST=n[1-2]",
        "SLURM_JOB_ID=4711 SLURM_STEP_ID=4294967290 SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0",
    ] {
        assert!(detect_as(Launcher::Auto, environment).expect("nothing wrong").is_none(), "{environment}");
    }
}

#[test]
fn mpirun_meets_on_one_machine_by_itself() {
    let launch = detect(OPEN_MPI);
    assert_eq!((launch.launcher, launch.rank, launch.ranks), (Launcher::Mpi, 1, 2));
    assert_eq!(launch.address, "127.0.0.1");
    assert_eq!(launch.secret, Secret::new("prterun-n1-77@1"));
    let older = detect(&OPEN_MPI.replace("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"));
    assert_eq!((older.port, older.secret), (launch.port, launch.secret));
    let hydra = detect("PMI_RANK=1 PMI_SIZE=3 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=3 MASTER_PORT=4000");
    assert_eq!((hydra.rank, hydra.ranks, hydra.local_ranks, hydra.port), (1, 3, Some(3), 4000));
    let nodes = OPEN_MPI.replace("LOCAL_SIZE=2", "LOCAL_SIZE=1").replace("LOCAL_RANK=1", "LOCAL_RANK=0");
    assert!(error(&nodes).contains("MASTER_ADDR is not set"), "{}", error(&nodes));
    assert_eq!(detect(&format!("{nodes} MASTER_ADDR=n1")).address, "n1");
}

#[test]
fn the_launcher_that_is_closest_counts() {
    // torchrun and the daemons of mpirun are started by srun.
    assert_eq!(detect(&format!("{SLURM} {TORCHRUN}")).launcher, Launcher::Torchrun);
    assert_eq!(detect(&format!("{SLURM} {OPEN_MPI}")).launcher, Launcher::Mpi);
    // srun --mpi=pmi2 says the same twice; mpirun of MPICH under Slurm does not.
    assert_eq!(detect(&format!("{SLURM} PMI_RANK=3 PMI_SIZE=5")).launcher, Launcher::Slurm);
    let hydra = format!("{SLURM} PMI_RANK=3 PMI_SIZE=8 MPI_LOCALRANKID=3 MPI_LOCALNRANKS=8");
    assert_eq!(detect(&hydra).launcher, Launcher::Mpi);
    let chosen = detect_as(Launcher::Slurm, &format!("{SLURM} {TORCHRUN}")).expect("a step");
    assert_eq!(chosen.expect("more than one rank").launcher, Launcher::Slurm);
}

#[test]
fn a_port_and_a_token_of_ours_come_first() {
    for environment in [TORCHRUN, SLURM, OPEN_MPI] {
        let launch = detect(&format!("{environment} MASTER_PORT=4000 CTQ_PORT=5000 CTQ_TOKEN=secret"));
        assert_eq!((launch.port, launch.secret), (5000, Secret::new("secret")), "{environment}");
    }
    assert!(error(&format!("{TORCHRUN} CTQ_PORT=0")).contains("CTQ_PORT is `0`"));
    assert!(error(&format!("{TORCHRUN} CTQ_PORT=70000")).contains("CTQ_PORT is `70000`"));
}

#[test]
fn one_process_is_alone() {
    for environment in [
        "",
        "RANK=0 WORLD_SIZE=1",
        "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1",
        "RANK= WORLD_SIZE= MASTER_ADDR=n1",
    ] {
        assert!(detect_as(Launcher::Auto, environment).expect("nothing wrong").is_none(), "{environment}");
    }
    assert!(detect_as(Launcher::None, TORCHRUN).expect("nothing is read").is_none());
}

#[test]
fn what_is_half_set_or_contradicts_is_named_with_a_way_out() {
    for (environment, named) in [
        ("WORLD_SIZE=2".to_owned(), "RANK is not set"),
        ("RANK=0".to_owned(), "WORLD_SIZE is not set"),
        (TORCHRUN.replace("RANK=3 ", "RANK=4 "), "RANK is `4`"),
        (TORCHRUN.replace("WORLD_SIZE=4", "WORLD_SIZE=many"), "WORLD_SIZE is `many`"),
        (TORCHRUN.replace("LOCAL_RANK=1", "LOCAL_RANK=2"), "LOCAL_RANK is `2`"),
        (TORCHRUN.replace("LOCAL_RANK=1", ""), "LOCAL_RANK is not set"),
        (TORCHRUN.replace("LOCAL_WORLD_SIZE=2", "LOCAL_WORLD_SIZE=5"), "LOCAL_WORLD_SIZE is `5`"),
        (TORCHRUN.replace("MASTER_ADDR=node0", ""), "MASTER_ADDR is not set"),
        (TORCHRUN.replace("MASTER_PORT=29500", ""), "MASTER_PORT is not set"),
        (SLURM.replace("SLURM_PROCID=3", ""), "SLURM_PROCID is not set"),
        (SLURM.replace("PROCID=3", "PROCID=5"), "SLURM_PROCID is `5`"),
        (SLURM.replace("gpu[03-04,7]", "gpu[03"), "SLURM_STEP_NODELIST is `gpu[03`"),
        (OPEN_MPI.replace("OMPI_COMM_WORLD_SIZE=2", ""), "OMPI_COMM_WORLD_SIZE is not set"),
    ] {
        let error = error(&environment);
        assert!(error.contains(named) && error.contains("--launcher none"), "{environment}: {error}");
    }
    let chosen = detect_as(Launcher::Torchrun, "").expect_err("there is no torchrun");
    assert!(chosen.to_string().contains("RANK is not set"), "{chosen}");
}
