//! A model as data: an embedding, a list of blocks, a head. Built from `config.json` by way of the family table,
//! with the module names that the checkpoint really uses.
//!
//! Knows shapes and names; does not know how any of it is quantized or computed.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::TensorSource;
use crate::config::ModelConfig;
use crate::families::{self, AttentionBias, Family, FfnRule, MlpBias, QkNorm, WindowRule};
use crate::json::Object;
use crate::rope::{self, Rope};
use crate::{Error, Result};

/// A text model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Row of [`families::FAMILIES`].
    pub family: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Added to the mean square in every norm.
    pub norm_eps: f64,
    /// Longest sequence the model was made for, where stated.
    pub max_position: Option<usize>,
    /// Rotary embedding of all layers.
    pub rope: Rope,
    /// Module of the embedding table, [vocab, hidden].
    pub embedding: String,
    /// The decoder blocks, first to last.
    pub blocks: Vec<BlockSpec>,
    /// Module of the norm after the last block.
    pub final_norm: String,
    /// Module of the head, [vocab, hidden]; the embedding's name when the head is tied to it.
    pub head: String,
}

/// A pre-norm decoder block: `x += attention(norm(x)); x += ffn(norm(x))`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockSpec {
    /// Module of the norm before attention.
    pub attention_norm: String,
    /// Causal self-attention.
    pub attention: AttentionSpec,
    /// Module of the norm before the feed-forward part.
    pub ffn_norm: String,
    /// Feed-forward part.
    pub ffn: FfnSpec,
}

