//! Activation quantization: as compressed-tensors does it in f32 (values), and as serving kernels do it (codes).
//!
//! Formulas: compressed-tensors `quantization/utils/helpers.py` (`calculate_qparams`) and
//! `quantization/lifecycle/forward.py` (`fake_quantize`); kernels after vLLM. NUMERICS.md lists them side by side.

use std::ops::Range;

use ctq_model::matrix::Code;
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};
use rayon::prelude::*;

use crate::Compute;
use crate::backend::{Quantizer, Treatment};
use crate::cpu::math::{round_e2m1, round_e4m3};
use crate::cpu::product::{Strips, Unit};
use crate::cpu::{CpuBuffer, Isa};

/// Inputs of linears after their treatment.
#[derive(Clone, Debug)]
pub struct CpuOperand {
    /// Operands, or codes.
    pub(crate) strips: Strips,
    pub(crate) kind: OperandKind,
}

/// What the values of an operand are.
#[derive(Clone, Debug)]
pub(crate) enum OperandKind {
    /// Values to multiply with decompressed weights.
    Values,
    /// Codes.
    Codes(CodeScales),
    /// Codes times their local scale, exact; everything is divided by `global` at the end.
    Scaled { activation: Activation, global: f32 },
}

/// Scales of an operand's codes.
#[derive(Clone, Debug)]
pub(crate) struct CodeScales {
    pub(crate) activation: Activation,
    /// k that shares one.
    pub(crate) segment: usize,
    /// [rows, k / segment]: multiply the sums of a segment.
    pub(crate) scales: Vec<f32>,
    /// [rows, k / segment], whole numbers: `word - offset` is the code less its zero point. None where codes are floats.
    pub(crate) offsets: Vec<f32>,
}

impl CodeScales {
    /// Scales of one row of `k` inputs.
    pub(crate) fn per_row(&self, k: usize) -> usize {
        k / self.segment
    }
}

impl CpuOperand {
    pub(crate) fn rows(&self) -> usize {
        self.strips.rows
    }

    /// Operands, or codes less their zero points: [rows, k].
    #[cfg(test)]
    pub(crate) fn values(&self) -> Vec<f32> {
        let mut values = self.strips.values();
        for (value, offset) in values.iter_mut().zip(self.offsets()) {
            *value -= offset;
        }
        values
    }

    /// Other values as [`CpuOperand::values`] gives them, of perhaps fewer rows, with everything else of these.
    #[cfg(test)]
    pub(crate) fn with_values(&self, isa: Isa, values: &[f32]) -> CpuOperand {
        let k = self.strips.k;
        let shifted: Vec<f32> =
            values.iter().zip(self.offsets()).map(|(value, offset)| value + offset).collect();
        let strips = Strips::pack(isa, self.strips.unit, (values.len() / k, k), |rows, out| {
            out.copy_from_slice(&shifted[rows.start * k..rows.end * k]);
        });
        CpuOperand { strips, kind: self.kind.clone() }
    }

    /// What each word is shifted by.
    #[cfg(test)]
    fn offsets(&self) -> impl Iterator<Item = f32> {
        let (segment, offsets) = match &self.kind {
            OperandKind::Codes(codes) => (codes.segment, codes.offsets.clone()),
            OperandKind::Values | OperandKind::Scaled { .. } => (1, Vec::new()),
        };
        let all = self.strips.rows * self.strips.k;
        (0..all).map(move |at| offsets.get(at / segment).copied().unwrap_or(0.0))
    }
}

