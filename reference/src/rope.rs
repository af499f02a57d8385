//! Rotary embedding: frequencies, angles and their cosines as transformers computes them, in f32.
//!
//! Source: `modeling_rope_utils.py` and `LlamaRotaryEmbedding` of transformers. Angles are rounded to f32 there, which
//! for late positions moves them by far more than an f64 would, so the oracle rounds where they do. Powers, cosines
//! and sines are taken in f64 and rounded once; torch's own are within one unit in the last place of that.

use std::f64::consts::PI;

use ctq_model::rope::{Rope, RopeScaling};
use ndarray::ArrayViewMut1;

/// Turns pairs `(i, i + head_dim/2)` of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    /// [head_dim / 2] angles of position 1, in radians.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on cosine and sine; 1 except for YaRN.
    pub attention_factor: f32,
}

impl Rotation {
    /// The rotation of heads of `head_dim` features.
    pub fn new(rope: &Rope, head_dim: usize) -> Rotation {
        let frequencies = frequencies(rope.theta, head_dim);
        // torch divides a number by a tensor by multiplying with the reciprocal; for 1 that is a division.
        let inverse: Vec<f32> = frequencies.iter().map(|frequency| 1.0 / frequency).collect();
        match &rope.scaling {
            RopeScaling::Default => Rotation { inverse_frequencies: inverse, attention_factor: 1.0 },
            RopeScaling::Linear { factor } => {
                let factor = *factor as f32;
                let inverse_frequencies = inverse.iter().map(|frequency| frequency / factor).collect();
                Rotation { inverse_frequencies, attention_factor: 1.0 }
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let llama3 = Llama3 {
                    factor: *factor as f32,
                    low: *low_freq_factor,
                    high: *high_freq_factor,
                    original: *original as f64,
                };
                let inverse_frequencies = inverse.iter().map(|frequency| llama3.scaled(*frequency)).collect();
                Rotation { inverse_frequencies, attention_factor: 1.0 }
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
            } => {
                let dimension = |rotations| correction_dimension(rotations, rope.theta, head_dim, *original);
                let (low, high) = (dimension(*beta_fast), dimension(*beta_slow));
                let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let ramp = Ramp::new(low.max(0.0), high.min(head_dim as f64 - 1.0));
                let pairs = frequencies.iter().zip(&inverse).enumerate();
                let inverse_frequencies = pairs
                    .map(|(i, (frequency, kept))| {
                        let interpolated = 1.0 / (*factor as f32 * frequency);
                        let share = 1.0 - ramp.at(i);
                        interpolated * (1.0 - share) + kept * share
                    })
                    .collect();
                let inferred = || yarn_attention_factor(*factor, *mscale, *mscale_all_dim);
                let attention_factor = attention_factor.unwrap_or_else(inferred) as f32;
                Rotation { inverse_frequencies, attention_factor }
            }
        }
    }

    /// Cosines and sines of one position, [head_dim / 2] each, with the attention factor.
    pub fn turns(&self, position: usize) -> Vec<(f32, f32)> {
        let turn = |frequency: &f32| {
            let angle = f64::from(position as f32 * frequency);
            let (cosine, sine) = (libm::cos(angle) as f32, libm::sin(angle) as f32);
            (cosine * self.attention_factor, sine * self.attention_factor)
        };
        self.inverse_frequencies.iter().map(turn).collect()
    }
}

/// Rotates one head, [head_dim], in f64 by the f32 turns of its position.
pub(crate) fn rotate(mut head: ArrayViewMut1<'_, f64>, turns: &[(f32, f32)]) {
    let half = turns.len();
    for (i, (cosine, sine)) in turns.iter().enumerate() {
        let (cosine, sine) = (f64::from(*cosine), f64::from(*sine));
        let (first, second) = (head[i], head[i + half]);
        head[i] = first * cosine - second * sine;
        head[i + half] = second * cosine + first * sine;
    }
}

/// `theta ** (2i / head_dim)`: exponent and power are rounded to f32.
fn frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    let theta = f64::from(theta as f32);
    let exponent = |i: usize| f64::from((2 * i) as f32 / head_dim as f32);
    (0..head_dim / 2).map(|i| libm::pow(theta, exponent(i)) as f32).collect()
}

/// `_compute_llama3_parameters`.
struct Llama3 {
    factor: f32,
    low: f64,
    high: f64,
    original: f64,
}

impl Llama3 {
    fn scaled(&self, inverse: f32) -> f32 {
        let wavelength = (1.0 / inverse) * (2.0 * PI) as f32;
        let (longest_kept, shortest_scaled) = (self.original / self.high, self.original / self.low);
        if wavelength > shortest_scaled as f32 {
            return inverse / self.factor;
        }
        if wavelength < longest_kept as f32 {
            return inverse;
        }
        let turns = (1.0 / wavelength) * self.original as f32;
        let smooth = (turns - self.low as f32) / (self.high - self.low) as f32;
        (1.0 - smooth) * inverse / self.factor + smooth * inverse
    }
}

/// YaRN: 0 up to `low`, 1 from `high` on, linear between.
struct Ramp {
    low: f32,
    width: f32,
}

impl Ramp {
    fn new(low: f64, high: f64) -> Ramp {
        // The source's own guard against a ramp of no width.
        let high = if low == high { high + 0.001 } else { high };
        Ramp { low: low as f32, width: (high - low) as f32 }
    }

    fn at(&self, i: usize) -> f32 {
        ((i as f32 - self.low) / self.width).clamp(0.0, 1.0)
    }
}

/// `find_correction_dim`: the pair that turns `rotations` times over the original context.
fn correction_dimension(rotations: f64, theta: f64, head_dim: usize, original: usize) -> f64 {
    (head_dim as f64 * libm::log(original as f64 / (rotations * 2.0 * PI))) / (2.0 * libm::log(theta))
}

/// `_compute_yarn_parameters`: the factor when the configuration gives none.
fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(factor) + 1.0 };
    match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scale(mscale) / scale(all),
        (Some(_) | None, Some(_) | None) => scale(1.0),
    }
}
