//! `ctq doctor`: what this machine has to compute with, what ctq takes of it, and what would help it to more.

mod check;
mod collectives;

use std::fs;
use std::time::Instant;

use ctq_kernels::cpu::Isa;
use ctq_kernels::cuda::driver::{
    CudaDevice, Driver, Found, Kernels, Machine, NotFound, Survey, WhyNot, survey,
};
use ctq_kernels::cuda::{AttentionPath, LinearPath};
use serde::Serialize;

use crate::args::{DeviceChoice, DoctorOptions};
use crate::device::{attention, decide, linears};
use crate::exit::Verdict;
use crate::report::Report;
use crate::{cache, machine, report};

/// What is printed as JSON: a stable object.
#[derive(Debug, Serialize)]
struct Diagnosis {
    doctor_version: u32,
    cuda: Cuda,
    cpu: Cpu,
    /// What `--device auto` takes; nothing where it is refused.
    auto: Option<String>,
}

#[derive(Debug, Serialize)]
struct Cuda {
    /// Why no GPU can be used, where that is so.
    because: Option<String>,
    /// The CUDA that the driver is of.
    version: Option<String>,
    driver: Option<String>,
    devices: Vec<Gpu>,
    nvrtc: Library,
    cublaslt: Library,
    nccl: Library,
}

#[derive(Debug, Serialize)]
struct Gpu {
    device: String,
    name: String,
    compute_capability: String,
    multiprocessors: u32,
    memory_bytes: u64,
    memory_free_bytes: Option<u64>,
    /// GPUs whose memory it can address.
    peers: Vec<String>,
    /// Where its kernels come from, where it can be used.
    kernels: Option<String>,
    /// Why it cannot be used.
    problem: Option<String>,
    /// What multiplies dense matrices.
    dense_products: Option<String>,
}

#[derive(Debug, Serialize)]
struct Library {
    version: Option<String>,
    path: Option<String>,
    /// How it was found, or why it was not.
    told: String,
}