/// Inputs of linears after their treatment, [rows, k]; scales of a whole tensor are found window by window.
pub(crate) fn prepare(
    isa: Isa,
    x: &CpuBuffer,
    treatment: &Treatment,
    compute: Compute,
    windows: &[Range<usize>],
) -> CpuOperand {
    let shape = (x.rows(), x.width);
    let row = |rows: Range<usize>| &x.values[rows.start * x.width..rows.end * x.width];
    match treatment {
        Treatment::Plain => {
            let unit = Unit::floats(isa, compute);
            let strips = Strips::pack(isa, unit, shape, |rows, out| out.copy_from_slice(row(rows)));
            CpuOperand { strips, kind: OperandKind::Values }
        }
        Treatment::FakeQuantized(quantizer) => {
            let mut buffer = x.clone();
            fake_quantize(&mut buffer, quantizer, x.width, windows);
            let unit = Unit::floats(isa, compute);
            let values = |rows: Range<usize>| &buffer.values[rows.start * x.width..rows.end * x.width];
            let strips = Strips::pack(isa, unit, shape, |rows, out| out.copy_from_slice(values(rows)));
            CpuOperand { strips, kind: OperandKind::Values }
        }
        Treatment::Exact(quantizer) => exact(isa, x, quantizer, windows),
    }
}

/// Consecutive elements of a row that share a scale.
fn run_length(activation: &Activation, width: usize, head_dim: usize) -> usize {
    match activation.sharing {
        ActivationSharing::Tensor | ActivationSharing::Token => width,
        ActivationSharing::Group { size } => size,
        ActivationSharing::Head => head_dim,
    }
}

/// Quantizes and dequantizes in place, in f32.
pub(crate) fn fake_quantize(
    x: &mut CpuBuffer,
    quantizer: &Quantizer,
    head_dim: usize,
    windows: &[Range<usize>],
) {
    let width = x.width;
    let activation = quantizer.activation;
    let length = run_length(&activation, width, head_dim);
    for window in windows {
        let rows = &mut x.values[window.start * width..window.end * width];
        let whole = match activation.sharing {
            ActivationSharing::Tensor => Some(range_of(rows)),
            ActivationSharing::Token | ActivationSharing::Group { .. } | ActivationSharing::Head => None,
        };
        rows.par_chunks_mut(width).for_each(|row| {
            let stored_heads = quantizer.scales.len() > 1;
            let length = if stored_heads { head_dim } else { length };
            for (index, run) in row.chunks_mut(length).enumerate() {
                let parameters = match activation.scale {
                    ActivationScale::Static => {
                        let scale = quantizer.scales[if stored_heads { index } else { 0 }];
                        let zero = (!activation.symmetric).then_some(quantizer.zero);
                        Parameters { scale, zero }
                    }
                    ActivationScale::Dynamic | ActivationScale::Local | ActivationScale::PowerOfTwo => {
                        library(quantizer, whole.unwrap_or_else(|| range_of(run)))
                    }
                };
                for value in run {
                    let code = quantize(activation, parameters, *value);
                    *value = parameters.zero.map_or(code, |zero| code - zero) * parameters.scale;
                }
            }
        });
    }
}

/// Scale and zero point of one run. A dynamic symmetric scheme has a zero point of 0, a static one has none: adding 0
/// turns -0 into +0.
#[derive(Clone, Copy, Debug)]
struct Parameters {
    scale: f32,
    zero: Option<f32>,
}

/// Smallest and largest value.
fn range_of(run: &[f32]) -> (f32, f32) {
    run.iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)))
}

/// Range of codes.
fn code_range(code: Code) -> (f32, f32) {
    match code {
        Code::Int { bits } => {
            let half = f32::from(1_u16 << (bits - 1));
            (-half, half - 1.0)
        }
        Code::E2m1 => (-6.0, 6.0),
        Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => (-448.0, 448.0),
    }
}

/// Nearest value of a code, inside its range.
fn round_code(code: Code, value: f32) -> f32 {
    match code {
        Code::Int { .. } => value.round_ties_even(),
        Code::E2m1 => round_e2m1(value),
        Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => round_e4m3(value),
    }
}

/// `round(clamp(x / scale + zero))`.
fn quantize(activation: Activation, parameters: Parameters, x: f32) -> f32 {
    let (low, high) = code_range(activation.code);
    let scaled = x / parameters.scale;
    let shifted = parameters.zero.map_or(scaled, |zero| scaled + zero);
    round_code(activation.code, shifted.clamp(low, high))
}

