//! Checkpoints to change and to break: a folder's config and tensors as plain values, and a Llama of any size made from
//! a seed. Knows bytes and JSON; what a tensor means is the tests' affair.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::session::{Session, repository};

/// One tensor: element type, shape, little-endian bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// A checkpoint in memory.
pub(crate) struct Checkpoint {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Stored>,
}

impl Checkpoint {
    pub(crate) fn read(folder: &Path) -> Checkpoint {
        let config = fs::read(folder.join("config.json")).expect("config.json");
        Checkpoint {
            config: serde_json::from_slice(&config).expect("JSON"),
            tensors: tensors(&folder.join("model.safetensors")),
        }
    }

    pub(crate) fn bundled(name: &str) -> Checkpoint {
        Checkpoint::read(&repository().join("golden/bundled").join(name))
    }

    /// A tensor that must be there.
    #[track_caller]
    pub(crate) fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Writes it as one shard into `name`, with the bundled tokenizer beside it.
    pub(crate) fn write(&self, session: &Session, name: &str) {
        let folder = session.path(name);
        self.write_beside(&folder);
        write_tensors(&folder.join("model.safetensors"), &self.tensors);
    }

    /// Writes it as two shards behind an index; the second holds the last layer and the head.
    pub(crate) fn write_sharded(&self, session: &Session, name: &str) {
        let folder = session.path(name);
        self.write_beside(&folder);
        let (mut shards, mut map) = ([BTreeMap::new(), BTreeMap::new()], BTreeMap::new());
        for (tensor, stored) in &self.tensors {
            let second = usize::from(tensor.starts_with("model.layers.1.") || tensor.starts_with("lm_head"));
            shards[second].insert(tensor.clone(), stored.clone());
            map.insert(tensor, shard_name(second));
        }
        for (index, shard) in shards.iter().enumerate() {
            write_tensors(&folder.join(shard_name(index)), shard);
        }
        let index = json!({ "metadata": {}, "weight_map": map }).to_string();
        fs::write(folder.join("model.safetensors.index.json"), index).expect("an index");
    }

    fn write_beside(&self, folder: &Path) {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(folder.join("config.json"), self.config.to_string()).expect("config.json");
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let from = repository().join("golden/bundled/bf16").join(file);
            fs::copy(from, folder.join(file)).expect("the bundled tokenizer");
        }
    }
}

fn shard_name(index: usize) -> String {
    format!("model-{:05}-of-00002.safetensors", index + 1)
}

/// All tensors of a safetensors file.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Stored> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let stored = |(name, view): (String, TensorView<'_>)| {
        (name, Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    file.tensors().into_iter().map(stored).collect()
}

pub(crate) fn write_tensors(path: &Path, tensors: &BTreeMap<String, Stored>) {
    let views = tensors.iter().map(|(name, stored)| {
        let view =
            TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes).expect("bytes that fit");
        (name, view)
    });
    safetensors::serialize_to_file(views, None, path).expect("a safetensors file");
}

/// A dense Llama with weights made from a seed: as long to work on as the test needs.
pub(crate) fn random_llama(layers: usize, hidden: usize) -> Checkpoint {
    let mut config = Checkpoint::bundled("bf16").config;
    let (vocabulary, width) = (480, 2 * hidden);
    config["num_hidden_layers"] = json!(layers);
    config["hidden_size"] = json!(hidden);
    config["intermediate_size"] = json!(width);
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, shape: &[usize], seed: usize| {
        let stored = if shape.len() == 1 { ones(shape[0]) } else { noise(shape, seed) };
        tensors.insert(name, stored);
    };
    add("model.embed_tokens.weight".to_owned(), &[vocabulary, hidden], 1);
    add("model.norm.weight".to_owned(), &[hidden], 0);
    add("lm_head.weight".to_owned(), &[vocabulary, hidden], 2);
    for layer in 0..layers {
        let modules: [(&str, &[usize]); 9] = [
            ("input_layernorm", &[hidden]),
            ("post_attention_layernorm", &[hidden]),
            ("self_attn.q_proj", &[128, hidden]),
            ("self_attn.k_proj", &[64, hidden]),
            ("self_attn.v_proj", &[64, hidden]),
            ("self_attn.o_proj", &[hidden, 128]),
            ("mlp.gate_proj", &[width, hidden]),
            ("mlp.up_proj", &[width, hidden]),
            ("mlp.down_proj", &[hidden, width]),
        ];
        for (index, (module, shape)) in modules.into_iter().enumerate() {
            add(format!("model.layers.{layer}.{module}.weight"), shape, 100 * layer + index + 3);
        }
    }
    Checkpoint { config, tensors }
}

/// bf16 numbers between -1/16 and 1/16.
fn noise(shape: &[usize], seed: usize) -> Stored {
    let mut state = seed as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let number = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let sign = (state >> 63) as u16;
        let exponent = 120 + (state >> 61 & 3) as u16;
        (sign << 15 | exponent << 7 | (state >> 40 & 127) as u16).to_le_bytes()
    };
    let count: usize = shape.iter().product();
    Stored { dtype: Dtype::BF16, shape: shape.to_vec(), bytes: (0..count).flat_map(number).collect() }
}

fn ones(count: usize) -> Stored {
    let one = 0x3f80_u16.to_le_bytes();
    Stored { dtype: Dtype::BF16, shape: vec![count], bytes: one.repeat(count) }
}
