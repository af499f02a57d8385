//! Lists the sources of the CUDA kernels for whoever compiles them when ctq runs. Compiles them for the CPU where the
//! `emulated` feature asks for it, and for every kind of GPU where `prebuilt` does.

use std::path::{Path, PathBuf};
use std::{env, fs};

#[cfg(feature = "prebuilt")]
#[path = "build/prebuilt.rs"]
mod prebuilt;

fn main() {
    println!("cargo::rerun-if-changed=cuda");
    sources();
    #[cfg(feature = "prebuilt")]
    prebuilt::compile(&files("cu"), &output());
    #[cfg(feature = "emulated")]
    emulation();
}

/// Where this script writes.
fn output() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"))
}

/// Files of kernels whose names end so, sorted.
fn files(extension: &str) -> Vec<PathBuf> {
    let folder = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("cuda");
    let entries = fs::read_dir(folder).expect("the folder of kernels").flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|of| of == extension)).collect();
    files.sort();
    files
}

/// Writes `units.rs` and `headers.rs`: lists of `(name, text)`.
fn sources() {
    for (extension, list) in [("cu", "units.rs"), ("cuh", "headers.rs")] {
        let row = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default();
            format!("    Source {{ name: {name:?}, text: include_str!({path:?}) }},\n")
        };
        let rows: String = files(extension).iter().map(row).collect();
        fs::write(output().join(list), format!("&[\n{rows}]\n")).expect("cargo's folder can be written");
    }
}

#[cfg(feature = "emulated")]
fn emulation() {
    // One file of all: kernels that are linked but never named would not be kept.
    let engine = Path::new("cuda/emulation/simt.cpp").canonicalize().expect("the emulation's engine");
    let include = |path: PathBuf| format!("#include {path:?}\n");
    let all = output().join("emulation.cpp");
    fs::write(&all, files("cu").into_iter().chain([engine]).map(include).collect::<String>())
        .expect("cargo's folder can be written");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").file(all).opt_level(2).warnings(true);
    // Sums and products are rounded one by one, as on the device.
    build.flag("-ffp-contract=off").flag("-Wno-unused-function");
    // Fused multiply-adds in hardware, where the machine that builds is the one that runs.
    #[cfg(target_arch = "x86_64")]
    if std::env::var("TARGET") == std::env::var("HOST") && std::arch::is_x86_feature_detected!("fma") {
        build.flag("-mfma");
    }
    build.compile("ctq_emulated_kernels");
}