/// Parameters as compressed-tensors finds them, activations f32.
fn library(quantizer: &Quantizer, (low, high): (f32, f32)) -> Parameters {
    let activation = quantizer.activation;
    let (low, high) = (low.min(0.0), high.max(0.0));
    let (code_low, code_high) = code_range(activation.code);
    // Machine epsilon of f32 stands in for a scale of zero.
    let or_epsilon = |scale: f32| if scale == 0.0 { f32::EPSILON } else { scale };
    if !activation.symmetric {
        let scale = (high - low) / (code_high - code_low);
        let zero = (code_low - low / scale).clamp(code_low, code_high).round_ties_even();
        let zero = if zero.is_nan() { 0.0 } else { zero };
        return Parameters { scale: or_epsilon(scale), zero: Some(zero) };
    }
    let largest = (-low).max(high);
    let scale = match activation.scale {
        ActivationScale::Local => local_scale(quantizer, largest) / quantizer.global_scale,
        ActivationScale::PowerOfTwo => power_of_two(activation.code, largest),
        ActivationScale::Dynamic | ActivationScale::Static => {
            or_epsilon(largest / ((code_high - code_low) / 2.0))
        }
    };
    Parameters { scale, zero: Some(0.0) }
}

/// NVFP4: the group's scale in fp8, under the global scale.
fn local_scale(quantizer: &Quantizer, largest: f32) -> f32 {
    let scale = round_e4m3((quantizer.global_scale * (largest / 6.0)).clamp(-448.0, 448.0));
    if scale == 0.0 { 0.125 } else { scale }
}

/// MX: the largest magnitude rounded to a power of two at the first (of fp4 and fp8) mantissa bit, over the largest
/// power of two of the code.
fn power_of_two(code: Code, largest: f32) -> f32 {
    let rounded = largest.to_bits().wrapping_add(1 << 21) & 0xff80_0000;
    let offset = match code {
        Code::E4m3 => 8,
        Code::E2m1 | Code::Int { .. } | Code::Bf16 | Code::F16 | Code::F32 => 2,
    };
    let exponent = ((rounded >> 23) as i32 - offset).clamp(0, 255);
    match exponent {
        0 => f32::from_bits(0x0040_0000),
        _ => f32::from_bits((exponent as u32) << 23),
    }
}

/// Codes and scales as a serving kernel has them.
fn exact(isa: Isa, x: &CpuBuffer, quantizer: &Quantizer, windows: &[Range<usize>]) -> CpuOperand {
    let activation = quantizer.activation;
    let width = x.width;
    match activation.scale {
        ActivationScale::Local | ActivationScale::PowerOfTwo => {
            let mut values = x.values.clone();
            let length = run_length(&activation, width, width);
            values.par_chunks_mut(length).for_each(|run| {
                let range = range_of(run);
                let parameters = library(quantizer, range);
                // The code is the library's; what multiplies it is the fp8 scale alone.
                let largest = (-range.0.min(0.0)).max(range.1.max(0.0));
                let scale = match activation.scale {
                    ActivationScale::Local => local_scale(quantizer, largest),
                    ActivationScale::PowerOfTwo | ActivationScale::Static | ActivationScale::Dynamic => {
                        parameters.scale
                    }
                };
                for value in run {
                    *value = quantize(activation, parameters, *value) * scale;
                }
            });
            let global = match activation.scale {
                ActivationScale::Local => quantizer.global_scale,
                ActivationScale::PowerOfTwo | ActivationScale::Static | ActivationScale::Dynamic => 1.0,
            };
            let unit = Unit::floats(isa, Compute::Bf16);
            let strips = Strips::pack(isa, unit, (x.rows(), width), |rows, out| {
                out.copy_from_slice(&values[rows.start * width..rows.end * width]);
            });
            CpuOperand { strips, kind: OperandKind::Scaled { activation, global } }
        }
        ActivationScale::Static | ActivationScale::Dynamic => codes(isa, x, quantizer, windows),
    }
}

