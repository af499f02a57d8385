//! Fake-quantized activations against `golden/acts`: every scheme on rows that go wrong in every way, with what
//! compressed-tensors itself computes in f32, bit for bit; on its own and on the way into a linear.

use std::path::{Path, PathBuf};

use ctq_kernels::cpu::Cpu;
use ctq_kernels::{Backend, Compute, Pieces, Quantizer, Treatment};
use ctq_model::matrix::{Code, Formula};
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::plain::{self, Packed};

/// Schemes that `ctq-model` refuses when it reads a checkpoint: no kernel ever sees them.
const REFUSED: &[&str] = &["mxfp6-dynamic"];

/// One golden in the terms of the backend.
struct Case {
    name: String,
    quantizer: Quantizer,
    /// Elements of a row.
    width: usize,
    head_dim: usize,
    /// [rows, width].
    x: Vec<f32>,
    /// [rows, width].
    expected: Vec<f32>,
}

#[test]
fn fake_quantized_activations_are_bit_for_bit_those_of_compressed_tensors() {
    for case in cases() {
        let rows = case.x.len() / case.width;
        let found = plain::on_every_isa(|cpu| {
            let mut x = cpu.upload(case.width, &case.x).expect("room");
            cpu.fake_quantize(&mut x, &case.quantizer, case.head_dim, std::slice::from_ref(&(0..rows)))
                .expect("room");
            cpu.download(&x).expect("room")
        });
        assert_same(&case, &found);
    }
}

#[test]
fn scales_found_in_the_data_stay_inside_their_window() {
    for case in cases() {
        let rows = case.x.len() / case.width;
        let louder = case.x.iter().map(|value| value * 8.0);
        let both: Vec<f32> = louder.chain(case.x.iter().copied()).collect();
        let cpu = Cpu::detect();
        let mut x = cpu.upload(case.width, &both).expect("room");
        cpu.fake_quantize(&mut x, &case.quantizer, case.head_dim, &[0..rows, rows..2 * rows]).expect("room");
        assert_same(&case, &cpu.download(&x).expect("room")[case.x.len()..]);
    }
}

/// The identity as a weight shows what a linear is given. A sum that starts at +0 cannot keep the sign of a zero, so
/// this compares values.
#[test]
fn a_linear_multiplies_with_the_quantized_activations() {
    for case in cases().into_iter().filter(|case| case.head_dim == case.width) {
        let rows = case.x.len() / case.width;
        let identity = identity(case.width).tiled();
        let found = plain::on_every_isa(|cpu| {
            let x = cpu.upload(case.width, &case.x).expect("room");
            let treatment = Treatment::FakeQuantized(case.quantizer.clone());
            let x =
                cpu.prepare(&x, &treatment, Compute::F32, std::slice::from_ref(&(0..rows))).expect("room");
            let weight = cpu.matrix(&identity, 0..case.width, Pieces::Atoms).expect("room");
            cpu.download(&cpu.linear(&x, &weight, None, Compute::F32).expect("a product of floats"))
                .expect("room")
        });
        assert_eq!(found, case.expected, "{}", case.name);
    }
}

fn identity(k: usize) -> Packed {
    let value = |at: usize| f32::from(u8::from(at / k == at % k));
    Packed {
        n: k,
        k,
        code: Code::F32,
        formula: Formula::Dense,
        codes: (0..k * k).flat_map(|at| value(at).to_le_bytes()).collect(),
        scales: None,
        zeros: None,
        global_scale: None,
    }
}

