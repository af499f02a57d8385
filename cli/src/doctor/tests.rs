//! What the doctor says of machines that are made up.

use ctq_kernels::cuda::driver::{DeviceInfo, Version};
use insta::assert_snapshot;

use super::*;

fn some_cpu() -> Cpu {
    Cpu {
        isa: "avx512",
        features: vec!["avx2", "fma", "avx512f"],
        threads: 16,
        memory_available_bytes: Some(120 << 30),
        caches: [("1", "Data\n", "48K\n"), ("2", "Unified", "2048K"), ("3", "Unified", "105M")]
            .into_iter()
            .filter_map(|(level, kind, size)| cache_of(level, kind, size))
            .collect(),
    }
}

fn found(path: &str, version: (u32, u32, Option<u32>), origin: &str) -> Result<Found, NotFound> {
    let (major, minor, patch) = version;
    Ok(Found { path: path.into(), version: Version { major, minor, patch }, origin: origin.to_owned() })
}

fn missing() -> NotFound {
    let looked_in = vec!["the loader's path".to_owned(), "/usr/local/cuda".to_owned()];
    NotFound { looked_in, refused: Vec::new() }
}

fn gpu(ordinal: usize, name: &str, capability: (u32, u32), peers: &[usize]) -> DeviceInfo {
    let memory = (141 << 30) + (1 << 29);
    DeviceInfo {
        ordinal,
        name: name.to_owned(),
        capability,
        memory,
        multiprocessors: 132,
        peers: peers.to_vec(),
    }
}

/// A machine without a driver and without libraries.
fn bare() -> Survey {
    Survey {
        driver: Err(WhyNot::NoDriver { module_loaded: false }),
        nvrtc: Err(missing()),
        nvrtc_targets: Vec::new(),
        cublaslt: Err(missing()),
        nccl: Err(missing()),
        prebuilt: Vec::new(),
    }
}

/// A machine with GPUs and everything but NVRTC.
fn with_gpus(devices: Vec<DeviceInfo>) -> Survey {
    let cuda = Version { major: 13, minor: 0, patch: None };
    Survey {
        driver: Ok(Driver { cuda, release: Some("580.95.05".to_owned()), devices }),
        cublaslt: found("lib/libcublasLt.so.13", (13, 0, Some(2)), "$CUDA_HOME"),
        nccl: found("lib/libnccl.so.2", (2, 27, Some(3)), "the loader's path"),
        ..bare()
    }
}

fn with_nvrtc(survey: Survey) -> Survey {
    let nvrtc = found("lib/libnvrtc.so.13", (13, 0, None), "$VIRTUAL_ENV");
    Survey { nvrtc, nvrtc_targets: vec![75, 80, 90], ..survey }
}

fn told(survey: &Survey, open: &dyn Fn(&Machine, usize) -> Opened) -> String {
    text(&diagnose(survey, some_cpu(), open))
}

fn never(_: &Machine, ordinal: usize) -> Opened {
    panic!("cuda:{ordinal} cannot be opened")
}

#[test]
fn a_machine_without_a_gpu() {
    assert_snapshot!(told(&bare(), &never));
}

#[test]
fn a_machine_with_two_gpus() {
    let survey =
        with_nvrtc(with_gpus(vec![gpu(0, "NVIDIA H200", (9, 0), &[1]), gpu(1, "NVIDIA H200", (9, 0), &[0])]));
    let open = |_: &Machine, ordinal: usize| match ordinal {
        0 => Opened {
            free: Some(140 << 30),
            kernels: Ok("ready after 1.2 s".to_owned()),
            dense: "cuBLASLt 13.0.2, algorithm 66, tile 27, stages 36".to_owned(),
        },
        _ => Opened {
            free: None,
            kernels: Err("cuda:1 (NVIDIA H200): cuCtxSetCurrent: CUDA_ERROR_ECC_UNCORRECTABLE".to_owned()),
            dense: "not known".to_owned(),
        },
    };
    assert_snapshot!(told(&survey, &open));
}

#[test]
fn a_gpu_without_a_compiler() {
    let survey = with_gpus(vec![gpu(0, "NVIDIA H200", (9, 0), &[])]);
    assert_snapshot!(told(&survey, &never));
}

#[test]
fn a_gpu_that_is_too_old_beside_one_that_is_not() {
    let survey =
        with_nvrtc(with_gpus(vec![gpu(0, "Tesla T4", (7, 5), &[]), gpu(1, "NVIDIA A100", (8, 0), &[])]));
    let open = |_: &Machine, ordinal: usize| {
        assert_eq!(ordinal, 1);
        let dense = "ctq's own kernels (cuBLASLt: not found)".to_owned();
        Opened { free: Some(1 << 30), kernels: Ok("ready after 0.1 s".to_owned()), dense }
    };
    assert_snapshot!(told(&survey, &open));
}

#[test]
fn as_json_it_says_the_same() {
    let survey = with_nvrtc(with_gpus(vec![gpu(0, "Tesla T4", (7, 5), &[])]));
    let diagnosis = diagnose(&survey, some_cpu(), &never);
    insta::assert_json_snapshot!(diagnosis);
}

#[test]
fn caches_are_read_as_linux_writes_them() {
    assert_eq!(
        cache_of("1\n", "Data\n", "32K\n"),
        Some(Cache { name: "L1 data".to_owned(), bytes: 32 << 10 })
    );
    assert_eq!(cache_of("3", "Unified", "1G"), Some(Cache { name: "L3".to_owned(), bytes: 1 << 30 }));
    assert_eq!(cache_of("3", "Unified", "many"), None);
}
