//! Rotary position embedding as configured, in both spellings of `config.json`.
//!
//! Old: `rope_theta` beside `rope_scaling` (`type` or `rope_type`). New (transformers 5): one `rope_parameters`.
//! Holds the parameters; the frequencies are computed by the runtime and, independently, by the reference.

use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;
use crate::json::Object;
use crate::{Error, Result};

/// Rotary embedding of every attention layer: pairs `(i, i + head_dim/2)` turn by `position * frequency[i]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the base frequencies are changed.
    pub scaling: RopeScaling,
}

/// Change of the base frequencies, by the names transformers uses in `modeling_rope_utils.py`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum RopeScaling {
    /// No change.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a smooth step between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the base model, in tokens.
        original: usize,
    },
    /// YaRN: a ramp between interpolated and kept frequencies, and a factor on cos and sin.
    Yarn {
        /// Divisor of the interpolated frequencies.
        factor: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Context length of the base model, in tokens.
        original: usize,
        /// Factor on cos and sin; `None`: `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
        /// `mscale` of DeepSeek's variant.
        mscale: Option<f64>,
        /// `mscale_all_dim` of DeepSeek's variant.
        mscale_all_dim: Option<f64>,
        /// Whether the ramp's ends are rounded outwards to whole dimensions.
        truncate: bool,
    },
}

/// Config keys that this module reads.
pub(crate) const KEYS: &[&str] = &["rope_theta", "rope_scaling", "rope_parameters", "rope_interleaved"];

impl Rope {
    pub(crate) fn read(config: &ModelConfig, default_theta: f64) -> Result<Rope> {
        let root = config.object();
        if root.boolean("rope_interleaved")? == Some(true) {
            return Err(Error::unsupported(
                config.path(),
                "`rope_interleaved`: rotation of adjacent pairs",
                "only the half-split rotation of Llama is implemented",
            ));
        }
        let theta = root.number("rope_theta")?;
        let (key, map) = match (root.object("rope_parameters")?, root.object("rope_scaling")?) {
            (Some(new), Some(old)) if new != old => {
                return Err(Error::config(
                    config.path(),
                    "rope_scaling",
                    "differs from `rope_parameters`, which says the same thing in the newer spelling",
                    "remove one of them, or restore the config.json of the original model",
                ));
            }
            (Some(map), _) => ("rope_parameters", Some(map)),
            (None, map) => ("rope_scaling", map),
        };
        let Some(map) = map else {
            return Ok(Rope { theta: theta.unwrap_or(default_theta), scaling: RopeScaling::Default });
        };
        let rope = Object { file: config.path(), prefix: key, map };
        let theta = rope.number("rope_theta")?.or(theta).unwrap_or(default_theta);
        let max_position = root.positive("max_position_embeddings")?;
        Ok(Rope { theta, scaling: scaling(rope, max_position)? })
    }
}

fn scaling(rope: Object<'_>, max_position: Option<usize>) -> Result<RopeScaling> {
    let kind = rope.string("rope_type")?.or(rope.string("type")?).unwrap_or("default");
    let number = |key: &str| rope.number(key)?.ok_or_else(|| rope.absent(key));
    let factor = || -> Result<f64> {
        let factor = number("factor")?;
        if factor > 0.0 { Ok(factor) } else { Err(rope.wrong("factor", "a positive number", &factor.into())) }
    };
    let original = || -> Result<usize> {
        let given = rope.positive("original_max_position_embeddings")?;
        given.or(max_position).ok_or_else(|| rope.absent("original_max_position_embeddings"))
    };
    const COMMON: &[&str] = &["rope_type", "type", "rope_theta", "partial_rotary_factor"];
    if rope.number("partial_rotary_factor")?.is_some_and(|share| share != 1.0) {
        return Err(Error::unsupported(
            rope.file,
            format!("`{}`: a partial rotation", rope.dotted("partial_rotary_factor")),
            "no supported family rotates a part of the head",
        ));
    }
    let (scaling, keys): (RopeScaling, &[&str]) = match kind {
        "default" => (RopeScaling::Default, &[]),
        "linear" => (RopeScaling::Linear { factor: factor()? }, &["factor"]),
        "llama3" => (
            RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original: original()?,
            },
            &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        ),
        "yarn" => (
            RopeScaling::Yarn {
                factor: factor()?,
                // transformers reads a zero as absent, too.
                beta_fast: rope.number("beta_fast")?.filter(|beta| *beta != 0.0).unwrap_or(32.0),
                beta_slow: rope.number("beta_slow")?.filter(|beta| *beta != 0.0).unwrap_or(1.0),
                original: original()?,
                attention_factor: rope.number("attention_factor")?,
                mscale: rope.number("mscale")?,
                mscale_all_dim: rope.number("mscale_all_dim")?,
                truncate: rope.boolean("truncate")?.unwrap_or(true),
            },
            &[
                "factor",
                "beta_fast",
                "beta_slow",
                "original_max_position_embeddings",
                "attention_factor",
                "mscale",
                "mscale_all_dim",
                "truncate",
            ],
        ),
        other => {
            return Err(Error::unsupported(
                rope.file,
                format!("`{}` = `{other}`", rope.dotted("rope_type")),
                "implemented are default, linear, llama3 and yarn",
            ));
        }
    };
    // A parameter that this kind does not have would be dropped without a word.
    for (key, value) in rope.map {
        if !value.is_null() && !COMMON.contains(&key.as_str()) && !keys.contains(&key.as_str()) {
            // The unscaled kind is often written with the base context beside it, which has no effect there.
            if kind == "default" && key == "original_max_position_embeddings" {
                continue;
            }
            return Err(Error::config(
                rope.file,
                &rope.dotted(key),
                format!(
                    "ctq does not know this parameter for rope type `{kind}`; it could change the numbers"
                ),
                "remove it if it is a leftover",
            ));
        }
    }
    Ok(scaling)
}
