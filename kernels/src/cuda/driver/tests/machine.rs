//! What follows from what a machine has, on machines that are made up.

use super::*;

fn version(major: u32, minor: u32) -> Version {
    Version { major, minor, patch: None }
}

fn device(ordinal: usize, name: &str, capability: (u32, u32)) -> DeviceInfo {
    DeviceInfo {
        ordinal,
        name: name.to_owned(),
        capability,
        memory: 80 << 30,
        multiprocessors: 132,
        peers: Vec::new(),
    }
}

fn nothing() -> NotFound {
    NotFound { looked_in: vec!["the loader's path".to_owned()], refused: Vec::new() }
}

/// A machine with these devices, a driver of this CUDA and a compiler of the same for these targets.
fn survey(cuda: Version, devices: Vec<DeviceInfo>, targets: &[u32]) -> Survey {
    let nvrtc = Found { path: "libnvrtc.so".into(), version: cuda, origin: "the loader's path".to_owned() };
    Survey {
        driver: Ok(Driver { cuda, release: None, devices }),
        nvrtc: Ok(nvrtc),
        nvrtc_targets: targets.to_vec(),
        cublaslt: Err(nothing()),
        nccl: Err(nothing()),
        prebuilt: Vec::new(),
    }
}

#[test]
fn a_machine_with_everything() {
    let devices = vec![device(0, "NVIDIA H200", (9, 0)), device(1, "NVIDIA L40S", (8, 9))];
    let machine = survey(version(13, 0), devices, &[80, 89, 90]).machine().expect("usable");
    let targets = ["sm_90a", "sm_89"].map(|target| Ok(Kernels::Compiled(target.to_owned())));
    assert_eq!(machine.kernels, targets);
    assert_eq!(machine.usable(), [0, 1]);
    assert_eq!(machine.device(1).expect("usable").0.name, "NVIDIA L40S");
    let error = machine.device(2).expect_err("there are two");
    assert_eq!(error, WhyNot::NoSuchDevice { ordinal: 2, count: 2 });
}

#[test]
fn a_device_that_is_too_old_is_left_out_and_said_of_a_machine_that_has_no_other() {
    let old = || device(0, "Tesla T4", (7, 5));
    let both = survey(version(12, 4), vec![old(), device(1, "NVIDIA A100", (8, 0))], &[75, 80]);
    let machine = both.machine().expect("one is usable");
    assert_eq!(machine.usable(), [1]);
    assert!(matches!(machine.device(0), Err(WhyNot::UnsupportedArchitecture { .. })));
    let error = survey(version(12, 4), vec![old()], &[75, 80]).machine().expect_err("none is usable");
    assert_eq!(
        error.to_string(),
        "Tesla T4 has compute capability 7.5, and ctq's kernels need 8.0 (Ampere) or later; take a newer GPU"
    );
    assert!(error.gpu_is_there());
}

#[test]
fn a_missing_compiler_is_told_with_the_one_line_that_installs_it() {
    let error = |cuda: Version| {
        let mut survey = survey(cuda, vec![device(0, "NVIDIA H100", (9, 0))], &[]);
        survey.nvrtc = Err(nothing());
        let error = survey.machine().expect_err("nothing compiles");
        assert!(error.gpu_is_there());
        error.to_string()
    };
    assert_eq!(
        error(version(12, 4)),
        "there is no NVRTC to compile kernels with: not found; run `pip install nvidia-cuda-nvrtc-cu12` and run the same command again, or set CTQ_NVRTC to its file"
    );
    assert!(error(version(13, 1)).contains("run `pip install 'nvidia-cuda-nvrtc==13.*'` and"));
}

#[test]
fn built_in_kernels_need_no_compiler() {
    let mut survey = survey(version(12, 4), vec![device(0, "NVIDIA H100", (9, 0))], &[]);
    survey.nvrtc = Err(nothing());
    survey.prebuilt = vec!["sm_80".to_owned(), "sm_90a".to_owned()];
    let machine = survey.machine().expect("usable");
    assert_eq!(machine.kernels, [Ok(Kernels::Prebuilt("sm_90a".to_owned()))]);
}

#[test]
fn a_compiler_older_than_the_device() {
    let error = survey(version(13, 0), vec![device(0, "NVIDIA B200", (10, 0))], &[80, 90]).machine();
    assert_eq!(
        error.expect_err("unknown to it").to_string(),
        "NVRTC 13.0 cannot compile for NVIDIA B200 (compute capability 10.0); run `pip install 'nvidia-cuda-nvrtc==13.*'` and run the same command again"
    );
}

#[test]
fn only_a_machine_without_a_gpu_has_none_to_miss() {
    let none = [WhyNot::NoDriver { module_loaded: true }, WhyNot::NoDevice { visible: Some(String::new()) }];
    assert!(none.iter().all(|why| !why.gpu_is_there()));
    let some = [
        WhyNot::NoDriverLibrary { device: "/dev/nvidia0".to_owned() },
        WhyNot::DriverFailed { what: "cuInit: CUDA_ERROR_UNKNOWN".to_owned() },
        WhyNot::DriverTooOld { cuda: version(11, 8) },
    ];
    assert!(some.iter().all(WhyNot::gpu_is_there));
    let told: Vec<String> = none.iter().chain(&some).map(ToString::to_string).collect();
    for (index, text) in told.iter().enumerate() {
        assert!(!told[..index].contains(text) && !text.contains('\n'), "{text}");
    }
}