fn assert_same(case: &Case, found: &[f32]) {
    for (at, (found, expected)) in found.iter().zip(&case.expected).enumerate() {
        let (row, column) = (at / case.width, at % case.width);
        assert_eq!(
            found.to_bits(),
            expected.to_bits(),
            "{} at row {row}, column {column}: {} became {found}, the library says {expected}",
            case.name,
            case.x[at]
        );
    }
    assert_eq!(found.len(), case.expected.len(), "{}", case.name);
}

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/acts");
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("directory entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    paths.sort();
    let stem = |path: &Path| path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
    let paths = paths.into_iter().filter(|path| !REFUSED.contains(&stem(path).as_str()));
    let cases: Vec<Case> = paths.map(|path| case(stem(&path), &path)).collect();
    assert!(cases.len() >= 20, "only {} goldens in {}", cases.len(), folder.display());
    cases
}

fn case(name: String, path: &Path) -> Case {
    let about: Value = serde_json::from_slice(&std::fs::read(path).expect("golden")).expect("JSON");
    let bytes = std::fs::read(path.with_extension("safetensors")).expect("golden");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let stored = |names: &[&str]| names.iter().find_map(|name| floats(&tensors, name)).unwrap_or_default();
    let activation = activation(&about["args"]);
    let zeros = tensors.tensor("input_zero_point").ok().map(|zeros| f32::from(zeros.data()[0].cast_signed()));
    let is_static = activation.scale == ActivationScale::Static;
    let quantizer = Quantizer {
        activation,
        scales: if is_static { stored(&["input_scale", "k_scale"]) } else { Vec::new() },
        zero: if is_static && !activation.symmetric { zeros.expect("a zero point") } else { 0.0 },
        global_scale: stored(&["input_global_scale"]).first().copied().unwrap_or(1.0),
    };
    let (x, width, head_dim) = rows(&tensors, "x");
    let (expected, _, _) = rows(&tensors, "expected");
    Case { name, quantizer, width, head_dim, x, expected }
}

/// A tensor as [tokens, width]: [1, tokens, width] as it is, [1, heads, tokens, dimension] with heads side by side.
fn rows(tensors: &SafeTensors<'_>, name: &str) -> (Vec<f32>, usize, usize) {
    let values = floats(tensors, name).expect("values");
    match *tensors.tensor(name).expect("values").shape() {
        [1, _, width] => (values, width, width),
        [1, heads, tokens, dimension] => {
            let at = |token: usize, head: usize| (head * tokens + token) * dimension;
            let places = (0..tokens).flat_map(|token| (0..heads).map(move |head| (token, head)));
            let values =
                places.flat_map(|(token, head)| &values[at(token, head)..][..dimension]).copied().collect();
            (values, heads * dimension, dimension)
        }
        ref other => panic!("shape {other:?}"),
    }
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Option<Vec<f32>> {
    let tensor = tensors.tensor(name).ok()?;
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name}");
    Some(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4"))).collect())
}

/// `QuantizationArgs` as JSON in our terms.
fn activation(args: &Value) -> Activation {
    let group = || args["group_size"].as_u64().expect("group size") as usize;
    let bits = args["num_bits"].as_u64().expect("bits") as u8;
    let code = match (args["type"].as_str(), bits) {
        (Some("int"), bits) => Code::Int { bits },
        (Some("float"), 4) => Code::E2m1,
        (Some("float"), 8) => Code::E4m3,
        other => panic!("{other:?}"),
    };
    let sharing = match args["strategy"].as_str() {
        Some("tensor") => ActivationSharing::Tensor,
        Some("token") => ActivationSharing::Token,
        Some("group" | "tensor_group") => ActivationSharing::Group { size: group() },
        Some("attn_head") => ActivationSharing::Head,
        other => panic!("{other:?}"),
    };
    let scale = match (&args["dynamic"], args["scale_dtype"].as_str()) {
        (Value::Bool(false), _) => ActivationScale::Static,
        (Value::Bool(true), Some("torch.uint8")) => ActivationScale::PowerOfTwo,
        (Value::Bool(true), None) => ActivationScale::Dynamic,
        (Value::String(_), Some("torch.float8_e4m3fn")) => ActivationScale::Local,
        other => panic!("{other:?}"),
    };
    Activation { code, symmetric: args["symmetric"] == Value::Bool(true), sharing, scale }
}
