//! Folders that hold a checkpoint and the logits that Hugging Face computed for it, and how far ours are from them.
//!
//! Knows `oracle.safetensors` and `oracle.json` as `golden/make_families.py` and the fixtures write them.

use std::fmt;
use std::path::{Path, PathBuf};

use ctq_model::{Inventory, TensorSource};
use ctq_reference::{Acts, Reference, nll};
use ndarray::Array2;
use safetensors::SafeTensors;
use serde_json::Value;

/// Most that our f64 may be from their f32, weights only: relative Frobenius distance of the logits.
const WEIGHT_ONLY: f64 = 3e-6;

/// The same of the mean negative log-likelihood, in nats.
const NLL: f64 = 3e-6;

/// A checkpoint folder with its oracle.
pub(crate) struct Oracle {
    pub(crate) folder: PathBuf,
    /// Token ids, row by row.
    pub(crate) rows: Vec<Vec<u32>>,
    /// Logits with activation quantization where the scheme has any, [rows * length, vocab].
    pub(crate) logits: Array2<f64>,
    /// Logits without it; the same where the scheme has none.
    pub(crate) weight_only: Array2<f64>,
    /// `oracle.json`.
    pub(crate) about: Value,
}

impl Oracle {
    pub(crate) fn read(folder: &Path) -> Oracle {
        let bytes = std::fs::read(folder.join("oracle.safetensors")).expect("oracle.safetensors");
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        let ids = tensors.tensor("input_ids").expect("input_ids");
        let length = ids.shape()[1];
        let ids: Vec<u32> =
            ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8")) as u32).collect();
        let logits = matrix(&tensors, "logits_f32").expect("logits_f32");
        let weight_only = matrix(&tensors, "logits_weight_only_f32").unwrap_or_else(|| logits.clone());
        let about = std::fs::read(folder.join("oracle.json")).expect("oracle.json");
        Oracle {
            folder: folder.to_owned(),
            rows: ids.chunks_exact(length).map(<[u32]>::to_vec).collect(),
            logits,
            weight_only,
            about: serde_json::from_slice(&about).expect("JSON"),
        }
    }

    pub(crate) fn name(&self) -> &str {
        self.folder.file_name().and_then(|name| name.to_str()).expect("a folder name")
    }

    fn quantizes_activations(&self) -> bool {
        self.about["activation_quantization"] == Value::Bool(true)
            || self.about["kv_cache_quantization"] == Value::Bool(true)
    }

    /// How far our quantized logits may be. Rounding of activations is discontinuous: where noise of about one unit in
    /// the last place, or f64 instead of f32, moves the oracle itself, no other program can agree better. But it must
    /// be closer than without quantization.
    pub(crate) fn bound(&self) -> f64 {
        if !self.quantizes_activations() {
            return WEIGHT_ONLY;
        }
        let ulp = self.about["stability_search"]["ulp_noise"].as_f64().unwrap_or(0.0);
        let exact = self.about["noise_floor_params_and_matmuls_in_f64"]["rel_fro"].as_f64().unwrap_or(0.0);
        (3.0 * ulp.max(exact)).min(relative(&self.logits, &self.weight_only))
    }

    /// How far our logits are.
    pub(crate) fn distances(&self, source: &dyn TensorSource) -> Distances {
        let inventory =
            Inventory::read(source, &[]).unwrap_or_else(|error| panic!("{}: {error}", self.name()));
        let reference = Reference::open(source, &inventory).expect("reference");
        let off = logits(&reference, &inventory, &self.rows, Acts::Off);
        let library = logits(&reference, &inventory, &self.rows, Acts::Library);
        Distances {
            off: relative(&self.weight_only, &off),
            library: relative(&self.logits, &library),
            nll: self.nll_distance(&off),
        }
    }

    /// Difference of the mean over all next tokens.
    fn nll_distance(&self, logits: &Array2<f64>) -> f64 {
        let length = self.rows[0].len();
        let positions = self.rows.iter().enumerate().flat_map(|(row, ids)| {
            (1..length).map(move |position| (row * length + position - 1, ids[position]))
        });
        let ours: Vec<f64> = positions.map(|(at, id)| nll(logits.row(at), id).expect("target")).collect();
        let stored = &self.about["nll"];
        let means =
            [&self.about["nll_weight_only"], &stored["nll_weight_only"]["mean"], &stored["nll_f32"]["mean"]];
        let theirs = means.into_iter().find_map(Value::as_f64).expect("oracle.json has a mean");
        (ours.iter().sum::<f64>() / ours.len() as f64 - theirs).abs()
    }
}

/// How far our numbers are from those of Hugging Face.
pub(crate) struct Distances {
    /// Logits, weights only: relative Frobenius distance.
    off: f64,
    /// Logits with quantized activations: relative Frobenius distance.
    library: f64,
    /// Mean negative log-likelihood of the next token, weights only: the difference in nats.
    nll: f64,
}

impl Distances {
    /// Whether all of them are as small as they can be asked to be.
    pub(crate) fn within(&self, bound: f64) -> bool {
        self.off <= WEIGHT_ONLY && self.library <= bound && self.nll <= NLL
    }
}

impl fmt::Display for Distances {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nll {:.1e}  off {:.1e}  library {:.1e}", self.nll, self.off, self.library)
    }
}

/// Logits of all rows, each a window of its own.
fn logits(reference: &Reference<'_>, inventory: &Inventory, rows: &[Vec<u32>], acts: Acts) -> Array2<f64> {
    let windows: Vec<Array2<f64>> = rows
        .iter()
        .map(|ids| {
            let mut hidden = reference.embed(ids).expect("embedding");
            for index in 0..inventory.spec.blocks.len() {
                hidden = reference.layer(index, hidden, acts).expect("layer");
            }
            reference.logits(&hidden, acts).expect("logits")
        })
        .collect();
    let views: Vec<_> = windows.iter().map(|window| window.view()).collect();
    ndarray::concatenate(ndarray::Axis(0), &views).expect("one vocabulary")
}

/// Frobenius norm of the difference over that of `expected`.
fn relative(expected: &Array2<f64>, found: &Array2<f64>) -> f64 {
    assert_eq!(expected.dim(), found.dim());
    let square = |x: &Array2<f64>| x.iter().map(|value| value * value).sum::<f64>();
    (square(&(found - expected)) / square(expected)).sqrt()
}

fn matrix(tensors: &SafeTensors<'_>, name: &str) -> Option<Array2<f64>> {
    let tensor = tensors.tensor(name).ok()?;
    let values: Vec<f64> = tensor
        .data()
        .chunks_exact(4)
        .map(|b| f64::from(f32::from_le_bytes(b.try_into().expect("4"))))
        .collect();
    let columns = *tensor.shape().last().expect("a dimension");
    Some(Array2::from_shape_vec((values.len() / columns, columns), values).expect("shape"))
}

/// Subfolders of `root` that hold a whole oracle, sorted.
pub(crate) fn folders(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.expect("directory entry").path())
        .filter(|path| path.join("oracle.json").is_file())
        .collect();
    folders.sort();
    folders
}
