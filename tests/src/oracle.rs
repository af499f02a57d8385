//! A checkpoint folder with the logits that Hugging Face computed for it, and how close to them a run has to be.
//!
//! Knows `oracle.safetensors` and `oracle.json` as `golden/make_families.py` writes them.

use std::path::Path;

use serde_json::Value;

use crate::assets;
use crate::compare::{mean_divergence, relative};
use crate::safetensors_file::SafetensorsFile;

/// Most that logits may be from the oracle's, weights only: relative Frobenius distance. A plain chain of f32 sums
/// reaches 2e-6.
const WEIGHT_ONLY: f64 = 2e-5;

/// Int8 per token divides by amax / 127.5, which puts a negative maximum exactly on a tie: the last bit of an f32
/// decides the code, and no two programs agree. Relative distance and divergence of the one fixture that has it.
const UNSETTLED: (&str, f64, f64) = ("llama-w8a8-int8-dynamic", 8e-2, 4e-3);

/// Logits by Hugging Face.
#[derive(Clone, Debug)]
pub struct Oracle {
    /// Name of the checkpoint.
    pub name: String,
    /// Token ids, row by row.
    pub rows: Vec<Vec<u32>>,
    /// Logits a position.
    pub vocabulary: usize,
    /// Logits with activation quantization where the scheme has any.
    pub logits: Vec<f32>,
    /// Logits without it; the same where the scheme has none.
    pub weight_only: Vec<f32>,
    /// Negative log-likelihoods of next tokens [rows, length - 1] with weights that were not rounded to bf16 and
    /// activations quantized, where the folder has them.
    pub exact_nll: Option<Vec<f64>>,
    about: Value,
}

impl Oracle {
    /// Reads the oracle of a checkpoint folder.
    ///
    /// # Panics
    /// If it has none.
    pub fn read(folder: &Path) -> Oracle {
        let file = SafetensorsFile::read(&folder.join("oracle.safetensors"));
        let logits = file.floats("logits_f32").expect("logits_f32");
        let about = std::fs::read(folder.join("oracle.json")).expect("oracle.json");
        Oracle {
            name: assets::name(folder).to_owned(),
            rows: file.input_ids(),
            vocabulary: *file.shape("logits_f32").last().expect("a dimension"),
            weight_only: file.floats("logits_weight_only_f32").unwrap_or_else(|| logits.clone()),
            logits,
            exact_nll: file.doubles("nll_exact_dequant"),
            about: serde_json::from_slice(&about).expect("JSON"),
        }
    }

    /// How far noise of one unit in the last place, or f64 instead of f32, moves the oracle's own logits.
    fn noise(&self) -> f64 {
        let measured = [
            &self.about["stability_search"]["ulp_noise"],
            &self.about["ulp_noise"],
            &self.about["noise_floor_params_and_matmuls_in_f64"]["rel_fro"],
        ];
        let largest = measured.into_iter().filter_map(Value::as_f64).reduce(f64::max);
        largest.unwrap_or_else(|| panic!("{}: oracle.json does not say how noisy it is", self.name))
    }

    /// Whether anything but weights is quantized.
    pub fn quantizes_activations(&self) -> bool {
        let says = |key: &str| self.about[key] == Value::Bool(true);
        says("activation_quantization") || says("kv_cache_quantization")
    }

    /// True where two programs cannot agree on activations, for want of bits.
    pub fn unsettled(&self) -> bool {
        self.name == UNSETTLED.0
    }

    /// What is wrong with logits that were computed with weights only; `None`: nothing.
    pub fn off_complaint(&self, logits: &[f32]) -> Option<String> {
        let distance = relative(logits, &self.weight_only);
        (distance > WEIGHT_ONLY || distance.is_nan())
            .then(|| format!("{}: off is {distance:.1e} away, at most {WEIGHT_ONLY:.1e}", self.name))
    }

    /// What is wrong with logits that were computed with the library's activation quantization.
    ///
    /// Rounding of activations is discontinuous: where noise of about one unit in the last place, or f64 instead of
    /// f32, moves the oracle itself, no other program can agree better than a few times that.
    pub fn library_complaint(&self, logits: &[f32]) -> Option<String> {
        let distance = relative(logits, &self.logits);
        let (name, unsettled, most_divergence) = UNSETTLED;
        if self.unsettled() {
            let divergence = mean_divergence(logits, &self.logits, self.vocabulary);
            let fits = distance <= unsettled && divergence <= most_divergence;
            return (!fits).then(|| {
                format!("{name}: library is {distance:.1e} away with a divergence of {divergence:.1e}")
            });
        }
        let bound = 3.0 * self.noise();
        (distance > bound || distance.is_nan())
            .then(|| format!("{}: library is {distance:.1e} away, at most {bound:.1e}", self.name))
    }
}
