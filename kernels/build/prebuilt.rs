//! Compiles every file of kernels for every target with nvcc, and fails where a kernel spills registers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

/// Targets: Ampere (A100; RTX 30), Ada, Hopper, Blackwell (B200; RTX 50).
const TARGETS: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"];

/// Writes the machine code to `output`, and `prebuilt.rs`: a list of `(file, target, bytes)`.
pub(crate) fn compile(units: &[PathBuf], output: &Path) {
    println!("cargo::rerun-if-env-changed=CTQ_NVCC");
    let nvcc = nvcc();
    let mut rows = String::new();
    for unit in units {
        let name = unit.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let cubins: Vec<PathBuf> =
            TARGETS.iter().map(|target| output.join(format!("{name}.{target}.cubin"))).collect();
        let results: Vec<Result<(), String>> = thread::scope(|scope| {
            let mut running = Vec::new();
            for (target, cubin) in TARGETS.iter().zip(&cubins) {
                let nvcc = &nvcc;
                running.push(scope.spawn(move || compile_one(nvcc, unit, target, cubin)));
            }
            running.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        for ((target, cubin), result) in TARGETS.iter().zip(&cubins).zip(results) {
            if let Err(error) = result {
                panic!("{name} for {target}: {error}");
            }
            rows.push_str(&format!("    ({name:?}, {target:?}, include_bytes!({cubin:?})),\n"));
        }
    }
    fs::write(output.join("prebuilt.rs"), format!("&[\n{rows}]\n")).expect("cargo's folder can be written");
}

/// `$CTQ_NVCC`, else the one on the PATH.
fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("CTQ_NVCC").map(PathBuf::from) {
        assert!(nvcc.is_file(), "CTQ_NVCC is {}, and there is no such file", nvcc.display());
        return nvcc;
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join("nvcc")).find(|file| file.is_file());
    found.expect(
        "the feature `prebuilt` needs CUDA's compiler: set CTQ_NVCC to nvcc (12.8 or later), put it on the PATH, or \
         build without the feature to have kernels compiled where ctq runs",
    )
}

fn compile_one(nvcc: &Path, unit: &Path, target: &str, cubin: &Path) -> Result<(), String> {
    let code = format!("-gencode=arch={},code={target}", target.replace("sm_", "compute_"));
    let output = Command::new(nvcc)
        // Sums and products are rounded one by one.
        .args(["-std=c++17", "--fmad=false", "-cubin", &code, "-Xptxas", "-warn-spills", "-o"])
        .args([cubin, unit])
        .output()
        .map_err(|error| format!("{} cannot be run: {error}", nvcc.display()))?;
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    // Not those of the compiler's own functions, such as the rare cases of a division.
    let spills = said.lines().any(|line| line.contains("spilled") && !line.contains("function '__cuda_"));
    match output.status.success() {
        false => Err(format!("nvcc fails:\n{said}")),
        true if spills => Err(format!("registers are spilled:\n{said}")),
        true => Ok(()),
    }
}