/// Causal attention with grouped key-value heads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionSpec {
    /// Module of the whole, which key and value scales hang on.
    pub module: String,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads` is a multiple.
    pub kv_heads: usize,
    /// Dimension of one head.
    pub head_dim: usize,
    /// Position `p` sees positions `p-window+1..=p`; `None`: all before it.
    pub window: Option<usize>,
    /// Whether q, k and v have a bias.
    pub input_bias: bool,
    /// Whether o has a bias.
    pub output_bias: bool,
    /// Module of the query projection, [heads * head_dim, hidden].
    pub q: String,
    /// Module of the key projection, [kv_heads * head_dim, hidden].
    pub k: String,
    /// Module of the value projection, [kv_heads * head_dim, hidden].
    pub v: String,
    /// Module of the output projection, [hidden, heads * head_dim].
    pub o: String,
    /// Modules of the norms of query and key heads, `head_dim` weights each.
    pub qk_norm: Option<(String, String)>,
}

impl BlockSpec {
    /// Module of the feed-forward part: the parent of its projections, or of its router.
    pub fn ffn_module(&self) -> &str {
        let child = match &self.ffn {
            FfnSpec::Gated(gated) => &gated.down,
            FfnSpec::Moe { router, .. } => router,
        };
        child.rsplit_once('.').map_or(child, |(parent, _)| parent)
    }
}

/// Feed-forward part of a block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum FfnSpec {
    /// One gated projection.
    Gated(GatedSpec),
    /// A router and its experts.
    Moe {
        /// Module of the router, [experts, hidden].
        router: String,
        /// Experts added up per token.
        top_k: usize,
        /// Whether the chosen weights are divided by their sum.
        renormalize: bool,
        /// The experts in order.
        experts: Vec<GatedSpec>,
    },
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GatedSpec {
    /// Inner width.
    pub width: usize,
    /// Whether the three projections have a bias.
    pub bias: bool,
    /// Module of the gate projection, [width, hidden].
    pub gate: String,
    /// Module of the up projection, [width, hidden].
    pub up: String,
    /// Module of the down projection, [hidden, width].
    pub down: String,
}

/// Keys every family reads.
const COMMON_KEYS: &[&str] = &[
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
];

/// Prefixes of the decoder in checkpoints of text models and of the text part of larger ones.
const PREFIXES: &[&str] = &["model", "model.language_model", "language_model.model"];

impl Spec {
    /// Reads the model that `source` describes.
    ///
    /// `accepted_keys` are keys of `config.json` that the user vouches for: they are taken not to change numbers.
    ///
    /// # Errors
    /// Names the key of `config.json` that is missing, contradictory, unknown or not supported.
    pub fn read(source: &dyn TensorSource, accepted_keys: &[String]) -> Result<Spec> {
        let config = source.config();
        let family = find_family(config)?;
        let understood = [COMMON_KEYS, rope::KEYS, family.keys].concat();
        config.check_keys(family.name, &understood, accepted_keys)?;
        Reader { source, config, family }.spec()
    }

    /// True when the head is the embedding.
    pub fn tied(&self) -> bool {
        self.head == self.embedding
    }
}

fn norm_eps(object: Object<'_>) -> Result<Option<f64>> {
    match object.number("rms_norm_eps")? {
        Some(eps) if eps < 0.0 => {
            Err(object.wrong("rms_norm_eps", "a number that is not negative", &eps.into()))
        }
        eps => Ok(eps),
    }
}

fn find_family(config: &ModelConfig) -> Result<&'static Family> {
    let name = config.model_type()?;
    families::find(name).ok_or_else(|| {
        let known: Vec<&str> = families::FAMILIES.iter().map(|family| family.name).collect();
        Error::unsupported(
            config.path(),
            format!("architecture `{name}`"),
            format!("ctq runs {}; see ARCHITECTURE.md for adding a family", known.join(", ")),
        )
    })
}

struct Reader<'a> {
    source: &'a dyn TensorSource,
    config: &'a ModelConfig,
    family: &'static Family,
}

impl Reader<'_> {
    fn spec(&self) -> Result<Spec> {
        let object = self.config.object();
        let hidden = object.required("hidden_size")?;
        if let Some(activation) = object.string("hidden_act")?
            && !matches!(activation, "silu" | "swish")
        {
            return Err(Error::unsupported(
                self.config.path(),
                format!("`hidden_act` = `{activation}`"),
                "the supported families use silu",
            ));
        }
        let prefix = self.prefix()?;
        let embedding = format!("{prefix}.embed_tokens");
        let blocks = object.required("num_hidden_layers")?;
        let head = self.head(&embedding)?;
        Ok(Spec {
            family: self.family.name.to_owned(),
            hidden,
            vocab: object.required("vocab_size")?,
            norm_eps: norm_eps(object)?.unwrap_or(self.family.default_norm_eps),
            max_position: object.positive("max_position_embeddings")?,
            rope: Rope::read(self.config, self.family.default_rope_theta)?,
            blocks: (0..blocks).map(|index| self.block(prefix, index, blocks)).collect::<Result<_>>()?,
            final_norm: format!("{prefix}.norm"),
            embedding,
            head,
        })
    }

    fn has(&self, module: &str) -> bool {
        ["weight", "weight_packed"].iter().any(|leaf| self.source.info(&format!("{module}.{leaf}")).is_some())
    }

    fn prefix(&self) -> Result<&'static str> {
        let found = PREFIXES.iter().find(|prefix| self.has(&format!("{prefix}.embed_tokens")));
        found.copied().ok_or_else(|| {
            Error::missing(
                self.source.root(),
                "model.embed_tokens.weight",
                "every model has a token embedding",
            )
        })
    }

    fn head(&self, embedding: &str) -> Result<String> {
        for name in ["lm_head", "language_model.lm_head"] {
            if self.has(name) {
                return Ok(name.to_owned());
            }
        }
        if self.config.object().boolean("tie_word_embeddings")?.unwrap_or(false) {
            return Ok(embedding.to_owned());
        }
        Err(Error::missing(
            self.source.root(),
            "lm_head.weight",
            "`tie_word_embeddings` is not true, so the head is a matrix of its own",
        ))
    }

    fn block(&self, prefix: &str, index: usize, blocks: usize) -> Result<BlockSpec> {
        let layer = format!("{prefix}.layers.{index}");
        Ok(BlockSpec {
            attention_norm: format!("{layer}.input_layernorm"),
            attention: self.attention(&layer, index, blocks)?,
            ffn_norm: format!("{layer}.post_attention_layernorm"),
            ffn: self.ffn(&layer, index)?,
        })
    }

    fn attention(&self, layer: &str, index: usize, blocks: usize) -> Result<AttentionSpec> {
        let object = self.config.object();
        let heads = object.required("num_attention_heads")?;
        let hidden = object.required("hidden_size")?;
        let kv_heads =
            object.positive("num_key_value_heads")?.or(self.family.default_kv_heads).unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(Error::config(
                self.config.path(),
                "num_key_value_heads",
                format!("{kv_heads} does not divide the {heads} attention heads"),
                "restore the config.json of the original model",
            ));
        }
        let head_dim =
            object.positive("head_dim")?.or(self.family.default_head_dim).unwrap_or(hidden / heads.max(1));
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(Error::config(
                self.config.path(),
                "head_dim",
                format!("{head_dim} is not an even positive number, which rotation needs"),
                "restore the config.json of the original model",
            ));
        }
        let (input_bias, output_bias) = match self.family.attention_bias {
            AttentionBias::Never => (false, false),
            AttentionBias::QueryKeyValue => (true, false),
            AttentionBias::Configured => {
                let both = object.boolean("attention_bias")?.unwrap_or(false);
                (both, both)
            }
        };
        let module = format!("{layer}.self_attn");
        let qk_norm = match self.family.qk_norm {
            QkNorm::Never => None,
            QkNorm::PerHead => Some((format!("{module}.q_norm"), format!("{module}.k_norm"))),
        };
        Ok(AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            window: self.window(index, blocks)?,
            input_bias,
            output_bias,
            q: format!("{module}.q_proj"),
            k: format!("{module}.k_proj"),
            v: format!("{module}.v_proj"),
            o: format!("{module}.o_proj"),
            qk_norm,
            module,
        })
    }

    fn window(&self, index: usize, blocks: usize) -> Result<Option<usize>> {
        let object = self.config.object();
        let enabled = || -> Result<Option<usize>> {
            match object.map.get("sliding_window") {
                _ if !object.boolean("use_sliding_window")?.unwrap_or(false) => Ok(None),
                // The default of the Qwen configurations; a `null` means none.
                None => Ok(Some(4096)),
                Some(_) => object.positive("sliding_window"),
            }
        };
        match self.family.window {
            WindowRule::Never => Ok(None),
            WindowRule::AllLayers { default } => match object.map.get("sliding_window") {
                None => Ok(default),
                Some(_) => object.positive("sliding_window"),
            },
            WindowRule::AllWhenEnabled => enabled(),
            WindowRule::FromLayer => {
                let Some(window) = enabled()? else { return Ok(None) };
                let types = object.strings("layer_types")?;
                if types.is_empty() {
                    let first = object.usize("max_window_layers")?.unwrap_or(28);
                    return Ok((index >= first).then_some(window));
                }
                if types.len() != blocks {
                    return Err(object.wrong(
                        "layer_types",
                        &format!("one entry for each of the {blocks} layers"),
                        &Value::from(types.len()),
                    ));
                }
                match types[index].as_str() {
                    "full_attention" => Ok(None),
                    "sliding_attention" => Ok(Some(window)),
                    other => Err(Error::unsupported(
                        self.config.path(),
                        format!("`layer_types` holds `{other}`"),
                        "implemented are full_attention and sliding_attention",
                    )),
                }
            }
        }
    }

    fn ffn(&self, layer: &str, index: usize) -> Result<FfnSpec> {
        let object = self.config.object();
        let width = object.required("intermediate_size")?;
        let bias = match self.family.mlp_bias {
            MlpBias::Never => false,
            MlpBias::Configured => object.boolean("mlp_bias")?.unwrap_or(false),
        };
        let gated = |module: String, width: usize, names: [&str; 3]| GatedSpec {
            width,
            bias,
            gate: format!("{module}.{}", names[0]),
            up: format!("{module}.{}", names[1]),
            down: format!("{module}.{}", names[2]),
        };
        const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
        match self.family.ffn {
            FfnRule::Gated => Ok(FfnSpec::Gated(gated(format!("{layer}.mlp"), width, PROJECTIONS))),
            FfnRule::Mixtral => {
                let module = format!("{layer}.block_sparse_moe");
                // Files of llm-compressor before and after mid-2026 spell the experts differently.
                let old = self.has(&format!("{module}.experts.0.w1"));
                let names = if old { ["w1", "w3", "w2"] } else { PROJECTIONS };
                self.moe(&module, index, true, |expert| gated(expert, width, names))
            }
            FfnRule::QwenMoe => {
                let module = format!("{layer}.mlp");
                let step = object.positive("decoder_sparse_step")?.unwrap_or(1);
                let dense = object.positives("mlp_only_layers")?.contains(&index)
                    || !(index + 1).is_multiple_of(step);
                if dense {
                    return Ok(FfnSpec::Gated(gated(module, width, PROJECTIONS)));
                }
                let width = object.required("moe_intermediate_size")?;
                let renormalize = object.boolean("norm_topk_prob")?.unwrap_or(false);
                self.moe(&module, index, renormalize, |expert| gated(expert, width, PROJECTIONS))
            }
        }
    }

    fn moe(
        &self,
        module: &str,
        index: usize,
        renormalize: bool,
        expert: impl Fn(String) -> GatedSpec,
    ) -> Result<FfnSpec> {
        let object = self.config.object();
        let experts = match self.pruned_experts(index)? {
            Some(experts) => experts,
            None => match object.positive("num_local_experts")? {
                Some(experts) => experts,
                None => object.required("num_experts")?,
            },
        };
        let top_k = object.required("num_experts_per_tok")?;
        if top_k > experts {
            return Err(Error::config(
                self.config.path(),
                "num_experts_per_tok",
                format!("{top_k} is more than the {experts} experts of layer {index}"),
                "restore the config.json of the original model",
            ));
        }
        Ok(FfnSpec::Moe {
            router: format!("{module}.gate"),
            top_k,
            renormalize,
            experts: (0..experts).map(|e| expert(format!("{module}.experts.{e}"))).collect(),
        })
    }

    /// Experts that are left in a layer of a pruned model: `moe_sparsity_config.num_experts[layer]`.
    fn pruned_experts(&self, index: usize) -> Result<Option<usize>> {
        let Some((_, quantization)) = self.config.quantization()? else { return Ok(None) };
        let list = quantization.get("moe_sparsity_config").and_then(|c| c.get("num_experts"));
        Ok(list.and_then(|l| l.get(index)).and_then(Value::as_u64).map(|n| n as usize))
    }
}
