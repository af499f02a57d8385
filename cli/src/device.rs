//! Which devices compute: what was asked for held against what the machine has. Never silently the slow one.

use std::env;

use anyhow::bail;
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::driver::{CudaDevice, Machine, NcclLibrary, WhyNot, probe};
use ctq_kernels::cuda::{AttentionPath, Cuda, LinearPath, scratch_bytes};
use ctq_kernels::{Backend, BackendIdentity};
use ctq_model::Inventory;
use ctq_model::inventory::{Linear, LinearClass};
use ctq_runtime::{HEAD_ROWS, Pool, Resources};

use crate::args::DeviceChoice;
use crate::report::Report;
use crate::{cache, machine};

/// The kernels that linears are asked to go through, in place of the rule.
///
/// # Errors
/// Where the variable names none.
pub(crate) fn linears() -> anyhow::Result<Option<LinearPath>> {
    let value = env::var_os(LinearPath::VARIABLE).map(|value| value.to_string_lossy().into_owned());
    LinearPath::asked_for(value.as_deref()).map_err(anyhow::Error::msg)
}

/// The kernel that bf16 attention is asked to go through, in place of the rule.
///
/// # Errors
/// Where the variable names none.
pub(crate) fn attention() -> anyhow::Result<Option<AttentionPath>> {
    let value = env::var_os(AttentionPath::VARIABLE).map(|value| value.to_string_lossy().into_owned());
    AttentionPath::asked_for(value.as_deref()).map_err(anyhow::Error::msg)
}

/// Something to do on whichever backend computes.
pub(crate) trait OnBackend {
    /// What it gives.
    type Output;

    /// Does it.
    fn run<B: Backend>(self, backend: &B) -> Self::Output;
}

/// Devices that are ready to compute.
pub(crate) enum Opened {
    /// The CPU.
    Cpu(Cpu),
    /// GPUs.
    Cuda(Gpus),
}

/// GPUs of one machine.
pub(crate) struct Gpus {
    /// At least one.
    pub(crate) devices: Vec<Cuda<CudaDevice>>,
    /// GPUs of the machine that could be used.
    usable: usize,
    /// The library that copies between GPUs of several processes, or why there is none.
    pub(crate) nccl: Result<NcclLibrary, String>,
}

