//! Checkpoints to test with: tiny ones made here, goldens of the repository, and the fixtures of `CTQ_TEST_ASSETS`.
#![allow(dead_code, unreachable_pub, reason = "a module of several tests, each of which uses its own part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ctq_container::{Container, LayerSource, Overwrite, PartTiles};
use ctq_convert::{Options, TiledCheckpoint, convert};
use ctq_model::{Checkpoint, DType, Inventory, TensorSource};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

/// One tensor: dtype, shape, bytes.
#[derive(Clone)]
pub struct Stored {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Stored {
    pub fn new(dtype: DType, shape: &[usize], bytes: impl Into<Vec<u8>>) -> Stored {
        let bytes = bytes.into();
        assert_eq!(bytes.len(), shape.iter().product::<usize>() * dtype.bytes());
        Stored { dtype, shape: shape.to_vec(), bytes }
    }

    /// Deterministic bf16 numbers of moderate size.
    pub fn bf16(shape: &[usize]) -> Stored {
        let count: usize = shape.iter().product();
        let bytes: Vec<u8> = (0..count)
            .flat_map(|i| (0x3c00_u16 + (i as u16).wrapping_mul(37) % 0x300).to_le_bytes())
            .collect();
        Stored::new(DType::BF16, shape, bytes)
    }
}

/// The module of a tiny model that is quantized: a gate projection of any shape.
pub const GATE: &str = "model.layers.0.mlp.gate_proj";

/// A Llama of one layer whose gate projection is [n, k], quantized as `group` says and stored as `gate`.
pub struct Tiny {
    pub config: Value,
    pub tensors: BTreeMap<String, Stored>,
}

impl Tiny {
    pub fn new(n: usize, k: usize, group: &Value, gate: &[(&str, Stored)]) -> Tiny {
        let mut group = group.clone();
        group["targets"] = json!(["re:.*gate_proj"]);
        let config = json!({
            "model_type": "llama", "hidden_size": k, "intermediate_size": n, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 5,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false,
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": group["format"], "config_groups": { "group_0": group },
                "ignore": ["lm_head"], "quantization_status": "compressed",
            },
        });
        let mut tensors = BTreeMap::new();
        for (name, shape) in [
            ("model.embed_tokens", vec![5, k]),
            ("model.layers.0.input_layernorm", vec![k]),
            ("model.layers.0.post_attention_layernorm", vec![k]),
            ("model.layers.0.self_attn.q_proj", vec![2, k]),
            ("model.layers.0.self_attn.k_proj", vec![2, k]),
            ("model.layers.0.self_attn.v_proj", vec![2, k]),
            ("model.layers.0.self_attn.o_proj", vec![k, 2]),
            ("model.layers.0.mlp.up_proj", vec![n, k]),
            ("model.layers.0.mlp.down_proj", vec![k, n]),
            ("model.norm", vec![k]),
            ("lm_head", vec![5, k]),
        ] {
            tensors.insert(format!("{name}.weight"), Stored::bf16(&shape));
        }
        tensors.extend(gate.iter().map(|(leaf, stored)| (format!("{GATE}.{leaf}"), stored.clone())));
        Tiny { config, tensors }
    }

    /// Int4 in groups of 32: what most of the tests here start from.
    pub fn int4(n: usize, k: usize) -> Tiny {
        let words = k.div_ceil(8);
        let codes: Vec<u8> = (0..n * words * 4).map(|i| (i * 73 + 5) as u8).collect();
        let shape: Vec<u8> = [n as i64, k as i64].iter().flat_map(|side| side.to_le_bytes()).collect();
        let gate = [
            ("weight_packed", Stored::new(DType::I32, &[n, words], codes)),
            ("weight_scale", Stored::bf16(&[n, k / 32])),
            ("weight_shape", Stored::new(DType::I64, &[2], shape)),
        ];
        Tiny::new(n, k, &int_group(4, true), &gate)
    }

    pub fn gate(&mut self, leaf: &str) -> &mut Stored {
        self.tensors.get_mut(&format!("{GATE}.{leaf}")).unwrap()
    }

    pub fn write(&self) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        self.write_to(directory.path());
        directory
    }

    pub fn write_to(&self, root: &Path) {
        std::fs::write(root.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(root.join("tokenizer.json"), "{}").unwrap();
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, stored) in &self.tensors {
            let start = data.len();
            data.extend_from_slice(&stored.bytes);
            let info = json!({ "dtype": stored.dtype.name(), "shape": stored.shape, "data_offsets": [start, data.len()] });
            header.insert(name.clone(), info);
        }
        let header = Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(&data);
        std::fs::write(root.join("model.safetensors"), file).unwrap();
    }
}

/// A config group of integers in groups of 32.
pub fn int_group(bits: u8, symmetric: bool) -> Value {
    json!({
        "targets": [], "format": "pack-quantized", "input_activations": null, "output_activations": null,
        "weights": {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32,
            "dynamic": false, "actorder": null,
        },
    })
}

/// A golden of `golden/decode`: its config group, shape and tensors under their local names.
pub struct Golden {
    pub name: String,
    pub group: Value,
    pub shape: (usize, usize),
    pub tensors: Vec<(String, Stored)>,
}

pub fn goldens() -> Vec<Golden> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/decode");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    files.iter().map(|path| golden(path)).collect()
}