#[derive(Debug, Serialize)]
struct Cpu {
    isa: &'static str,
    features: Vec<&'static str>,
    threads: usize,
    memory_available_bytes: Option<u64>,
    caches: Vec<Cache>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Cache {
    name: String,
    bytes: u64,
}

/// What opening a device showed.
#[derive(Debug)]
struct Opened {
    free: Option<u64>,
    kernels: Result<String, String>,
    dense: String,
}

pub(crate) fn run(options: &DoctorOptions, report: &Report) -> anyhow::Result<Verdict> {
    if let Some(size) = options.check {
        return check::run(size, options, report);
    }
    let survey = survey();
    let opened = |machine: &Machine, ordinal: usize| open(machine, ordinal);
    let diagnosis = diagnose(&survey, cpu(), &opened);
    if options.json {
        report::result(&serde_json::to_string_pretty(&diagnosis)?)?;
    } else {
        report::result(&text(&diagnosis))?;
    }
    Ok(Verdict::Good)
}

/// Opens a device and makes its kernels: what is wrong with it shows then.
fn open(machine: &Machine, ordinal: usize) -> Opened {
    let failed = |error: String| Opened { free: None, kernels: Err(error), dense: "not known".to_owned() };
    let started = Instant::now();
    let cache = cache::folder().ok();
    let device = match CudaDevice::open(machine, ordinal, None, cache.as_deref()) {
        Ok(device) => device,
        Err(error) => return failed(error.to_string()),
    };
    let kernels = device.load_kernels().map_err(|error| error.to_string());
    let ready = format!("ready after {:.1} s", started.elapsed().as_secs_f64());
    let notes: String = device.take_notes().iter().map(|note| format!("; {note}")).collect();
    Opened {
        free: device.memory().ok().map(|(free, _)| free),
        kernels: kernels.map(|()| format!("{ready}{notes}")),
        dense: match device.dense() {
            Ok(library) => format!("{library}{}", asked_for()),
            Err(reason) => format!("ctq's own kernels ({reason}){}", asked_for()),
        },
    }
}

/// What the environment asks of linears and attention, in words to put behind what multiplies.
fn asked_for() -> String {
    let words = |name: &str, path: anyhow::Result<Option<String>>| match path {
        Ok(None) => String::new(),
        Ok(Some(path)) => format!("; {name}={path}"),
        Err(error) => format!("; {error}"),
    };
    let linears = linears().map(|path| path.map(|path| path.to_string()));
    let attention = attention().map(|path| path.map(|path| path.to_string()));
    words(LinearPath::VARIABLE, linears) + &words(AttentionPath::VARIABLE, attention)
}

fn diagnose(survey: &Survey, cpu: Cpu, open: &dyn Fn(&Machine, usize) -> Opened) -> Diagnosis {
    let machine = survey.machine();
    let driver = survey.driver.as_ref().ok();
    let devices = driver.map_or_else(Vec::new, |driver| gpus(survey, driver, machine.as_ref(), open));
    let auto = decide(DeviceChoice::Auto, machine.clone());
    Diagnosis {
        doctor_version: 1,
        cuda: Cuda {
            because: machine.as_ref().err().map(ToString::to_string),
            version: driver.map(|driver| driver.cuda.to_string()),
            driver: driver.and_then(|driver| driver.release.clone()),
            devices,
            nvrtc: library(&survey.nvrtc),
            cublaslt: library(&survey.cublaslt),
            nccl: library(&survey.nccl),
        },
        cpu,
        auto: auto.ok().map(|chosen| chosen.name()),
    }
}

fn gpus(
    survey: &Survey,
    driver: &Driver,
    machine: Result<&Machine, &WhyNot>,
    open: &dyn Fn(&Machine, usize) -> Opened,
) -> Vec<Gpu> {
    let gpu = |device: &ctq_kernels::cuda::driver::DeviceInfo| {
        let (major, minor) = device.capability;
        let found = survey.kernels(device, driver.cuda).map_err(|why| why.to_string());
        let opened = machine.ok().filter(|_| found.is_ok()).map(|machine| open(machine, device.ordinal));
        let kernels = found.and_then(|kernels| {
            let source = match kernels {
                Kernels::Prebuilt(target) => format!("built in for {target}"),
                Kernels::Compiled(target) => format!("compiled by NVRTC for {target}"),
            };
            match opened.as_ref().map(|opened| &opened.kernels) {
                Some(Ok(ready)) => Ok(format!("{source}, {ready}")),
                Some(Err(error)) => Err(error.clone()),
                None => Ok(source),
            }
        });
        Gpu {
            device: format!("cuda:{}", device.ordinal),
            name: device.name.clone(),
            compute_capability: format!("{major}.{minor}"),
            multiprocessors: device.multiprocessors,
            memory_bytes: device.memory,
            memory_free_bytes: opened.as_ref().and_then(|opened| opened.free),
            peers: device.peers.iter().map(|peer| format!("cuda:{peer}")).collect(),
            problem: kernels.as_ref().err().cloned(),
            dense_products: opened.filter(|_| kernels.is_ok()).map(|opened| opened.dense),
            kernels: kernels.ok(),
        }
    };
    driver.devices.iter().map(gpu).collect()
}

fn library(search: &Result<Found, NotFound>) -> Library {
    match search {
        Ok(found) => Library {
            version: Some(found.version.to_string()),
            path: Some(found.path.display().to_string()),
            told: format!("from {}", found.origin),
        },
        Err(missing) => Library {
            version: None,
            path: None,
            told: format!("{missing}; looked in {}", missing.looked_in.join(", ")),
        },
    }
}

/// The CPU that this runs on.
fn cpu() -> Cpu {
    Cpu {
        isa: Isa::detect().name(),
        features: features(),
        threads: machine::threads(),
        memory_available_bytes: machine::available_memory(),
        caches: caches(),
    }
}

/// Those that matter to kernels, of ctq or of others.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    let all = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    all.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<&'static str> {
    Vec::new()
}

/// Caches of the first core, as Linux tells them.
fn caches() -> Vec<Cache> {
    let root = "/sys/devices/system/cpu/cpu0/cache";
    let read = |index: usize, file: &str| fs::read_to_string(format!("{root}/index{index}/{file}")).ok();
    (0..8)
        .map_while(|index| cache_of(&read(index, "level")?, &read(index, "type")?, &read(index, "size")?))
        .collect()
}

