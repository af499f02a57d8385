//! A golden of one module as a checkpoint: a model around it whose head is the module, so that its scheme is resolved
//! the way that of a real checkpoint is.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ctq_model::checkpoint::TensorInfo;
use ctq_model::config::ModelConfig;
use ctq_model::{DType, Tensor, TensorSource};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// The module's name in the model around it.
pub(crate) const MODULE: &str = "lm_head";

/// A one-layer model whose every tensor but the head's is bf16 zeros.
pub(crate) struct SingleModule {
    path: PathBuf,
    config: ModelConfig,
    tensors: BTreeMap<String, (TensorInfo, Vec<u8>)>,
}

impl SingleModule {
    /// The model around the [n, k] head whose tensors, by leaf, are those of `stored` that `keep` lets through.
    ///
    /// `group` is its scheme as `quantization_config` spells it, `Value::Null` where it is dense.
    pub(crate) fn new(
        path: &Path,
        (n, k): (usize, usize),
        group: &Value,
        stored: &SafeTensors<'_>,
        keep: impl Fn(&str) -> bool,
    ) -> SingleModule {
        let mut tensors = BTreeMap::new();
        for (name, shape) in around(n, k) {
            let bytes = vec![0; 2 * shape.iter().product::<usize>()];
            tensors.insert(name.to_owned(), (TensorInfo { dtype: DType::BF16, shape }, bytes));
        }
        for (leaf, view) in stored.iter().filter(|(leaf, _)| keep(leaf)) {
            let info = TensorInfo { dtype: dtype(view.dtype()), shape: view.shape().to_vec() };
            tensors.insert(format!("{MODULE}.{leaf}"), (info, view.data().to_vec()));
        }
        let config = ModelConfig::parse(path, config(n, k, group).to_string().into_bytes()).expect("config");
        SingleModule { path: path.to_owned(), config, tensors }
    }
}

/// Everything a llama of one layer and head dimension 2 has, except its head.
fn around(n: usize, k: usize) -> Vec<(&'static str, Vec<usize>)> {
    vec![
        ("model.embed_tokens.weight", vec![n, k]),
        ("model.norm.weight", vec![k]),
        ("model.layers.0.input_layernorm.weight", vec![k]),
        ("model.layers.0.post_attention_layernorm.weight", vec![k]),
        ("model.layers.0.self_attn.q_proj.weight", vec![2, k]),
        ("model.layers.0.self_attn.k_proj.weight", vec![2, k]),
        ("model.layers.0.self_attn.v_proj.weight", vec![2, k]),
        ("model.layers.0.self_attn.o_proj.weight", vec![k, 2]),
        ("model.layers.0.mlp.gate_proj.weight", vec![1, k]),
        ("model.layers.0.mlp.up_proj.weight", vec![1, k]),
        ("model.layers.0.mlp.down_proj.weight", vec![k, 1]),
    ]
}

fn config(n: usize, k: usize, group: &Value) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_size": k, "vocab_size": n, "intermediate_size": 1, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "tie_word_embeddings": false,
    });
    if !group.is_null() {
        let mut group = group.clone();
        group["targets"] = json!([MODULE]);
        let format = group["format"].clone();
        config["quantization_config"] = json!({
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": format,
            "config_groups": { "group_0": group }, "ignore": [],
        });
    }
    config
}

fn dtype(dtype: safetensors::Dtype) -> DType {
    let name = Value::from(format!("{dtype:?}"));
    serde_json::from_value(name).unwrap_or_else(|error| panic!("{dtype:?}: {error}"))
}

impl TensorSource for SingleModule {
    fn root(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info.clone())
    }

    fn file_of(&self, _: &str) -> &Path {
        &self.path
    }

    fn tensor(&self, name: &str) -> ctq_model::Result<Option<Tensor<'_>>> {
        Ok(self.tensors.get(name).map(|(info, bytes)| Tensor {
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes: Cow::Borrowed(bytes.as_slice()),
            file: &self.path,
        }))
    }
}