/// How many of a machine's devices are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// At most so many.
    AtMost(usize),
    /// All that can be used.
    All,
    /// The one for this process among those that share the machine.
    OfProcess(usize),
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
        Opened::open_several(choice, Wanted::AtMost(1), memory, report)
    }

    /// As [`Opened::open`] for several GPUs; of each, at most `memory` bytes are taken.
    ///
    /// # Errors
    /// As [`Opened::open`].
    pub(crate) fn open_several(
        choice: DeviceChoice,
        wanted: Wanted,
        memory: Option<u64>,
        report: &Report,
    ) -> anyhow::Result<Opened> {
        let (machine, usable) = match choose(choice, report)? {
            Chosen::Cpu => return Ok(Opened::cpu()),
            Chosen::Cuda { machine, ordinals } => (machine, ordinals),
        };
        let ordinals = wanted.of(&usable);
        report.detail("making the CUDA kernels ready; the first time takes a while");
        let cache = cache::folder().ok();
        let (linears, attention) = (linears()?, attention()?);
        let mut devices = Vec::with_capacity(ordinals.len());
        for ordinal in ordinals {
            let device = CudaDevice::open(&machine, ordinal, memory, cache.as_deref())?;
            device.load_kernels()?;
            for note in device.take_notes() {
                report.note(&note);
            }
            devices.push(Cuda::new(device).with_linears(linears).with_attention(attention));
        }
        CudaDevice::connect(&devices.iter().map(Cuda::device).collect::<Vec<_>>())?;
        let nccl = match &machine.nccl {
            Ok(found) => NcclLibrary::load(&found.path),
            Err(error) => Err(error.to_string()),
        };
        report.detail(&match &nccl {
            Ok(library) => format!("NCCL {}", library.version()),
            Err(reason) => format!("no NCCL: {reason}; processes go by way of the host"),
        });
        Ok(Opened::Cuda(Gpus { devices, usable: usable.len(), nccl }))
    }

    /// Devices.
    pub(crate) fn count(&self) -> usize {
        match self {
            Opened::Cpu(_) => 1,
            Opened::Cuda(gpus) => gpus.devices.len(),
        }
    }

    /// Names of the devices.
    pub(crate) fn names(&self) -> Vec<String> {
        match self {
            Opened::Cpu(_) => vec!["cpu".to_owned()],
            Opened::Cuda(gpus) => gpus.devices.iter().map(|cuda| cuda.device().name().to_owned()).collect(),
        }
    }

    /// Who computes.
    pub(crate) fn identity(&self) -> BackendIdentity {
        match self {
            Opened::Cpu(cpu) => cpu.identity(),
            Opened::Cuda(gpus) => gpus.devices[0].identity(),
        }
    }

    /// Runs a task on one device. Call it inside the thread pool that should do the work.
    pub(crate) fn on<T: OnBackend>(&self, task: T) -> T::Output {
        match self {
            Opened::Cpu(cpu) => task.run(cpu),
            Opened::Cuda(gpus) => task.run(&gpus.devices[0]),
        }
    }

    /// What each of `seats` seats in this process may take: `memory` bytes of a device where they are named, else half of
    /// what is free of the host's memory, and nearly all that is free of a GPU's; its share where several are on one
    /// device. `neighbours`: processes that share this machine's memory, this one among them.
    ///
    /// # Errors
    /// Where a device fails.
    pub(crate) fn resources(
        &self,
        memory: Option<u64>,
        seats: usize,
        neighbours: usize,
        inventory: &Inventory,
        head: HeadUse,
    ) -> anyhow::Result<Resources> {
        let host = machine::available_memory().unwrap_or(4 << 30) / 2 / neighbours as u64;
        Ok(match self {
            Opened::Cpu(_) => {
                let bytes = memory.unwrap_or(host) / seats as u64;
                Resources { pool: Pool::Shared(bytes), scratch: 0 }
            }
            Opened::Cuda(Gpus { devices, usable, .. }) => {
                let mut device = memory.unwrap_or(u64::MAX);
                for cuda in devices {
                    let (free, _) = cuda.device().memory()?;
                    // Pools and modules take some that nobody counts.
                    device = device.min(free / 16 * 15);
                }
                // Processes take the GPUs in turn.
                let sharing = seats.div_ceil(devices.len()).max(neighbours.div_ceil(*usable));
                let device = device / sharing as u64;
                let scratch = scratch_bytes(inventory.linears().filter_map(|linear| decoded(linear, head)));
                Resources { pool: Pool::Separate { device, host: host / seats as u64 }, scratch }
            }
        })
    }
}

impl Wanted {
    /// Those of the machine's devices that are wanted.
    fn of(self, ordinals: &[usize]) -> Vec<usize> {
        match self {
            Wanted::AtMost(count) => ordinals.iter().copied().take(count.max(1)).collect(),
            Wanted::All => ordinals.to_vec(),
            Wanted::OfProcess(process) => vec![ordinals[process % ordinals.len()]],
        }
    }
}

/// The devices that may compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// The CPU.
    Cpu,
    /// GPUs, by their numbers, at least one, of a machine that was probed.
    Cuda { machine: Box<Machine>, ordinals: Vec<usize> },
}

impl Chosen {
    /// As `--device` names the first.
    pub(crate) fn name(&self) -> String {
        match self {
            Chosen::Cpu => "cpu".to_owned(),
            Chosen::Cuda { ordinals, .. } => format!("cuda:{}", ordinals[0]),
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
    match (choice, probed) {
        (DeviceChoice::Cpu, _) => Ok(Chosen::Cpu),
        (DeviceChoice::Auto, Err(why)) if !why.gpu_is_there() => Ok(Chosen::Cpu),
        (DeviceChoice::Auto | DeviceChoice::Cuda, Ok(machine)) => {
            let ordinals = machine.usable();
            if ordinals.is_empty() {
                bail!(
                    "no GPU of this machine can be used; `ctq doctor` says why; or take the CPU with --device cpu"
                );
            }
            Ok(Chosen::Cuda { ordinals, machine: Box::new(machine) })
        }
        (DeviceChoice::CudaAt(ordinal), Ok(machine)) => match machine.device(ordinal) {
            Ok(_) => Ok(Chosen::Cuda { ordinals: vec![ordinal], machine: Box::new(machine) }),
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
