//! Scales and zero points from the extremes of what shares them: compressed-tensors' formulas and those of kernels.
//! Knows numbers, not where they lie.

use ctq_model::matrix::Code;
use ctq_model::scheme::ActivationScale;

use crate::backend::Quantizer;
use crate::cpu::math::round_e4m3;

/// Scale and zero point of one run. A dynamic symmetric scheme of the library has a zero point of 0, a static one has
/// none: adding 0 turns -0 into +0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parameters {
    pub(super) scale: f32,
    pub(super) zero: Option<f32>,
}

/// Smallest and largest value of a run; where the scheme is symmetric, `high` is the largest magnitude and `low`
/// nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extremes {
    pub(super) low: f32,
    pub(super) high: f32,
}

impl Extremes {
    /// Of no values.
    pub(super) fn none(symmetric: bool) -> Extremes {
        if symmetric {
            Extremes { low: 0.0, high: 0.0 }
        } else {
            Extremes { low: f32::INFINITY, high: f32::NEG_INFINITY }
        }
    }

    /// Of both runs.
    pub(super) fn join(self, other: Extremes) -> Extremes {
        Extremes { low: self.low.min(other.low), high: self.high.max(other.high) }
    }
}

/// Range of codes.
#[inline(always)]
pub(super) fn code_range(code: Code) -> (f32, f32) {
    match code {
        Code::Int { bits } => {
            let half = f32::from(1_u16 << (bits - 1));
            (-half, half - 1.0)
        }
        Code::E2m1 => (-6.0, 6.0),
        Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => (-448.0, 448.0),
    }
}

/// `x` inside a range; NaN stays.
#[inline(always)]
pub(super) fn clamp(x: f32, (low, high): (f32, f32)) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// Machine epsilon of f32 stands in for a scale of zero.
#[inline(always)]
fn or_epsilon(scale: f32) -> f32 {
    if scale == 0.0 { f32::EPSILON } else { scale }
}

/// Stored parameters of run `run` of a row; one scale for all, or one a run.
#[inline(always)]
pub(super) fn stored(quantizer: &Quantizer, run: usize) -> Parameters {
    let scale = quantizer.scales[if quantizer.scales.len() > 1 { run } else { 0 }];
    Parameters { scale, zero: (!quantizer.activation.symmetric).then_some(quantizer.zero) }
}

/// Dynamic parameters as compressed-tensors finds them, activations f32.
#[inline(always)]
pub(super) fn library(quantizer: &Quantizer, Extremes { low, high }: Extremes) -> Parameters {
    let activation = quantizer.activation;
    let (code_low, code_high) = code_range(activation.code);
    if !activation.symmetric {
        let (low, high) = (low.min(0.0), high.max(0.0));
        let scale = (high - low) / (code_high - code_low);
        let zero = (code_low - low / scale).clamp(code_low, code_high).round_ties_even();
        let zero = if zero.is_nan() { 0.0 } else { zero };
        return Parameters { scale: or_epsilon(scale), zero: Some(zero) };
    }
    let scale = match activation.scale {
        ActivationScale::Local => local_scale(quantizer.global_scale, high) / quantizer.global_scale,
        ActivationScale::PowerOfTwo => power_of_two(activation.code, high),
        ActivationScale::Dynamic | ActivationScale::Static => {
            or_epsilon(high / ((code_high - code_low) / 2.0))
        }
    };
    Parameters { scale, zero: Some(0.0) }
}

/// NVFP4: the group's scale in fp8, under the global scale.
#[inline(always)]
pub(super) fn local_scale(global: f32, largest: f32) -> f32 {
    let scale = round_e4m3(clamp(global * (largest / 6.0), (-448.0, 448.0)));
    if scale == 0.0 { 0.125 } else { scale }
}

/// MX: the largest magnitude rounded to a power of two at the first (of fp4 and fp8) mantissa bit, over the largest
/// power of two of the code.
///
/// A run of nothing but zeros and NaN has -0, whose sign counts as an exponent: zeros stay zero under any scale, and the
/// 6 that fp4 makes of NaN becomes infinite.
#[inline(always)]
pub(super) fn power_of_two(code: Code, largest: f32) -> f32 {
    let bits = if largest == 0.0 { 1 << 31 } else { largest.to_bits() };
    let rounded = bits.wrapping_add(1 << 21) & 0xff80_0000;
    let offset = match code {
        Code::E4m3 => 8,
        Code::E2m1 | Code::Int { .. } | Code::Bf16 | Code::F16 | Code::F32 => 2,
    };
    let exponent = (rounded >> 23).saturating_sub(offset);
    f32::from_bits(if exponent == 0 { 0x0040_0000 } else { exponent << 23 })
}

/// Parameters as serving kernels find them: int8 over 127, fp8 over 448, asymmetric over the whole range of codes.
#[inline(always)]
pub(super) fn kernel(quantizer: &Quantizer, Extremes { low, high }: Extremes) -> Parameters {
    let (code_low, code_high) = code_range(quantizer.activation.code);
    if quantizer.activation.symmetric {
        return Parameters { scale: or_epsilon(high / code_high), zero: None };
    }
    let scale = or_epsilon((high - low) / (code_high - code_low));
    Parameters { scale, zero: Some((code_low - low / scale).round_ties_even()) }
}
