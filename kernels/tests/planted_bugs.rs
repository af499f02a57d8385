//! Bugs planted into copies of the CUDA kernels, each of which the checks must notice: a suite that passes proves
//! something only if it can fail.
//!
//! A bug runs in a process of its own, so that one that ends the process counts as caught too.

#![expect(clippy::print_stdout, reason = "processes talk through it, and a run tells what was caught how")]

use std::path::Path;
use std::process::Command;

use ctq_kernels::check::{Area, Extent, Size, compare};
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::emulated::{Dense, Emulated, Schedule, Warpgroups};
use ctq_kernels::cuda::{AttentionPath, Cuda, LinearPath};
use rayon::prelude::*;

use self::kernels::Kernels;

#[path = "planted/any_device.rs"]
mod any_device;
#[path = "planted/attention_hopper.rs"]
mod attention_hopper;
#[path = "planted/kernels.rs"]
mod kernels;
#[path = "planted/warpgroups.rs"]
mod warpgroups;

/// One wrong line.
struct Bug {
    /// What is wrong.
    what: &'static str,
    /// Where it must show.
    area: Area,
    file: &'static str,
    /// The line as it is: stands in the file exactly once.
    line: &'static str,
    planted: &'static str,
}

/// Which kernels serve where several can.
#[derive(Clone, Copy, Debug)]
enum Engine {
    /// Those of every device.
    Plain,
    /// Those on warpgroups.
    Warpgroups,
    /// Those for fp8.
    Fp8,
}

/// Names the library that a child process is to check, the area, by its place among all, and the path of
/// linears on warpgroups, where they serve.
const LIBRARY: &str = "CTQ_PLANTED_LIBRARY";
const AREA: &str = "CTQ_PLANTED_AREA";
const LINEARS: &str = "CTQ_PLANTED_LINEARS";
/// Cases of an area that every schedule has before any has all.
const FEW: usize = 6;
/// What a child prints when it has noticed something.
const CAUGHT: &str = "caught:";
/// What a child prints when everything is sound.
const SOUND: &str = "everything is sound";

#[test]
fn every_planted_bug_is_caught() {
    let kernels = Kernels::compile();
    let plain = any_device::BUGS.iter().map(|bug| (bug, Engine::Plain));
    let on_warpgroups = warpgroups::BUGS.iter().chain(attention_hopper::BUGS);
    let on_warpgroups = on_warpgroups.map(|bug| (bug, Engine::Warpgroups));
    let fp8 = warpgroups::FP8_BUGS.iter().map(|bug| (bug, Engine::Fp8));
    let all: Vec<(&Bug, Engine)> = plain.chain(on_warpgroups).chain(fp8).collect();
    let missed: Vec<&str> = all
        .par_iter()
        .enumerate()
        .filter(|(index, (bug, engine))| {
            let library = kernels.with(&index.to_string(), bug.file, bug.line, bug.planted);
            let told = check_in_a_process(&library, bug.area, *engine);
            println!("{}: {}", bug.what, told.lines().find(|line| line.contains(CAUGHT)).unwrap_or(""));
            told.contains(SOUND)
        })
        .map(|(_, (bug, _))| bug.what)
        .collect();
    assert!(missed.is_empty(), "not caught: {missed:#?}");
}

/// Without a bug the same machinery finds nothing.
#[test]
fn unchanged_kernels_are_sound() {
    let include = "#include \"norm.cuh\"";
    let kernels = Kernels::compile();
    let library = kernels.with("unchanged", "norm.cu", include, include);
    for (area, engine) in
        [(Area::Rows, Engine::Plain), (Area::Large, Engine::Warpgroups), (Area::Codes, Engine::Fp8)]
    {
        let told = check_in_a_process(&library, area, engine);
        assert!(told.contains(SOUND), "{engine:?}: {told}");
    }
}

/// The body of the child process: does nothing where it is not one.
#[test]
fn check_one_library() {
    let Some(library) = std::env::var_os(LIBRARY) else { return };
    let place: usize = std::env::var(AREA).expect("an area").parse().expect("its place");
    let areas = &Area::ALL[place..=place];
    // Most bugs show at once under some schedule.
    let attempts = [Extent::Beginning(FEW), Extent::FirstFailure];
    let attempts = attempts.into_iter().flat_map(|extent| Schedule::ALL.map(|schedule| (extent, schedule)));
    for (extent, schedule) in attempts {
        let device = Emulated::new(schedule).with_dense_product(Dense::Present);
        let device = device.with_kernels(Path::new(&library)).expect("a build of the emulation");
        let cuda = match std::env::var(LINEARS) {
            Err(_) => Cuda::new(device),
            Ok(path) => {
                let path = LinearPath::asked_for(Some(&path)).expect("a path");
                let cuda = Cuda::new(device.with_warpgroups(Warpgroups::Present));
                cuda.with_linears(path).with_attention(Some(AttentionPath::Hopper))
            }
        };
        let findings = compare(&cuda, &Cpu::detect(), areas, Size::Small, extent);
        if let Some(found) = findings.iter().find(|finding| finding.failure.is_some()) {
            let failure = found.failure.as_deref().unwrap_or_default();
            println!("{CAUGHT} under {schedule:?}, {} {}: {failure}", found.operation, found.case);
            return;
        }
    }
    println!("{SOUND}");
}

fn check_in_a_process(library: &Path, area: Area, engine: Engine) -> String {
    let place = Area::ALL.iter().position(|of| *of == area).expect("one of all");
    let mut child = Command::new(std::env::current_exe().expect("this test"));
    child
        .args(["--exact", "check_one_library", "--nocapture"])
        .env(LIBRARY, library)
        .env(AREA, place.to_string());
    match engine {
        Engine::Plain => &mut child,
        Engine::Warpgroups => child.env(LINEARS, LinearPath::Hopper.to_string()),
        Engine::Fp8 => child.env(LINEARS, LinearPath::Fp8.to_string()),
    };
    let output = child.output().expect("a child process");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