fn golden(path: &Path) -> Golden {
    let about: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let bytes = std::fs::read(path.with_extension("safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = Vec::new();
    for name in about["tensors"].as_object().unwrap().keys() {
        let view = file.tensor(name).unwrap();
        let dtype: DType = serde_json::from_value(json!(view.dtype().to_string())).unwrap();
        tensors.push((name.clone(), Stored::new(dtype, view.shape(), view.data())));
    }
    let side = |index: usize| about["shape"][index].as_u64().unwrap() as usize;
    Golden {
        name: about["case"].as_str().unwrap().to_owned(),
        group: about["config_group"].clone(),
        shape: (side(0), side(1)),
        tensors,
    }
}

/// Folders below `CTQ_TEST_ASSETS/<kind>`; empty, with a word on stderr, where the variable is not set.
pub fn assets(kind: &str) -> Vec<PathBuf> {
    let Some(root) = std::env::var_os("CTQ_TEST_ASSETS") else {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("skipped: CTQ_TEST_ASSETS does not name the folder that holds `{kind}`");
        }
        return Vec::new();
    };
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(Path::new(&root).join(kind)).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.join("config.json").is_file());
    folders.sort();
    folders
}

pub fn open(root: &Path) -> (Checkpoint, Inventory) {
    let checkpoint = Checkpoint::open(root).unwrap();
    let inventory = Inventory::read(&checkpoint, &[]).unwrap();
    (checkpoint, inventory)
}

pub fn options(threads: usize) -> Options<'static> {
    Options { threads, overwrite: Overwrite::Refuse, name: None, interrupt: None }
}

/// Converts without looking at the progress.
pub fn convert_to(root: &Path, out: &Path, options: &Options<'_>) -> ctq_convert::Result<Container> {
    let checkpoint = Checkpoint::open(root)?;
    let inventory = Inventory::read(&checkpoint, &[])?;
    convert(&checkpoint, &inventory, out, options, &|_| {})
}

/// Fails unless both sources hand out the same bits.
pub fn assert_same_parts(a: &dyn LayerSource, b: &dyn LayerSource) {
    assert_eq!(a.inventory(), b.inventory());
    for (part, _) in a.inventory().parts() {
        assert_same_tiles(&a.part(part).unwrap(), &b.part(part).unwrap());
    }
}

fn assert_same_tiles(a: &PartTiles, b: &PartTiles) {
    assert!(a.matrices.keys().eq(b.matrices.keys()));
    for (module, a) in &a.matrices {
        let b = &b.matrices[module];
        assert_eq!(
            (a.n, a.k, a.code, a.formula, a.global_scale),
            (b.n, b.k, b.code, b.formula, b.global_scale)
        );
        assert_eq!(*a.codes, *b.codes, "codes of {module}");
        assert_eq!(a.zeros.as_deref(), b.zeros.as_deref(), "zeros of {module}");
        assert_eq!(a.permutation.as_deref(), b.permutation.as_deref(), "permutation of {module}");
        let scales = |m: &ctq_container::TiledMatrix| {
            m.scales.as_ref().map(|s| (s.dtype, s.sharing, s.bytes.to_vec()))
        };
        assert_eq!(scales(a), scales(b), "scales of {module}");
    }
    assert!(a.vectors.keys().eq(b.vectors.keys()));
    for (name, a) in &a.vectors {
        assert_eq!((a.dtype, &*a.bytes), (b.vectors[name].dtype, &*b.vectors[name].bytes), "{name}");
    }
}

/// Fails unless `restored` has exactly the tensors of `original` but for those `left_out`, byte for byte.
pub fn assert_same_tensors(original: &dyn TensorSource, restored: &dyn TensorSource, left_out: &[String]) {
    let names: Vec<&str> =
        original.names().into_iter().filter(|name| !left_out.iter().any(|left| left == name)).collect();
    assert_eq!(restored.names(), names);
    for name in names {
        assert_eq!(restored.info(name), original.info(name), "{name}");
        let (a, b) = (original.tensor(name).unwrap().unwrap(), restored.tensor(name).unwrap().unwrap());
        assert!(a.bytes == b.bytes, "bytes of {name}");
    }
}

/// A container that has passed [`assert_lossless`], and the folder it is in.
pub struct Proven {
    container: Arc<Container>,
    _folder: TempDir,
}

impl std::ops::Deref for Proven {
    type Target = Container;

    fn deref(&self) -> &Container {
        &self.container
    }
}

/// Everything that must hold of any checkpoint: container and on-the-fly parts are equal, and both ways back are exact.
pub fn assert_lossless(root: &Path, threads: usize) -> Proven {
    let (checkpoint, inventory) = open(root);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let container = convert(&checkpoint, &inventory, &out, &options(threads), &|_| {}).unwrap();
    container.verify_hashes().unwrap();
    assert_same_parts(&container, &TiledCheckpoint::open(root, &[]).unwrap());

    let report = ctq_convert::check_round_trip(&container, Some(&checkpoint)).unwrap();
    assert_eq!(report.mismatches, []);
    assert_eq!(report.left_out, inventory.left_out);
    assert_eq!(report.tensors + report.left_out.len(), checkpoint.names().len());

    let restored_to = folder.path().join("restored");
    let restored = ctq_convert::restore(&container, &restored_to).unwrap();
    assert_eq!(restored.left_out, inventory.left_out);
    let again = Checkpoint::open(&restored_to).unwrap();
    assert_same_tensors(&checkpoint, &again, &inventory.left_out);
    assert_eq!(again.config().bytes(), checkpoint.config().bytes());

    let container = Arc::new(container);
    let source = ctq_convert::RestoredSource::new(Arc::clone(&container)).unwrap();
    assert_same_tensors(&checkpoint, &source, &inventory.left_out);
    let mut expected = inventory;
    expected.left_out.clear();
    assert_eq!(Inventory::read(&source, &[]).unwrap(), expected);
    Proven { container, _folder: folder }
}
