//! The models whose shapes are measured, and the schemes, by the names of compressed-tensors. Numbers alone: nothing is
//! made or run here.

use ctq_kernels::AttentionShape;
use ctq_kernels::bench::Weights;
use ctq_model::scheme::Activation;
use serde_json::{Value, json};

use crate::bench::options::{BenchActs, BenchCompute, BenchScheme, ShapeChoice};

/// Dimensions of a model of the Llama family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Model {
    pub(super) name: &'static str,
    pub(super) layers: usize,
    pub(super) hidden: usize,
    /// Inner width of the feed-forward part.
    pub(super) inner: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocabulary: usize,
    /// Whether the head is the embedding.
    pub(super) tied: bool,
    pub(super) rope_theta: f64,
}

const LLAMA_1B: Model = Model {
    name: "llama-1b",
    layers: 16,
    hidden: 2048,
    inner: 8192,
    heads: 32,
    kv_heads: 8,
    head_dim: 64,
    vocabulary: 128_256,
    tied: true,
    rope_theta: 5e5,
};

const LLAMA_8B: Model = Model {
    name: "llama-8b",
    layers: 32,
    hidden: 4096,
    inner: 14_336,
    head_dim: 128,
    tied: false,
    ..LLAMA_1B
};

const LLAMA_70B: Model =
    Model { name: "llama-70b", layers: 80, hidden: 8192, inner: 28_672, heads: 64, ..LLAMA_8B };

const MISTRAL_123B: Model = Model {
    name: "mistral-123b",
    layers: 88,
    hidden: 12_288,
    heads: 96,
    vocabulary: 32_768,
    rope_theta: 1e6,
    ..LLAMA_70B
};

const TINY: Model = Model {
    name: "tiny",
    layers: 3,
    hidden: 128,
    inner: 256,
    heads: 4,
    kv_heads: 2,
    head_dim: 32,
    vocabulary: 320,
    tied: true,
    rope_theta: 1e4,
};

impl Model {
    pub(super) const fn of(choice: ShapeChoice) -> Model {
        match choice {
            ShapeChoice::Llama1b => LLAMA_1B,
            ShapeChoice::Llama8b => LLAMA_8B,
            ShapeChoice::Llama70b => LLAMA_70B,
            ShapeChoice::Mistral123b => MISTRAL_123B,
            ShapeChoice::Tiny => TINY,
        }
    }

    /// Linears of a layer with their (n, k); those that have the same inputs are one.
    pub(super) const fn linears(&self) -> [(&'static str, (usize, usize)); 4] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            ("q+k+v", (q + 2 * kv, self.hidden)),
            ("o", (self.hidden, q)),
            ("gate+up", (2 * self.inner, self.hidden)),
            ("down", (self.hidden, self.inner)),
        ]
    }

    pub(super) const fn attention(&self) -> AttentionShape {
        AttentionShape { heads: self.heads, kv_heads: self.kv_heads, head_dim: self.head_dim, window: None }
    }

    /// The `config.json` of this model with `layers` layers, their linears quantized by a preset of compressed-tensors;
    /// `None`: dense.
    pub(super) fn config(&self, layers: usize, preset: Option<&str>) -> Value {
        let mut config = json!({
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
        });
        if let Some(preset) = preset {
            config["quantization_config"] = json!({
                "quant_method": "compressed-tensors",
                "config_groups": { preset: ["Linear"] },
                "ignore": ["lm_head"],
            });
        }
        config
    }
}

impl BenchScheme {
    /// All of them.
    pub(super) const ALL: [BenchScheme; 7] = [
        BenchScheme::Bf16,
        BenchScheme::W4a16,
        BenchScheme::Nvfp4,
        BenchScheme::Mxfp4a16,
        BenchScheme::Fp8,
        BenchScheme::W8a8,
        BenchScheme::W4a8,
    ];

    /// As it is typed.
    pub(super) const fn name(self) -> &'static str {
        match self {
            BenchScheme::Bf16 => "bf16",
            BenchScheme::W4a16 => "w4a16",
            BenchScheme::W4a8 => "w4a8",
            BenchScheme::Nvfp4 => "nvfp4",
            BenchScheme::Mxfp4a16 => "mxfp4a16",
            BenchScheme::Fp8 => "fp8",
            BenchScheme::W8a8 => "w8a8",
        }
    }

    /// The preset of compressed-tensors; `None`: dense.
    pub(super) const fn preset(self) -> Option<&'static str> {
        match self {
            BenchScheme::Bf16 => None,
            BenchScheme::W4a16 => Some("W4A16"),
            BenchScheme::W4a8 => Some("W4A8"),
            BenchScheme::Nvfp4 => Some("NVFP4"),
            BenchScheme::Mxfp4a16 => Some("MXFP4A16"),
            BenchScheme::Fp8 => Some("FP8_DYNAMIC"),
            BenchScheme::W8a8 => Some("W8A8"),
        }
    }

    pub(super) const fn weights(self) -> Weights {
        match self {
            BenchScheme::Bf16 => Weights::Bf16,
            BenchScheme::W4a16 | BenchScheme::W4a8 => Weights::Int4,
            BenchScheme::Nvfp4 => Weights::Nvfp4,
            BenchScheme::Mxfp4a16 => Weights::Mxfp4,
            BenchScheme::Fp8 => Weights::Fp8,
            BenchScheme::W8a8 => Weights::Int8,
        }
    }

    /// Quantization of its inputs, where activations are quantized.
    pub(super) fn inputs(self) -> Option<Activation> {
        match self {
            BenchScheme::W4a16 => None,
            BenchScheme::Bf16
            | BenchScheme::W4a8
            | BenchScheme::Nvfp4
            | BenchScheme::Mxfp4a16
            | BenchScheme::Fp8
            | BenchScheme::W8a8 => self.weights().activation(),
        }
    }

    /// Whether a measurement of it with `acts` says something of its own.
    pub(super) fn has(self, acts: BenchActs) -> bool {
        match acts {
            BenchActs::Off => true,
            BenchActs::Library | BenchActs::Kernel => self.inputs().is_some(),
        }
    }
}

impl BenchActs {
    /// As the engine knows it.
    pub(super) const fn acts(self) -> ctq_runtime::Acts {
        match self {
            BenchActs::Off => ctq_runtime::Acts::Off,
            BenchActs::Library => ctq_runtime::Acts::Library,
            BenchActs::Kernel => ctq_runtime::Acts::Kernel,
        }
    }
}

impl BenchCompute {
    /// As kernels know it.
    pub(super) const fn compute(self) -> ctq_kernels::Compute {
        match self {
            BenchCompute::Bf16 => ctq_kernels::Compute::Bf16,
            BenchCompute::F32 => ctq_kernels::Compute::F32,
        }
    }
}
