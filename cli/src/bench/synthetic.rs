//! A model made of random codes, part by part as it is asked for: the tensors that a checkpoint of its shape and scheme
//! would have, by name, and the tiles of each part. Layers are made anew each time and kept by nobody, unless host memory
//! is where they are to be; embedding and head are made once and lie in a mapped file, as those of a container do.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use ctq_container::{LayerSource, MatrixRecord, PartTiles, RawVector, SourceError, TiledMatrix};
use ctq_kernels::bench::{Noise, random_tiles, tiles_of};
use ctq_model::checkpoint::TensorInfo;
use ctq_model::config::ModelConfig;
use ctq_model::inventory::{Linear, Part};
use ctq_model::{DType, Inventory, Tensor, TensorSource};

use super::mapped::mapped;
use super::shapes::Model;
use crate::bench::options::BenchScheme;

/// A model that is made while it runs.
pub(super) struct Synthetic {
    inventory: Inventory,
    /// Matrices of the embedding and the head.
    ends: BTreeMap<String, TiledMatrix>,
    /// Layers that were made, where they are kept.
    layers: Option<Mutex<BTreeMap<Part, PartTiles>>>,
    /// What making layers has taken.
    making: Mutex<Duration>,
}

impl Synthetic {
    /// The first `layers` layers of a model, its embedding and its head.
    ///
    /// # Errors
    /// Where embedding and head cannot be kept.
    pub(super) fn new(model: &Model, scheme: BenchScheme, layers: usize) -> anyhow::Result<Synthetic> {
        let inventory = Inventory::read(&Names::new(model, scheme, layers)?, &[])?;
        let mut ends = BTreeMap::new();
        for part in [Part::Embedding, Part::Head] {
            for linear in &inventory.part(part).linears {
                let mut noise = Noise::new(linear, seed_of(&linear.module));
                let codes = mapped(MatrixRecord::of(linear).codes, |run| noise.fill(run))?;
                ends.insert(linear.module.clone(), tiles_of(linear, codes));
            }
        }
        Ok(Synthetic { inventory, ends, layers: None, making: Mutex::new(Duration::ZERO) })
    }

    /// The same, whose layers are made once and stay in host memory.
    pub(super) fn keeping_layers(self) -> Synthetic {
        Synthetic { layers: Some(Mutex::default()), ..self }
    }

