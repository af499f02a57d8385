//! What a checkpoint's activation quantization becomes under `--acts`: which quantizer, with which stored scales.
//! Quantizes nothing itself.

use std::collections::BTreeMap;
use std::fmt;

use ctq_container::RawVector;
use ctq_kernels::{Quantizer, Treatment};
use ctq_model::DType;
use ctq_model::inventory::{KvScheme, Linear};
use ctq_model::scheme::{Activation, ActivationScale};
use serde::{Deserialize, Serialize};

/// Whether activations are quantized, and by whose arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Acts {
    /// Not at all: the weights alone.
    Off,
    /// As the scheme says, computed as compressed-tensors does in f32.
    Library,
    /// As the scheme says, computed as serving kernels do.
    Kernel,
}

impl fmt::Display for Acts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Acts::Off => "off",
            Acts::Library => "library",
            Acts::Kernel => "kernel",
        })
    }
}

/// Treatment of a linear's inputs.
pub(crate) fn input(linear: &Linear, acts: Acts, vectors: &BTreeMap<String, RawVector>) -> Treatment {
    let Some(activation) = linear.scheme.input else { return Treatment::Plain };
    let quantizer = || module_quantizer(activation, &linear.module, "input", vectors);
    match acts {
        Acts::Off => Treatment::Plain,
        Acts::Library => Treatment::FakeQuantized(quantizer()),
        Acts::Kernel => Treatment::Exact(quantizer()),
    }
}

/// Quantization of a linear's outputs; the same formula in both modes that quantize.
pub(crate) fn output(
    linear: &Linear,
    acts: Acts,
    vectors: &BTreeMap<String, RawVector>,
) -> Option<Quantizer> {
    let activation = linear.scheme.output?;
    match acts {
        Acts::Off => None,
        Acts::Library | Acts::Kernel => Some(module_quantizer(activation, &linear.module, "output", vectors)),
    }
}

/// Quantization of keys, values and queries after rotation.
pub(crate) struct KvQuantizers {
    pub(crate) k: Quantizer,
    pub(crate) v: Quantizer,
    pub(crate) q: Option<Quantizer>,
}

/// Quantizers of a layer's key-value cache, with their stored scales.
pub(crate) fn kv(scheme: &KvScheme, vectors: &BTreeMap<String, RawVector>) -> KvQuantizers {
    let quantizer = |scale: &Option<String>| Quantizer {
        activation: scheme.activation,
        scales: scale.as_ref().map(|name| floats(&vectors[name])).unwrap_or_default(),
        zero: 0.0,
        global_scale: 1.0,
    };
    KvQuantizers {
        k: quantizer(&scheme.k_scale),
        v: quantizer(&scheme.v_scale),
        q: scheme.queries.then(|| quantizer(&scheme.q_scale)),
    }
}

fn module_quantizer(
    activation: Activation,
    module: &str,
    side: &str,
    vectors: &BTreeMap<String, RawVector>,
) -> Quantizer {
    let stored = |leaf: &str| vectors.get(&format!("{module}.{side}_{leaf}")).map(floats).unwrap_or_default();
    let is_static = activation.scale == ActivationScale::Static;
    Quantizer {
        activation,
        scales: if is_static { stored("scale") } else { Vec::new() },
        zero: if is_static && !activation.symmetric {
            stored("zero_point").first().copied().unwrap_or(0.0)
        } else {
            0.0
        },
        global_scale: stored("global_scale").first().copied().unwrap_or(1.0),
    }
}

/// A stored vector as f32; exact for every dtype that a checked scheme lets through.
pub(crate) fn floats(vector: &RawVector) -> Vec<f32> {
    let elements = vector.bytes.chunks_exact(vector.dtype.bytes());
    match vector.dtype {
        DType::F32 => elements.map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect(),
        DType::BF16 => elements.map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::F16 => elements.map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::I8 => elements.map(|b| f32::from(b[0] as i8)).collect(),
        DType::Bool
        | DType::U8
        | DType::U16
        | DType::I16
        | DType::U32
        | DType::I32
        | DType::U64
        | DType::I64
        | DType::F8E4M3
        | DType::F8E5M2
        | DType::F8E8M0
        | DType::F64 => unreachable!("no norm, bias or activation scale has dtype {}", vector.dtype),
    }
}
