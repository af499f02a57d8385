//! Which device computes: what was asked for held against what the machine has. Never silently the slow one.

use anyhow::bail;
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::driver::{CudaDevice, Machine, WhyNot, probe};
use ctq_kernels::cuda::{Cuda, scratch_bytes};
use ctq_kernels::{Backend, BackendIdentity, Sharded};
use ctq_model::Inventory;
use ctq_model::inventory::{Linear, LinearClass};
use ctq_runtime::{HEAD_ROWS, Pool, Resources};

use crate::args::DeviceChoice;
use crate::report::Report;
use crate::{cache, machine};

/// Something to do on whichever backend computes.
pub(crate) trait OnBackend {
    /// What it gives.
    type Output;

    /// Does it.
    fn run<B: Backend>(self, backend: &B) -> Self::Output;
}

/// A device that is ready to compute.
pub(crate) enum Opened {
    /// The CPU.
    Cpu(Cpu),
    /// A GPU.
    Cuda(Box<Cuda<CudaDevice>>),
}

/// How many rows of the head are looked at together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadUse {
    /// Some at a time: scores.
    Blocks,
    /// All: logits.
    Whole,
}

impl Opened {
    /// The CPU.
    pub(crate) fn cpu() -> Opened {
        Opened::Cpu(Cpu::detect())
    }

    /// Chooses a device, and opens it: at most `memory` bytes of a GPU are taken.
    ///
    /// # Errors
    /// As [`choose`]; where the device fails.
    pub(crate) fn open(choice: DeviceChoice, memory: Option<u64>, report: &Report) -> anyhow::Result<Opened> {
        let (machine, ordinal) = match choose(choice, report)? {
            Chosen::Cpu => return Ok(Opened::cpu()),
            Chosen::Cuda { machine, ordinal } => (machine, ordinal),
        };
        let device = CudaDevice::open(&machine, ordinal, memory, cache::folder().ok().as_deref())?;
        report.detail("making the CUDA kernels ready; the first time takes a while");
        device.load_kernels()?;
        for note in device.take_notes() {
            report.note(&note);
        }
        Ok(Opened::Cuda(Box::new(Cuda::new(device))))
    }

    /// Who computes.
    pub(crate) fn identity(&self) -> BackendIdentity {
        match self {
            Opened::Cpu(cpu) => cpu.identity(),
            Opened::Cuda(cuda) => cuda.identity(),
        }
    }

    /// Runs a task, on several ranks that share the device where `ranks` is more than 1. Call it inside the thread pool
    /// that should do the work.
    pub(crate) fn on<T: OnBackend>(&self, ranks: usize, task: T) -> T::Output {
        match (self, ranks) {
            (Opened::Cpu(cpu), 1) => task.run(cpu),
            (Opened::Cpu(cpu), _) => task.run(&Sharded::new(vec![*cpu; ranks])),
            (Opened::Cuda(cuda), 1) => task.run(cuda.as_ref()),
            (Opened::Cuda(cuda), _) => {
                task.run(&Sharded::new((0..ranks).map(|_| cuda.another_rank()).collect()))
            }
        }
    }

    /// What a run may take: `memory` bytes where they are named, else half of what is free of the host's memory, and
    /// nearly all that is free of a GPU's.
    ///
    /// # Errors
    /// Where the device fails.
    pub(crate) fn resources(
        &self,
        memory: Option<u64>,
        ranks: usize,
        inventory: &Inventory,
        head: HeadUse,
    ) -> anyhow::Result<Resources> {
        let host = machine::available_memory().unwrap_or(4 << 30) / 2;
        Ok(match self {
            Opened::Cpu(_) => Resources { pool: Pool::Shared(memory.unwrap_or(host)), scratch: 0, ranks },
            Opened::Cuda(cuda) => {
                let (free, _) = cuda.device().memory()?;
                // Pools and modules take some that nobody counts.
                let device = memory.unwrap_or(u64::MAX).min(free / 16 * 15);
                let scratch = scratch_bytes(inventory.linears().filter_map(|linear| decoded(linear, head)));
                Resources { pool: Pool::Separate { device, host }, scratch: scratch * ranks as u64, ranks }
            }
        })
    }
}

/// The device that computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// The CPU.
    Cpu,
    /// A GPU, by its number, of a machine that was probed.
    Cuda { machine: Box<Machine>, ordinal: usize },
}

impl Chosen {
    /// As `--device` names it.
    pub(crate) fn name(&self) -> String {
        match self {
            Chosen::Cpu => "cpu".to_owned(),
            Chosen::Cuda { ordinal, .. } => format!("cuda:{ordinal}"),
        }
    }
}

/// The part of a matrix that is decoded at once: nothing of an embedding, unless it is the head too.
fn decoded(linear: &Linear, head: HeadUse) -> Option<(usize, usize)> {
    match linear.class {
        LinearClass::Embedding | LinearClass::Head => Some(match head {
            HeadUse::Blocks => (linear.n.min(HEAD_ROWS), linear.k),
            HeadUse::Whole => (linear.n, linear.k),
        }),
        LinearClass::Attention | LinearClass::Ffn | LinearClass::Expert | LinearClass::Router => {
            Some((linear.n, linear.k))
        }
    }
}

