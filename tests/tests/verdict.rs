//! The verdict of `verify`: a sound runtime passes on every way of quantizing activations, and one that quantizes
//! them otherwise than the checkpoint says does not.

use std::path::Path;

use ctq_container::LayerSource;
use ctq_kernels::Compute;
use ctq_kernels::cpu::Cpu;
use ctq_reference::Reference;
use ctq_runtime::{Acts, Engine};
use ctq_tests::assets::golden;
use ctq_tests::models::{on_the_fly, settings};
use ctq_verify::{ArithmeticReport, Mode, Plan, check_arithmetic, token_ids};

/// Checkpoints that quantize activations, one for each way; int8 per token is the one that is never sharp.
const QUANTIZED: [&str; 5] = [
    "bundled/NVFP4",
    "bundled/FP8",
    "families/llama-w4a8",
    "families/llama-int8-static-asym",
    "families/llama-mxfp4",
];

/// The runtime in one arithmetic held against the reference in another.
fn report(folder: &Path, runtime: Acts, mode: Mode, compute: Compute) -> ArithmeticReport {
    let model = on_the_fly(folder);
    let inventory = model.inventory();
    let reference = Reference::open(model.source(), inventory).expect("a sound checkpoint");
    let cpu = Cpu::detect();
    let engine = Engine::new(&cpu, &model, settings(runtime, compute));
    let plan = Plan { ids: token_ids(48, inventory.spec.vocab), layers: None };
    check_arithmetic(&engine, &reference, &inventory.spec, &plan, mode, || true).expect("a comparison")
}

#[test]
fn a_sound_runtime_passes() {
    for name in QUANTIZED {
        for (acts, mode) in [(Acts::Off, Mode::Off), (Acts::Library, Mode::Library)] {
            let report = report(&golden(name), acts, mode, Compute::F32);
            assert!(report.passed(), "{name} {mode:?}: {:?}", report.first_failure());
        }
    }
}

#[test]
fn activations_quantized_otherwise_fail_at_the_first_layer() {
    for name in QUANTIZED {
        let report = report(&golden(name), Acts::Off, Mode::Library, Compute::F32);
        let first = report.first_failure().unwrap_or_else(|| panic!("{name} passed without quantization"));
        assert_eq!(first.name, "layer 0", "{name}");
    }
}

#[test]
fn activations_quantized_where_they_should_not_be_fail_too() {
    for name in QUANTIZED {
        assert!(!report(&golden(name), Acts::Library, Mode::Off, Compute::F32).passed(), "{name}");
    }
}

#[test]
fn operands_rounded_to_bf16_are_out_of_the_strict_bounds() {
    let report = report(&golden("bundled/bf16"), Acts::Off, Mode::Off, Compute::Bf16);
    assert_eq!(report.first_failure().map(|step| step.name.as_str()), Some("layer 0"));
}