/// Integers and fp8: codes, and the scales that their sums are multiplied with.
fn codes(isa: Isa, x: &CpuBuffer, quantizer: &Quantizer, windows: &[Range<usize>]) -> CpuOperand {
    let activation = quantizer.activation;
    let width = x.width;
    let segment = run_length(&activation, width, width);
    let unit = match activation.code {
        Code::Int { .. } => Unit::integers(isa),
        Code::E4m3 | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32 => Unit::floats(isa, Compute::Bf16),
    };
    // Bytes are unsigned; the shift is taken back from the sums.
    let shift = if unit == Unit::Quad { 128.0 } else { 0.0 };
    let mut values = x.values.clone();
    let mut scales = vec![0.0; values.len() / segment.max(1)];
    let integers = matches!(activation.code, Code::Int { .. });
    let mut offsets = vec![0.0; if integers { scales.len() } else { 0 }];
    for window in windows {
        let rows = window.start * width..window.end * width;
        let whole = match activation.sharing {
            ActivationSharing::Tensor => Some(range_of(&values[rows.clone()])),
            ActivationSharing::Token | ActivationSharing::Group { .. } | ActivationSharing::Head => None,
        };
        let runs = rows.start / segment..rows.end / segment;
        let parameters: Vec<Parameters> = values[rows.clone()]
            .par_chunks(segment)
            .map(|run| match activation.scale {
                ActivationScale::Static => {
                    Parameters { scale: quantizer.scales[0], zero: Some(quantizer.zero) }
                }
                ActivationScale::Dynamic | ActivationScale::Local | ActivationScale::PowerOfTwo => {
                    kernel(activation, whole.unwrap_or_else(|| range_of(run)))
                }
            })
            .collect();
        let finite: Vec<bool> = values[rows]
            .par_chunks_mut(segment)
            .zip(&parameters)
            .map(|(run, parameters)| {
                for value in run.iter_mut() {
                    let code = kernel_code(activation, *parameters, *value);
                    // A float's zero keeps its sign.
                    *value = if integers { code + shift } else { code };
                }
                run.iter().all(|value| !value.is_nan())
            })
            .collect();
        for ((at, parameters), finite) in runs.zip(&parameters).zip(finite) {
            // No integer stands for NaN; the scale carries it to the outputs.
            scales[at] = if finite { parameters.scale } else { f32::NAN };
            if let Some(offset) = offsets.get_mut(at) {
                *offset = parameters.zero.unwrap_or(0.0) + shift;
            }
        }
    }
    let strips = Strips::pack(isa, unit, (x.rows(), width), |rows, out| {
        out.copy_from_slice(&values[rows.start * width..rows.end * width]);
    });
    CpuOperand { strips, kind: OperandKind::Codes(CodeScales { activation, segment, scales, offsets }) }
}

/// Parameters as serving kernels find them: int8 over 127, fp8 over 448, asymmetric over the whole range of codes.
fn kernel(activation: Activation, (low, high): (f32, f32)) -> Parameters {
    let (code_low, code_high) = code_range(activation.code);
    let or_epsilon = |scale: f32| if scale == 0.0 { f32::EPSILON } else { scale };
    if activation.symmetric {
        let largest = (-low).max(high).max(0.0);
        return Parameters { scale: or_epsilon(largest / code_high), zero: None };
    }
    let scale = or_epsilon((high - low) / (code_high - code_low));
    Parameters { scale, zero: Some((code_low - low / scale).round_ties_even()) }
}

/// The code. Kernels round before they add the zero point.
fn kernel_code(activation: Activation, parameters: Parameters, x: f32) -> f32 {
    let (low, high) = code_range(activation.code);
    match activation.code {
        Code::Int { .. } => {
            let zero = parameters.zero.unwrap_or(0.0);
            ((x / parameters.scale).round_ties_even() + zero).clamp(low, high)
        }
        Code::E4m3 | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32 => {
            round_code(activation.code, (x / parameters.scale).clamp(low, high))
        }
    }
}