/// Chooses; looks at the machine unless the CPU was asked for.
///
/// # Errors
/// Where a GPU was asked for or is there, and cannot be used.
fn choose(choice: DeviceChoice, report: &Report) -> anyhow::Result<Chosen> {
    let chosen = match choice {
        DeviceChoice::Cpu => Chosen::Cpu,
        DeviceChoice::Auto | DeviceChoice::Cuda | DeviceChoice::CudaAt(_) => decide(choice, probe())?,
    };
    report.detail(&format!("device: {}", chosen.name()));
    Ok(chosen)
}

/// What a choice means on a machine.
///
/// # Errors
/// As [`choose`].
pub(crate) fn decide(choice: DeviceChoice, probed: Result<Machine, WhyNot>) -> anyhow::Result<Chosen> {
    let first = |machine: &Machine| machine.usable().first().copied().unwrap_or_default();
    match (choice, probed) {
        (DeviceChoice::Cpu, _) => Ok(Chosen::Cpu),
        (DeviceChoice::Auto, Err(why)) if !why.gpu_is_there() => Ok(Chosen::Cpu),
        (DeviceChoice::Auto | DeviceChoice::Cuda, Ok(machine)) => {
            Ok(Chosen::Cuda { ordinal: first(&machine), machine: Box::new(machine) })
        }
        (DeviceChoice::CudaAt(ordinal), Ok(machine)) => match machine.device(ordinal) {
            Ok(_) => Ok(Chosen::Cuda { ordinal, machine: Box::new(machine) }),
            Err(why) => bail!("{why}"),
        },
        (DeviceChoice::Auto | DeviceChoice::Cuda | DeviceChoice::CudaAt(_), Err(why)) => {
            bail!("{why}; or take the CPU with --device cpu")
        }
    }
}

#[cfg(test)]
mod tests {
    use ctq_kernels::cuda::driver::{DeviceInfo, Driver, Kernels, NotFound, Version};

    use super::*;

    /// A machine with a GPU that is too old and one that can be used.
    fn machine() -> Machine {
        let device = |ordinal: usize, name: &str, capability| DeviceInfo {
            ordinal,
            name: name.to_owned(),
            capability,
            memory: 80 << 30,
            multiprocessors: 100,
            peers: Vec::new(),
        };
        let cuda = Version { major: 12, minor: 4, patch: None };
        let devices = vec![device(0, "Tesla T4", (7, 5)), device(1, "NVIDIA A100", (8, 0))];
        let too_old = WhyNot::UnsupportedArchitecture { device: "Tesla T4".to_owned(), capability: (7, 5) };
        Machine {
            driver: Driver { cuda, release: None, devices },
            kernels: vec![Err(too_old), Ok(Kernels::Compiled("sm_80".to_owned()))],
            nvrtc: Err(NotFound::default()),
            cublaslt: Err(NotFound::default()),
            nccl: Err(NotFound::default()),
        }
    }

    fn no_gpu() -> [WhyNot; 2] {
        [WhyNot::NoDriver { module_loaded: false }, WhyNot::NoDevice { visible: None }]
    }

    fn no_compiler() -> WhyNot {
        WhyNot::NoCompiler { major: 12, nvrtc: NotFound::default() }
    }

    fn name(choice: DeviceChoice, probed: Result<Machine, WhyNot>) -> Result<String, String> {
        decide(choice, probed).map(|chosen| chosen.name()).map_err(|error| error.to_string())
    }

    #[test]
    fn auto_takes_the_first_gpu_that_can_be_used() {
        assert_eq!(name(DeviceChoice::Auto, Ok(machine())).as_deref(), Ok("cuda:1"));
        assert_eq!(name(DeviceChoice::Cuda, Ok(machine())).as_deref(), Ok("cuda:1"));
    }

    #[test]
    fn auto_takes_the_cpu_only_where_there_is_no_gpu() {
        for why in no_gpu() {
            assert_eq!(name(DeviceChoice::Auto, Err(why)).as_deref(), Ok("cpu"));
        }
        assert_eq!(
            name(DeviceChoice::Auto, Err(no_compiler())).expect_err("a GPU is there").as_str(),
            "there is no NVRTC to compile kernels with: not found; run `pip install nvidia-cuda-nvrtc-cu12` and run the same command again, or set CTQ_NVRTC to its file; or take the CPU with --device cpu"
        );
    }

    #[test]
    fn a_gpu_that_was_asked_for_is_taken_or_nothing() {
        assert_eq!(name(DeviceChoice::CudaAt(1), Ok(machine())).as_deref(), Ok("cuda:1"));
        let error = |choice, probed| name(choice, probed).expect_err("not there");
        assert!(
            error(DeviceChoice::CudaAt(0), Ok(machine())).starts_with("Tesla T4 has compute capability 7.5")
        );
        assert!(error(DeviceChoice::CudaAt(2), Ok(machine())).starts_with("there is no device cuda:2"));
        for why in no_gpu().into_iter().chain([no_compiler()]) {
            for choice in [DeviceChoice::Cuda, DeviceChoice::CudaAt(0)] {
                assert!(error(choice, Err(why.clone())).ends_with("; or take the CPU with --device cpu"));
            }
        }
    }

    #[test]
    fn the_cpu_is_there_whatever_else_is() {
        for probed in [Ok(machine()), Err(no_compiler())] {
            assert_eq!(name(DeviceChoice::Cpu, probed).as_deref(), Ok("cpu"));
        }
    }
}
