//! Checkpoints as models to run, on the fly and converted, without the `ctq` program in between.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use ctq_container::{Container, LayerSource, Overwrite};
use ctq_convert::{Options, TiledCheckpoint, convert};
use ctq_kernels::Compute;
use ctq_kernels::cpu::Cpu;
use ctq_model::{Checkpoint, Inventory};
use ctq_runtime::{Acts, Engine, Error, Settings};

use crate::assets;

/// A checkpoint tiled on the fly.
///
/// # Panics
/// If it cannot be read.
pub fn on_the_fly(folder: &Path) -> TiledCheckpoint {
    TiledCheckpoint::open(folder, &[]).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
}

/// A checkpoint converted to a container at `out`.
///
/// # Panics
/// If it cannot be converted.
pub fn converted(folder: &Path, out: &Path) -> Container {
    let failed = |error: &dyn std::error::Error| -> ! { panic!("{}: {error}", folder.display()) };
    let source = Checkpoint::open(folder).unwrap_or_else(|error| failed(&error));
    let inventory = Inventory::read(&source, &[]).unwrap_or_else(|error| failed(&error));
    let interrupt = AtomicBool::new(false);
    let options =
        Options { threads: 2, overwrite: Overwrite::Refuse, name: None, interrupt: Some(&interrupt) };
    convert(&source, &inventory, out, &options, &|_| {}).unwrap_or_else(|error| failed(&error))
}

/// The settings of a run.
pub fn settings(acts: Acts, compute: Compute) -> Settings {
    Settings { acts, compute }
}

/// Logits of all rows, one after the other, each a window of its own.
///
/// # Errors
/// As [`Engine::logits`].
pub fn logits(source: &dyn LayerSource, rows: &[Vec<u32>], settings: Settings) -> Result<Vec<f32>, Error> {
    let cpu = Cpu::detect();
    let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let mut logits = Vec::new();
    Engine::new(&cpu, source, settings).logits(&rows, &(), |rows| {
        logits.extend_from_slice(rows);
        Ok::<(), Error>(())
    })?;
    Ok(logits)
}

/// The bundled FP8 checkpoint with activation scales found at run time instead of stored ones.
///
/// # Panics
/// If it cannot be copied.
pub fn dynamic_per_tensor(parent: &Path) -> PathBuf {
    let (from, to) = (assets::golden("bundled/FP8"), parent.join("dynamic-per-tensor"));
    std::fs::create_dir(&to).expect("a new folder");
    for entry in std::fs::read_dir(&from).expect("a checkpoint") {
        let path = entry.expect("directory entry").path();
        std::fs::copy(&path, to.join(assets::name(&path))).expect("copied");
    }
    let config = std::fs::read(to.join("config.json")).expect("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&config).expect("JSON");
    let inputs = &mut config["quantization_config"]["config_groups"]["group_0"]["input_activations"];
    assert_eq!(inputs["strategy"], "tensor");
    inputs["dynamic"] = true.into();
    std::fs::remove_file(to.join("config.json")).expect("removed");
    std::fs::write(to.join("config.json"), config.to_string()).expect("written");
    to
}
