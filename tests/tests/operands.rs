//! What the runtime multiplies with, bit for bit: against what compressed-tensors itself decompresses, one module for
//! each storage format; and against the independent reference, every module of every checkpoint.

#[path = "../../reference/tests/single_module/mod.rs"]
mod single_module;

use std::num::NonZero;
use std::path::{Path, PathBuf};

use ctq_container::LayerSource;
use ctq_convert::{codec, tile};
use ctq_kernels::collective::team;
use ctq_kernels::cpu::Cpu;
use ctq_kernels::{Backend, Compute, Pieces};
use ctq_model::inventory::Part;
use ctq_model::{Checkpoint, Inventory};
use ctq_reference::Reference;
use ctq_runtime::{Acts, Engine, Error, Lockstep};
use ctq_tests::compare::same_bits;
use ctq_tests::safetensors_file::SafetensorsFile;
use ctq_tests::{assets, models};
use serde_json::Value;
use single_module::{MODULE, SingleModule};

/// Cases that ctq refuses when it reads the checkpoint, with a word of the refusal.
const REFUSED: &[(&str, &str)] = &[
    ("mxfp6", "mxfp6-pack-quantized"),
    ("mxfp6-fuzz", "mxfp6-pack-quantized"),
    ("nvfp4-fuzz-unit-divisor", "weight_global_scale"),
];

#[test]
fn operands_are_bit_for_bit_what_compressed_tensors_decompresses() {
    let folder = assets::golden("decode");
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("directory entry").path());
    let mut cases: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "json")).collect();
    cases.sort();
    assert!(cases.len() >= 60, "only {} goldens in {}", cases.len(), folder.display());
    cases.iter().for_each(|case| check_case(case));
}

/// A group without `weights` leaves the weight alone and still quantizes what flows through the module.
#[test]
fn a_group_may_quantize_activations_only() {
    let path = assets::golden("decode/dense-bf16.json");
    let file = SafetensorsFile::read(&path.with_extension("safetensors"));
    let shape = file.shape("expected");
    let inputs = serde_json::json!({ "num_bits": 8, "type": "float", "strategy": "token", "dynamic": true });
    let group = serde_json::json!({ "targets": ["Linear"], "weights": null, "input_activations": inputs });
    let stored = file.tensors();
    let source = SingleModule::new(&path, (shape[0], shape[1]), &group, &stored, |leaf| leaf != "expected");
    let inventory = Inventory::read(&source, &[]).expect("an inventory");
    let linear = inventory.linears().find(|linear| linear.module == MODULE).expect("the module");
    assert_eq!(linear.scheme.to_string(), "bf16, inputs fp8 token dynamic");
    assert!(inventory.quantizes_activations());
}

fn check_case(path: &Path) {
    let case = path.file_stem().and_then(|stem| stem.to_str()).expect("a file name");
    let about: Value = serde_json::from_slice(&std::fs::read(path).expect("golden")).expect("JSON");
    let file = SafetensorsFile::read(&path.with_extension("safetensors"));
    let (expected, shape) = (file.floats("expected").expect("expected"), file.shape("expected"));
    let (n, k) = (shape[0], shape[1]);
    let stored = file.tensors();
    let source = SingleModule::new(path, (n, k), &about["config_group"], &stored, |leaf| leaf != "expected");
    let inventory = match (Inventory::read(&source, &[]), REFUSED.iter().find(|(name, _)| *name == case)) {
        (Ok(inventory), None) => inventory,
        (Err(error), Some((_, why))) if error.to_string().contains(why) => return,
        (Ok(_), Some(_)) => panic!("{case} is read, and it is listed as refused"),
        (Err(error), _) => panic!("{case}: {error}"),
    };
    let linear = inventory.linears().find(|linear| linear.module == MODULE).expect("the module");
    let matrix = codec::encode(&source, linear).unwrap_or_else(|error| panic!("{case}: {error}"));
    let tiled = tile(&matrix);
    let found = rows(&Cpu::detect(), &tiled, n);
    let wrong =
        found.iter().zip(&expected).position(|(found, expected)| found.to_bits() != expected.to_bits());
    if let Some(at) = wrong {
        panic!("{case}: row {}, column {}: {} instead of {}", at / k, at % k, found[at], expected[at]);
    }
    assert_eq!(found.len(), expected.len(), "{case}");
    let ranks = team::in_process(vec![Cpu::detect(); 3]);
    for found in team::run(&ranks, NonZero::<usize>::MIN, |rank| Ok::<_, Error>(rows(rank, &tiled, n))) {
        assert!(same_bits(&found.expect("rows"), &expected), "{case}: three ranks give other bits");
    }
}

fn rows<B: Backend>(backend: &B, tiled: &ctq_container::TiledMatrix, n: usize) -> Vec<f32> {
    let ids: Vec<u32> = (0..n as u32).collect();
    let rows = || backend.download(&backend.embed(&backend.matrix(tiled, 0..n, Pieces::Atoms)?, &ids)?);
    rows().expect("the CPU has room")
}

#[test]
fn every_module_of_the_goldens_has_the_operands_of_the_reference() {
    let mut folders = assets::with_oracle(&assets::golden("families"));
    folders.extend(["bf16", "W4A16", "NVFP4", "FP8"].map(|name| assets::golden("bundled").join(name)));
    let modules = check_checkpoints(&folders);
    assert!(modules >= 300, "only {modules} modules");
}

#[test]
fn every_module_of_the_fixtures_has_the_operands_of_the_reference() {
    let Some(fixtures) = assets::shared("fixtures") else { return };
    let modules = check_checkpoints(&assets::with_oracle(&fixtures));
    assert!(modules >= 300, "only {modules} modules");
}

/// Compares every module of each checkpoint; returns how many there were.
fn check_checkpoints(folders: &[PathBuf]) -> usize {
    folders.iter().map(|folder| check_checkpoint(folder)).sum()
}

fn check_checkpoint(folder: &Path) -> usize {
    let out = tempfile::tempdir().expect("a temporary folder");
    let container = models::converted(folder, &out.path().join("container"));
    let tiled = models::on_the_fly(folder);
    let checkpoint = Checkpoint::open(folder).expect("a checkpoint");
    let reference = Reference::open(&checkpoint, tiled.inventory()).expect("a reference");
    let cpu = Cpu::detect();
    let settings = models::settings(Acts::Off, Compute::F32);
    let engines = [Engine::new(&cpu, &container, settings), Engine::new(&cpu, &tiled, settings)];
    let mut modules = 0;
    for (part, module) in modules_of(&tiled) {
        let expected = reference.weight(module).unwrap_or_else(|error| panic!("{module}: {error}"));
        for engine in &engines {
            let found = engine.operands(part, module).unwrap_or_else(|error| panic!("{module}: {error}"));
            assert!(same_bits(&found, &expected.values), "{}: {module}", folder.display());
        }
        modules += 1;
    }
    modules
}

fn modules_of(source: &dyn LayerSource) -> Vec<(Part, &str)> {
    let parts = source.inventory().parts();
    parts
        .flat_map(|(part, inventory)| {
            inventory.linears.iter().map(move |linear| (part, linear.module.as_str()))
        })
        .collect()
}