/// `L1 data`, `L2`: from the texts `1`, `Data` and `48K`.
fn cache_of(level: &str, kind: &str, size: &str) -> Option<Cache> {
    let (level, kind, size) = (level.trim(), kind.trim().to_lowercase(), size.trim());
    let name = if kind == "unified" { format!("L{level}") } else { format!("L{level} {kind}") };
    let (digits, unit) = size.split_at(size.trim_end_matches(|c: char| c.is_ascii_alphabetic()).len());
    let unit: u64 = match unit {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    Some(Cache { name, bytes: digits.parse::<u64>().ok()? * unit })
}

fn text(diagnosis: &Diagnosis) -> String {
    let Diagnosis { cuda, cpu, auto, .. } = diagnosis;
    let mut lines = Vec::new();
    lines.push(match (&cuda.version, &cuda.driver) {
        (Some(version), Some(release)) => format!("driver      NVIDIA {release}, CUDA {version}"),
        (Some(version), None) => format!("driver      NVIDIA, CUDA {version}"),
        (None, _) => format!("driver      {}", cuda.because.as_deref().unwrap_or("none")),
    });
    for gpu in &cuda.devices {
        gpu_lines(gpu, &mut lines);
    }
    for (name, library) in [("NVRTC", &cuda.nvrtc), ("cuBLASLt", &cuda.cublaslt), ("NCCL", &cuda.nccl)] {
        lines.push(match (&library.version, &library.path) {
            (Some(version), Some(path)) => format!("{name:<10}  {version}: {path} ({})", library.told),
            (_, _) => format!("{name:<10}  {}", library.told),
        });
    }
    let memory = cpu.memory_available_bytes.map_or("memory not known".to_owned(), |m| size(m) + " available");
    lines.push(format!("CPU         {} threads, {memory}", cpu.threads));
    lines.push(format!("  features  {}", cpu.features.join(" ")));
    let caches: Vec<String> =
        cpu.caches.iter().map(|cache| format!("{} {}", cache.name, size(cache.bytes))).collect();
    if !caches.is_empty() {
        lines.push(format!("  caches    {}", caches.join(", ")));
    }
    lines.push(String::new());
    let usable: Vec<&str> =
        cuda.devices.iter().filter(|gpu| gpu.kernels.is_some()).map(|gpu| gpu.device.as_str()).collect();
    lines.push(match &cuda.because {
        None if usable.is_empty() => "CUDA engine no: no GPU could be opened, see above".to_owned(),
        None => format!("CUDA engine yes: {}", usable.join(", ")),
        Some(because) => format!("CUDA engine no: {because}"),
    });
    lines.push(format!("CPU engine  yes: {}", cpu.isa));
    lines.push(match auto {
        Some(device) if usable.len() > 1 => format!("--device auto takes {device}, and in eval all GPUs"),
        Some(device) => format!("--device auto takes {device}"),
        None => "--device auto is refused; what is written above would help, or --device cpu".to_owned(),
    });
    lines.join("\n")
}

fn gpu_lines(gpu: &Gpu, lines: &mut Vec<String>) {
    let free = gpu.memory_free_bytes.map_or_else(String::new, |free| format!("{} free of ", size(free)));
    lines.push(format!(
        "{:<10}  {}: compute capability {}, {} multiprocessors, {free}{}",
        gpu.device,
        gpu.name,
        gpu.compute_capability,
        gpu.multiprocessors,
        size(gpu.memory_bytes)
    ));
    if let Some(kernels) = &gpu.kernels {
        lines.push(format!("  kernels   {kernels}"));
    }
    if let Some(problem) = &gpu.problem {
        lines.push(format!("  problem   {problem}"));
    }
    if let Some(dense) = &gpu.dense_products {
        lines.push(format!("  dense     {dense}"));
    }
    if !gpu.peers.is_empty() {
        lines.push(format!("  peers     {}", gpu.peers.join(", ")));
    }
}

/// `139.8 GiB`, `48 KiB`.
fn size(bytes: u64) -> String {
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let (name, unit) = units.into_iter().find(|(_, unit)| bytes >= *unit).unwrap_or(("B", 1));
    if bytes.is_multiple_of(unit) {
        format!("{} {name}", bytes / unit)
    } else {
        format!("{:.1} {name}", bytes as f64 / unit as f64)
    }
}

#[cfg(test)]
#[path = "doctor/tests.rs"]
mod tests;
