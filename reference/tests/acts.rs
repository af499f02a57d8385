//! Fake-quantized activations against `golden/acts`: every scheme on rows that go wrong in every way, with what
//! compressed-tensors itself computes in f32, bit for bit.
#![expect(clippy::print_stderr, reason = "a skipped test says why")]

use std::path::Path;

use ctq_model::matrix::Code;
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};
use ctq_reference::quantize::{Quantizer, ScaleSource, TokenShape};
use ndarray::{Array2, Array4};
use safetensors::SafeTensors;
use serde_json::Value;

/// Schemes that ctq refuses when it reads a checkpoint.
const REFUSED: &[&str] = &["mxfp6-dynamic"];

#[test]
fn activations_are_bit_for_bit_those_of_compressed_tensors() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/acts");
    if !folder.is_dir() {
        eprintln!("skipped: there is no {}; golden/make_acts.py makes it", folder.display());
        return;
    }
    let mut cases = 0;
    for entry in std::fs::read_dir(&folder).expect("goldens") {
        let path = entry.expect("directory entry").path();
        let case = path.file_stem().and_then(|stem| stem.to_str()).expect("a file name").to_owned();
        if path.extension().is_some_and(|extension| extension == "json") && !REFUSED.contains(&case.as_str())
        {
            check(&case, &path);
            cases += 1;
        }
    }
    assert!(cases >= 20, "only {cases} goldens in {}", folder.display());
}

fn check(case: &str, path: &Path) {
    let about: Value = serde_json::from_slice(&std::fs::read(path).expect("golden")).expect("JSON");
    let bytes = std::fs::read(path.with_extension("safetensors")).expect("golden");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let (mut x, shape) = tokens(&tensors, "x");
    let (expected, _) = tokens(&tensors, "expected");
    let activation = activation(&about["args"]);
    let source = match activation.scale {
        ActivationScale::Static => ScaleSource::Static {
            scales: ["input_scale", "k_scale"]
                .iter()
                .find_map(|name| floats(&tensors, name))
                .expect("a scale"),
            zeros: tensors
                .tensor("input_zero_point")
                .ok()
                .map(|zeros| zeros.data().iter().map(|zero| f32::from(*zero as i8)).collect()),
        },
        ActivationScale::Dynamic => ScaleSource::Dynamic,
        ActivationScale::Local => {
            ScaleSource::Local { global: floats(&tensors, "input_global_scale").expect("global scale")[0] }
        }
        ActivationScale::PowerOfTwo => ScaleSource::PowerOfTwo,
    };
    Quantizer::new(case, &activation, source, shape).expect("quantizer").apply(&mut x);
    for ((at, found), expected) in x.indexed_iter().zip(&expected) {
        assert_eq!(found.to_bits(), expected.to_bits(), "{case} at {at:?}: {found} instead of {expected}");
    }
}

/// A tensor as [tokens, width]: [1, tokens, width] as it is, [1, heads, tokens, dimension] with heads side by side.
fn tokens(tensors: &SafeTensors<'_>, name: &str) -> (Array2<f32>, TokenShape) {
    let values = floats(tensors, name).expect("values");
    match *tensors.tensor(name).expect("values").shape() {
        [1, tokens, width] => {
            let x = Array2::from_shape_vec((tokens, width), values).expect("shape");
            (x, TokenShape { width, heads: 1 })
        }
        [1, heads, tokens, dimension] => {
            let width = heads * dimension;
            let x = Array4::from_shape_vec((1, heads, tokens, dimension), values).expect("shape");
            let x = x.permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
            let x = x.into_shape_with_order((tokens, width)).expect("shape");
            (x, TokenShape { width, heads })
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
