//! `config.json` as read: which keys it has, which of them ctq understands, and which could change numbers unseen.
//!
//! Knows JSON keys; the meaning of each for an architecture is in [`crate::families`].

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::json::Object;
use crate::{Error, Result};

/// A parsed `config.json` with the bytes it was parsed from.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    path: PathBuf,
    bytes: Vec<u8>,
    map: Map<String, Value>,
}

/// Keys that never change a perplexity: training, generation, bookkeeping. Those that a family reads are in its row.
const HARMLESS: &[&str] = &[
    "architectures",
    "auto_map",
    "attention_dropout",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "compression_config",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "max_position_embeddings",
    "min_length",
    "model_type",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "quantization_config",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// Beginnings of keys that only tools write about themselves.
const HARMLESS_PREFIXES: &[&str] = &["_", "unsloth_", "transformers.js"];

impl ModelConfig {
    /// Reads `config.json` in a checkpoint directory.
    ///
    /// # Errors
    /// Where the file is missing or not a JSON object.
    pub fn open(root: &Path) -> Result<ModelConfig> {
        let path = root.join("config.json");
        if !path.is_file() {
            return Err(Error::NotACheckpoint {
                path: root.to_owned(),
                what: "it has no config.json".to_owned(),
                next: "give the folder of a Hugging Face checkpoint, or copy config.json from the original model"
                    .to_owned(),
            });
        }
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e, "check the permissions"))?;
        ModelConfig::parse(&path, bytes)
    }

    /// Parses the bytes of a `config.json`; `path` is used in messages.
    ///
    /// # Errors
    /// Where the bytes are not a JSON object.
    pub fn parse(path: &Path, bytes: Vec<u8>) -> Result<ModelConfig> {
        let broken = |what: String| Error::Shard {
            path: path.to_owned(),
            what,
            next: "download config.json again".to_owned(),
        };
        let value: Value =
            serde_json::from_slice(&bytes).map_err(|e| broken(format!("not valid JSON ({e})")))?;
        match value {
            Value::Object(map) => Ok(ModelConfig { path: path.to_owned(), bytes, map }),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                Err(broken("not a JSON object".to_owned()))
            }
        }
    }

    /// The file it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// `model_type`, the name transformers knows the architecture by.
    ///
    /// # Errors
    /// Where it is missing or not a string.
    pub fn model_type(&self) -> Result<&str> {
        self.object().string("model_type")?.ok_or_else(|| self.object().absent("model_type"))
    }

    /// Id of the beginning-of-sequence token, where the file has a single one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.map.get("bos_token_id")?.as_u64().and_then(|id| u32::try_from(id).ok())
    }

    /// The quantization section: `quantization_config`, or the older `compression_config`.
    pub(crate) fn quantization(&self) -> Result<Option<(&'static str, &Map<String, Value>)>> {
        for key in ["quantization_config", "compression_config"] {
            if let Some(map) = self.object().object(key)? {
                return Ok(Some((key, map)));
            }
        }
        Ok(None)
    }

    pub(crate) fn object(&self) -> Object<'_> {
        Object { file: &self.path, prefix: "", map: &self.map }
    }

    /// Refuses keys that nobody here has read and that could change numbers.
    ///
    /// `understood` are the keys of the family's row, `accepted` those the user vouches for.
    pub(crate) fn check_keys(&self, family: &str, understood: &[&str], accepted: &[String]) -> Result<()> {
        for (key, value) in &self.map {
            let known = HARMLESS.contains(&key.as_str())
                || understood.contains(&key.as_str())
                || HARMLESS_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
                || accepted.contains(key);
            let idle = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
            };
            if !known && !idle {
                let shown: String = value.to_string().chars().take(60).collect();
                return Err(Error::config(
                    &self.path,
                    key,
                    format!(
                        "is set to {shown}, and ctq does not know what it means for a `{family}` model; it could change the numbers"
                    ),
                    format!("if it cannot, run again with --accept-config-key {key}"),
                ));
            }
        }
        Ok(())
    }
}
