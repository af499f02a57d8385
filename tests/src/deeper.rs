//! A checkpoint with more layers than it came with: its own, over and over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::assets;
use crate::safetensors_file::SafetensorsFile;

/// A copy of the checkpoint in `from`, of one file of weights, under `parent` with `layers` layers.
///
/// # Panics
/// If it cannot be read or written.
pub fn deeper(from: &Path, parent: &Path, layers: usize) -> PathBuf {
    let to = parent.join(format!("{}-{layers}-layers", assets::name(from)));
    std::fs::create_dir(&to).expect("a new folder");
    let config = std::fs::read(from.join("config.json")).expect("config.json");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    let own = config["num_hidden_layers"].as_u64().expect("layers") as usize;
    config["num_hidden_layers"] = layers.into();
    if let Some(types) = config.get_mut("layer_types").and_then(Value::as_array_mut) {
        *types = (0..layers).map(|layer| types[layer % own].clone()).collect();
    }
    std::fs::write(to.join("config.json"), config.to_string()).expect("written");
    let file = SafetensorsFile::read(&from.join("model.safetensors"));
    let tensors = file.tensors();
    let mut all: BTreeMap<String, TensorView<'_>> = BTreeMap::new();
    for (name, tensor) in tensors.tensors() {
        match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
            Some((layer, rest)) => {
                let layer: usize = layer.parse().expect("the number of a layer");
                for copy in (layer..layers).step_by(own) {
                    all.insert(format!("model.layers.{copy}.{rest}"), tensor.clone());
                }
            }
            None => {
                all.insert(name, tensor);
            }
        }
    }
    safetensors::serialize_to_file(all, None, &to.join("model.safetensors")).expect("written");
    to
}