    /// What making layers has taken since it was last asked.
    pub(super) fn take_making(&self) -> Duration {
        std::mem::take(&mut self.making.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Packed bytes of one layer.
    pub(super) fn layer_bytes(&self) -> u64 {
        let linears = &self.inventory.part(Part::Layer(0)).linears;
        linears.iter().map(|linear| MatrixRecord::of(linear).stored_bytes()).sum()
    }

    fn tiles(&self, linear: &Linear) -> TiledMatrix {
        match self.ends.get(&linear.module) {
            Some(tiles) => tiles.clone(),
            None => random_tiles(linear, seed_of(&linear.module)),
        }
    }

    /// Norm weights are 1. A stored scale is the global one of NVFP4 inputs, 64: local scales are then small.
    fn vectors(&self, part: Part) -> BTreeMap<String, RawVector> {
        let part = self.inventory.part(part);
        let norms = part.vectors.iter().map(|vector| {
            let bytes = 0x3f80_u16.to_le_bytes().repeat(vector.length).into();
            (vector.tensor.clone(), RawVector { dtype: DType::BF16, bytes })
        });
        let globals = part.tensors.iter().filter(|name| name.ends_with(INPUT_GLOBAL_SCALE)).map(|name| {
            (name.clone(), RawVector { dtype: DType::F32, bytes: 64_f32.to_le_bytes().to_vec().into() })
        });
        norms.chain(globals).collect()
    }
}

impl LayerSource for Synthetic {
    fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    fn part(&self, part: Part) -> Result<PartTiles, SourceError> {
        let start = Instant::now();
        let make = || {
            let linears = &self.inventory.part(part).linears;
            let matrices = linears.iter().map(|linear| (linear.module.clone(), self.tiles(linear))).collect();
            PartTiles { matrices, vectors: self.vectors(part) }
        };
        let tiles = match &self.layers {
            None => make(),
            Some(kept) => {
                let mut kept = kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                kept.entry(part).or_insert_with(make).clone()
            }
        };
        *self.making.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += start.elapsed();
        Ok(tiles)
    }
}

/// FNV-1a: each matrix has codes of its own.
fn seed_of(module: &str) -> u64 {
    module
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

const INPUT_GLOBAL_SCALE: &str = "input_global_scale";

/// Names, types and shapes of the tensors that the checkpoint would have, without their bytes.
struct Names {
    config: ModelConfig,
    infos: BTreeMap<String, TensorInfo>,
}

impl Names {
    fn new(model: &Model, scheme: BenchScheme, layers: usize) -> anyhow::Result<Names> {
        let bytes = serde_json::to_vec(&model.config(layers, scheme.preset()))?;
        let config = ModelConfig::parse(Path::new("config.json"), bytes)?;
        let mut names = Names { config, infos: BTreeMap::new() };
        let hidden = model.hidden;
        names.add("model.embed_tokens.weight", DType::BF16, &[model.vocabulary, hidden]);
        names.add("model.norm.weight", DType::BF16, &[hidden]);
        if !model.tied {
            names.add("lm_head.weight", DType::BF16, &[model.vocabulary, hidden]);
        }
        let (q, kv) = (model.heads * model.head_dim, model.kv_heads * model.head_dim);
        for layer in (0..layers).map(|index| format!("model.layers.{index}")) {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                names.add(&format!("{layer}.{norm}.weight"), DType::BF16, &[hidden]);
            }
            for (module, n, k) in [
                ("self_attn.q_proj", q, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, q),
                ("mlp.gate_proj", model.inner, hidden),
                ("mlp.up_proj", model.inner, hidden),
                ("mlp.down_proj", hidden, model.inner),
            ] {
                names.linear(&format!("{layer}.{module}"), scheme, n, k);
            }
        }
        Ok(names)
    }

    fn add(&mut self, name: &str, dtype: DType, shape: &[usize]) {
        self.infos.insert(name.to_owned(), TensorInfo { dtype, shape: shape.to_vec() });
    }

    /// The tensors of one linear, as compressed-tensors writes them.
    fn linear(&mut self, module: &str, scheme: BenchScheme, n: usize, k: usize) {
        let mut add =
            |leaf: &str, dtype, shape: &[usize]| self.add(&format!("{module}.{leaf}"), dtype, shape);
        match scheme {
            BenchScheme::Bf16 => add("weight", DType::BF16, &[n, k]),
            BenchScheme::W4a16 | BenchScheme::W4a8 => {
                add("weight_packed", DType::I32, &[n, k / 8]);
                add("weight_scale", DType::BF16, &[n, k / 128]);
            }
            BenchScheme::Nvfp4 => {
                add("weight_packed", DType::U8, &[n, k / 2]);
                add("weight_scale", DType::F8E4M3, &[n, k / 16]);
                add("weight_global_scale", DType::F32, &[1]);
                add(INPUT_GLOBAL_SCALE, DType::F32, &[1]);
            }
            BenchScheme::Mxfp4a16 => {
                add("weight_packed", DType::U8, &[n, k / 2]);
                add("weight_scale", DType::U8, &[n, k / 32]);
            }
            BenchScheme::Fp8 => {
                add("weight", DType::F8E4M3, &[n, k]);
                add("weight_scale", DType::BF16, &[n, 1]);
            }
            BenchScheme::W8a8 => {
                add("weight", DType::I8, &[n, k]);
                add("weight_scale", DType::BF16, &[n, 1]);
            }
        }
    }
}

impl TensorSource for Names {
    fn root(&self) -> &Path {
        Path::new(".")
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn names(&self) -> Vec<&str> {
        self.infos.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.infos.get(name).cloned()
    }

    fn file_of(&self, _name: &str) -> &Path {
        self.root()
    }

    /// Whatever is asked for by its bytes while an inventory is read is nothing that these schemes have.
    fn tensor(&self, _name: &str) -> ctq_model::Result<Option<Tensor<'_>>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use ctq_kernels::cuda::scratch_bytes;
    use ctq_model::inventory::LinearClass;
    use ctq_runtime::{Needs, Pool, plan};

    use super::*;
    use crate::bench::options::ShapeChoice;

    #[test]
    fn parts_have_the_same_bits_however_often_they_are_asked_for_and_layers_differ() {
        for scheme in BenchScheme::ALL {
            let source = Synthetic::new(&Model::of(ShapeChoice::Tiny), scheme, 2).expect("a model");
            let codes = |part, module: &str| {
                let tiles = source.part(part).expect("a part");
                tiles.matrices[module].codes.to_vec()
            };
            let down =
                |layer: usize| codes(Part::Layer(layer), &format!("model.layers.{layer}.mlp.down_proj"));
            assert_eq!(down(0), down(0), "{}", scheme.name());
            assert_ne!(down(0), down(1), "{}", scheme.name());
            let table = || codes(Part::Embedding, "model.embed_tokens");
            assert_eq!(table(), table());
        }
    }

    #[test]
    fn layers_that_are_kept_are_made_once_and_are_the_same() {
        let made = || Synthetic::new(&Model::of(ShapeChoice::Tiny), BenchScheme::W4a16, 2).expect("a model");
        let (kept, anew) = (made().keeping_layers(), made());
        let codes = |source: &Synthetic| {
            let tiles = source.part(Part::Layer(1)).expect("a layer");
            tiles.matrices["model.layers.1.mlp.up_proj"].codes.clone()
        };
        let first = codes(&kept);
        assert_eq!(first.as_ptr(), codes(&kept).as_ptr(), "the same bytes in the same place");
        assert_eq!(*first, *codes(&anew));
    }

    #[test]
    fn a_part_has_every_tensor_that_its_inventory_names() {
        let source = Synthetic::new(&Model::of(ShapeChoice::Tiny), BenchScheme::Nvfp4, 1).expect("a model");
        let layer = source.part(Part::Layer(0)).expect("a layer");
        let inventory = source.inventory().part(Part::Layer(0));
        assert!(inventory.linears.iter().all(|linear| layer.matrices.contains_key(&linear.module)));
        assert!(inventory.vectors.iter().all(|vector| layer.vectors.contains_key(&vector.tensor)));
        assert!(layer.vectors.contains_key("model.layers.0.self_attn.q_proj.input_global_scale"));
        // 147,456 weights of 4 bits, a scale byte for 16.
        assert_eq!(source.layer_bytes(), 147_456 / 2 + 147_456 / 16);
    }

    /// What a run is foreseen to take beyond the packed weights, in GiB.
    fn beyond_packed(shape: ShapeChoice, windows: usize) -> f64 {
        let model = Model::of(shape);
        let names = Names::new(&model, BenchScheme::W4a16, model.layers).expect("names");
        let inventory = Inventory::read(&names, &[]).expect("an inventory");
        let needs = Needs::of(&inventory);
        let layers = inventory.linears().filter(|linear| linear.class == LinearClass::Ffn);
        let scratch = scratch_bytes(layers.map(|linear| (linear.n, linear.k)));
        let pool = Pool::Separate { device: 75 << 30, host: 60 << 30 };
        let plan = plan(&needs, pool, scratch, &vec![2048; windows]).expect("room");
        assert_eq!(plan.schedule.resident_layers, model.layers, "all stay");
        (plan.device_bytes - needs.all) as f64 / f64::from(1 << 30)
    }

    /// By hand, 8B: 8192 tokens of 16 KiB of hidden state and 200 KiB of activations are 1.69 GiB; two decoded matrices of
    /// 14,336 x 4096 are 0.22, chunks of a product 0.07, logits 0.13. However many windows there are.
    #[test]
    fn whole_models_take_little_beside_their_packed_weights() {
        for windows in [4, 73, 2000] {
            let taken = beyond_packed(ShapeChoice::Llama8b, windows);
            assert!((2.0..2.15).contains(&taken), "{windows}: {taken}");
        }
        let large = beyond_packed(ShapeChoice::Mistral123b, 73);
        assert!((5.0..5.6).contains(&large), "{large}");
    }
}
