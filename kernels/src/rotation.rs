//! Cosines and sines of rotary position embedding, as transformers computes them: frequencies and angles in f32
//! (`modeling_rope_utils.py`), so that positions in the thousands turn by the same angle.

use std::sync::atomic::{AtomicU64, Ordering};

use ctq_model::rope::{Rope, RopeScaling};

/// cos and sin of every position: [positions, head_dim / 2] each.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// Another for each table that was made.
    identity: u64,
    head_dim: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// Tables for positions `0..positions` of heads of `head_dim`.
    pub fn new(rope: &Rope, head_dim: usize, positions: usize) -> Rotation {
        let frequencies = frequencies(rope, head_dim);
        let factor = attention_factor(&rope.scaling);
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in 0..positions {
            for frequency in &frequencies {
                let angle = f64::from(position as f32 * frequency);
                cos.push(libm::cos(angle) as f32 * factor);
                sin.push(libm::sin(angle) as f32 * factor);
            }
        }
        static MADE: AtomicU64 = AtomicU64::new(0);
        Rotation { identity: MADE.fetch_add(1, Ordering::Relaxed), head_dim, cos, sin }
    }

    /// Tells tables apart, so that a device may keep a copy. Clones have the same.
    pub(crate) fn identity(&self) -> u64 {
        self.identity
    }

    /// cos and sin of all positions, [positions, head_dim / 2] each.
    pub(crate) fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Dimension of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// cos and sin of one position, [head_dim / 2] each.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let half = self.head_dim / 2;
        let range = position * half..(position + 1) * half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// `1 / theta^(2i/d)`, power and quotient rounded to f32, then scaled.
fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let power = |i: usize| {
        let exponent = (2 * i) as f32 / head_dim as f32;
        libm::pow(rope.theta as f32 as f64, f64::from(exponent)) as f32
    };
    let base: Vec<f32> = (0..half).map(|i| 1.0 / power(i)).collect();
    match &rope.scaling {
        RopeScaling::Default => base,
        RopeScaling::Linear { factor } => base.into_iter().map(|f| f / *factor as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => base
            .into_iter()
            .map(|f| {
                llama3(f, *factor as f32, *low_freq_factor as f32, *high_freq_factor as f32, *original as f32)
            })
            .collect(),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original, truncate, .. } => {
            // Dimension at which a head turns `rotations` times within the original context.
            let dimension = |rotations: f64| {
                let turns = *original as f64 / (rotations * 2.0 * std::f64::consts::PI);
                head_dim as f64 * libm::log(turns) / (2.0 * libm::log(rope.theta))
            };
            let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
            if *truncate {
                (low, high) = (libm::floor(low), libm::ceil(high));
            }
            let (low, mut high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            (0..half)
                .map(|i| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let kept = 1.0 - ramp;
                    let interpolated = 1.0 / (*factor as f32 * power(i));
                    interpolated * (1.0 - kept) + base[i] * kept
                })
                .collect()
        }
    }
}

fn llama3(frequency: f32, factor: f32, low: f32, high: f32, original: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength > original / low {
        frequency / factor
    } else if wavelength < original / high {
        frequency
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * (frequency / factor) + smooth * frequency
    }
}

/// YaRN's factor on cos and sin (`_compute_yarn_parameters`).
fn attention_factor(scaling: &RopeScaling) -> f32 {
    let RopeScaling::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. } = scaling else {
        return 1.0;
    };
    if let Some(stated) = attention_factor {
        return *stated as f32;
    }
    let scale = |mscale: f64| if *factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(*factor) + 1.0 };
    match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all)) if *mscale != 0.0 && *all != 0.0 => (scale(*mscale) / scale(*all)) as f32,
        _ => scale(1.0) as f32,
    }
}
