//! The arithmetic of a run and the memory of a token against numbers worked out by hand, for shapes whose weights nobody
//! has to have.

use std::path::Path;

use ctq_kernels::Compute;
use ctq_model::checkpoint::TensorInfo;
use ctq_model::config::ModelConfig;
use ctq_model::window::Window;
use ctq_model::{DType, Inventory, Tensor, TensorSource};
use ctq_runtime::{Acts, Needs, Operations, Work};
use ctq_tests::{assets, models};

/// Shapes of Llama-3.2-1B, dense: no tensor can be read.
struct Shapes {
    config: ModelConfig,
    tensors: Vec<(String, Vec<usize>)>,
}

const CONFIG: &str = r#"{
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": true, "hidden_act": "silu",
    "attention_bias": false, "mlp_bias": false
}"#;

impl Shapes {
    fn llama_1b() -> Shapes {
        let path = Path::new("config.json");
        let config = ModelConfig::parse(path, CONFIG.as_bytes().to_vec()).expect("a configuration");
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![128_256, 2_048]),
            ("model.norm.weight".to_owned(), vec![2_048]),
        ];
        for layer in 0..16 {
            let matrices = [
                ("self_attn.q_proj", 2_048, 2_048),
                ("self_attn.k_proj", 512, 2_048),
                ("self_attn.v_proj", 512, 2_048),
                ("self_attn.o_proj", 2_048, 2_048),
                ("mlp.gate_proj", 8_192, 2_048),
                ("mlp.up_proj", 8_192, 2_048),
                ("mlp.down_proj", 2_048, 8_192),
            ];
            let name = |module: &str| format!("model.layers.{layer}.{module}.weight");
            tensors.extend(matrices.map(|(module, n, k)| (name(module), vec![n, k])));
            let norms = ["input_layernorm", "post_attention_layernorm"];
            tensors.extend(norms.map(|module| (name(module), vec![2_048])));
        }
        tensors.sort();
        Shapes { config, tensors }
    }
}

impl TensorSource for Shapes {
    fn root(&self) -> &Path {
        Path::new("shapes")
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.iter().map(|(name, _)| name.as_str()).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (_, shape) = self.tensors.iter().find(|(it, _)| it == name)?;
        Some(TensorInfo { dtype: DType::BF16, shape: shape.clone() })
    }

    fn file_of(&self, _name: &str) -> &Path {
        self.root()
    }

    fn tensor(&self, _name: &str) -> ctq_model::Result<Option<Tensor<'_>>> {
        Ok(None)
    }
}

fn inventory() -> Inventory {
    Inventory::read(&Shapes::llama_1b(), &[]).expect("an inventory")
}

/// One window of 2048 tokens, the last 512 of which are scored.
fn window() -> Window {
    Window { index: 0, start: 0, ids: vec![0; 2_048], scored: 1_536..2_048 }
}

const BF16: fn(f64) -> Operations = |bf16| Operations { bf16, ..Operations::default() };

#[test]
fn work_of_a_window_of_llama_1b() {
    let work = Work::of(&inventory(), models::settings(Acts::Off, Compute::Bf16), &[window()]);
    // 16 layers of 2 * 2048^2 (q, o) + 2 * 512 * 2048 (k, v) + 3 * 2048 * 8192 weights, 2048 rows: 3.986 T. The last
    // layer's q, o and feed-forward part are of 512 rows.
    assert_eq!(work.linears, BF16(3_985_729_650_688.0 - 180_388_626_432.0));
    // 32 heads of 64, 2048 * 2049 / 2 pairs, 16 layers: 0.275 T. The queries of the last layer are those of positions
    // 1535 to 2046.
    assert_eq!(work.attention, BF16(275_012_124_672.0 - 4.0 * 2_048.0 * (2_098_176.0 - 917_248.0)));
    // 128256 * 2048 weights, 512 rows: 0.269 T.
    assert_eq!(work.head, BF16(268_972_326_912.0));
    assert_eq!(
        work.all().all(),
        3_985_729_650_688.0 - 180_388_626_432.0 + 265_337_962_496.0 + 268_972_326_912.0
    );
}

#[test]
fn work_is_of_the_arithmetic_that_does_it() {
    let inventory = models::on_the_fly(&assets::golden("families/llama-w4a8"));
    let inventory = ctq_container::LayerSource::inventory(&inventory);
    let of = |acts, compute| Work::of(inventory, models::settings(acts, compute), &[window()]);
    let library = of(Acts::Library, Compute::F32);
    assert_eq!((library.linears.bf16, library.linears.integers), (0.0, 0.0));
    let kernel = of(Acts::Kernel, Compute::Bf16);
    assert_eq!((kernel.linears.f32, kernel.linears.bf16), (0.0, 0.0));
    assert_eq!(kernel.linears.integers, library.linears.f32);
    assert_eq!(kernel.attention, BF16(library.attention.f32));
}

/// Each token goes to 2 of the experts.
#[test]
fn experts_work_for_the_tokens_that_they_get() {
    let source = models::on_the_fly(&assets::golden("families/mixtral-sliding"));
    let inventory = ctq_container::LayerSource::inventory(&source);
    let spec = &inventory.spec;
    let everything = Window { scored: 1..65, ids: vec![0; 65], ..window() };
    let work = Work::of(inventory, models::settings(Acts::Off, Compute::F32), &[everything]);
    let mut expected = 0.0;
    for (index, block) in spec.blocks.iter().enumerate() {
        let ctq_model::spec::FfnSpec::Moe { top_k, experts, .. } = &block.ffn else { panic!("experts") };
        assert_eq!(*top_k, 2);
        let attention = &block.attention;
        let (queries, keys) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        let all = 2 * keys * spec.hidden;
        let leaving =
            2 * queries * spec.hidden + experts.len() * spec.hidden + 2 * 3 * spec.hidden * experts[0].width;
        let last = if index + 1 == spec.blocks.len() { 64 } else { 65 };
        expected += (2 * (all * 65 + leaving * last)) as f64;
    }
    assert_eq!(work.linears.f32, expected);
}

/// Normed input and its operand of 2048 elements, gate and up of 8192: 80 KiB a token.
#[test]
fn a_token_of_llama_1b_takes_80_kib() {
    let needs = Needs::of(&inventory());
    assert_eq!((needs.hidden, needs.activations_on_host), (8_192, 81_920));
}
