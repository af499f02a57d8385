//! The table of architectures: one row a family. A row says which `config.json` keys feed which part of a
//! [`Spec`](crate::Spec) and what is true of the family without being written in the file.
//!
//! A family is here only when a golden made by transformers passes for it. Defaults are those of the family's
//! configuration class in transformers (`models/<name>/configuration_<name>.py`).

/// One row of the table.
#[derive(Debug)]
pub struct Family {
    /// `model_type`.
    pub name: &'static str,
    /// Key-value heads when the file does not say; `None`: as many as query heads.
    pub default_kv_heads: Option<usize>,
    /// Head dimension when the file does not say; `None`: `hidden_size / num_attention_heads`.
    pub default_head_dim: Option<usize>,
    /// `rms_norm_eps` when the file does not say.
    pub default_norm_eps: f64,
    /// `rope_theta` when the file does not say.
    pub default_rope_theta: f64,
    /// Which projections of attention have a bias.
    pub attention_bias: AttentionBias,
    /// Whether `mlp_bias` is a key of this family.
    pub mlp_bias: MlpBias,
    /// Normalisation of query and key heads before rotation.
    pub qk_norm: QkNorm,
    /// Which layers look back through a sliding window.
    pub window: WindowRule,
    /// Kind of feed-forward part.
    pub ffn: FfnRule,
    /// Keys this row reads, besides those that every family has.
    pub keys: &'static [&'static str],
}

/// Which projections of attention have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionBias {
    /// None has.
    Never,
    /// `attention_bias` decides for q, k, v and o.
    Configured,
    /// q, k and v have one, o has none.
    QueryKeyValue,
}

/// Bias of the feed-forward projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpBias {
    /// None has.
    Never,
    /// `mlp_bias` decides.
    Configured,
}

/// Normalisation of query and key before rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    Never,
    /// RMS norm over each head, one weight vector for all heads.
    PerHead,
}

/// Which layers look back through a sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowRule {
    /// None.
    Never,
    /// All layers, when `sliding_window` is set.
    AllLayers {
        /// Window when the key is absent (not `null`).
        default: Option<usize>,
    },
    /// When `use_sliding_window`: the layers that `layer_types` names, else those from `max_window_layers` on.
    FromLayer,
    /// When `use_sliding_window`: all layers.
    AllWhenEnabled,
}

/// Kind of feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnRule {
    /// Gated, one per layer: `mlp.{gate,up,down}_proj`.
    Gated,
    /// Mixtral: `block_sparse_moe`, softmax router, top-k weights renormalised.
    Mixtral,
    /// Qwen: `mlp.experts`, softmax router, renormalised when `norm_topk_prob`; some layers may be dense.
    QwenMoe,
}

const QWEN_WINDOW: &[&str] = &["use_sliding_window", "sliding_window", "max_window_layers", "layer_types"];

/// All families.
pub const FAMILIES: &[Family] = &[
    Family {
        name: "llama",
        default_kv_heads: None,
        default_head_dim: None,
        default_norm_eps: 1e-6,
        default_rope_theta: 1e4,
        attention_bias: AttentionBias::Configured,
        mlp_bias: MlpBias::Configured,
        qk_norm: QkNorm::Never,
        window: WindowRule::Never,
        ffn: FfnRule::Gated,
        // `is_llama_config` is a note that SmolLM's files carry.
        keys: &["attention_bias", "mlp_bias", "is_llama_config"],
    },
    Family {
        name: "mistral",
        default_kv_heads: Some(8),
        default_head_dim: None,
        default_norm_eps: 1e-6,
        default_rope_theta: 1e4,
        attention_bias: AttentionBias::Never,
        mlp_bias: MlpBias::Never,
        qk_norm: QkNorm::Never,
        window: WindowRule::AllLayers { default: Some(4096) },
        ffn: FfnRule::Gated,
        keys: &["sliding_window"],
    },
    Family {
        name: "qwen2",
        default_kv_heads: Some(32),
        default_head_dim: None,
        default_norm_eps: 1e-6,
        default_rope_theta: 1e4,
        attention_bias: AttentionBias::QueryKeyValue,
        mlp_bias: MlpBias::Never,
        qk_norm: QkNorm::Never,
        window: WindowRule::FromLayer,
        ffn: FfnRule::Gated,
        keys: QWEN_WINDOW,
    },
    Family {
        name: "qwen3",
        default_kv_heads: Some(32),
        default_head_dim: Some(128),
        default_norm_eps: 1e-6,
        default_rope_theta: 1e4,
        attention_bias: AttentionBias::Configured,
        mlp_bias: MlpBias::Never,
        qk_norm: QkNorm::PerHead,
        window: WindowRule::FromLayer,
        ffn: FfnRule::Gated,
        keys: &["attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"],
    },
    Family {
        name: "mixtral",
        default_kv_heads: Some(8),
        default_head_dim: None,
        default_norm_eps: 1e-5,
        default_rope_theta: 1e6,
        attention_bias: AttentionBias::Never,
        mlp_bias: MlpBias::Never,
        qk_norm: QkNorm::Never,
        window: WindowRule::AllLayers { default: None },
        ffn: FfnRule::Mixtral,
        keys: &["sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok"],
    },
    Family {
        name: "qwen3_moe",
        default_kv_heads: Some(4),
        default_head_dim: None,
        default_norm_eps: 1e-6,
        default_rope_theta: 1e4,
        attention_bias: AttentionBias::Configured,
        mlp_bias: MlpBias::Never,
        qk_norm: QkNorm::PerHead,
        window: WindowRule::AllWhenEnabled,
        ffn: FfnRule::QwenMoe,
        keys: &[
            "attention_bias",
            "use_sliding_window",
            "sliding_window",
            "max_window_layers",
            "layer_types",
            "num_local_experts",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
            "decoder_sparse_step",
            "mlp_only_layers",
        ],
    },
];

/// The row of a `model_type`.
pub fn find(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name)
}
