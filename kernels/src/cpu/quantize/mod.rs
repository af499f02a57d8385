//! Activation quantization: as compressed-tensors does it in f32 (values), and as serving kernels do it (codes).
//!
//! Formulas: compressed-tensors `quantization/utils/helpers.py` (`calculate_qparams`) and
//! `quantization/lifecycle/forward.py` (`fake_quantize`); kernels after vLLM. NUMERICS.md lists them side by side.
//! Here is what an operand is and which rows share a scale; formulas and loops are in [`parameters`] and [`runs`].

mod parameters;
mod runs;
#[cfg(test)]
mod tests;

use std::ops::Range;

use ctq_model::matrix::Code;
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};
use rayon::prelude::*;

use self::parameters::Extremes;
use self::runs::{CodeScale, Multiplier, encode, extremes, requantize};
use crate::Compute;
use crate::backend::{Quantizer, Treatment};
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
    match treatment {
        Treatment::Plain => {
            let shape = (x.rows(), x.width);
            let strips = Strips::of(isa, Unit::floats(isa, compute), shape, &x.values);
            CpuOperand { strips, kind: OperandKind::Values }
        }
        Treatment::FakeQuantized(quantizer) => {
            let unit = Unit::floats(isa, compute);
            let whole = whole_windows(isa, x, quantizer, windows);
            let strips = requantized(isa, x, unit, quantizer, Multiplier::Scale, &whole);
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

/// Extremes of each row's window, where a whole window shares a scale that comes from the data: [rows] or none.
fn whole_windows(isa: Isa, x: &CpuBuffer, quantizer: &Quantizer, windows: &[Range<usize>]) -> Vec<Extremes> {
    let Activation { symmetric, sharing, scale, .. } = quantizer.activation;
    let shared = match sharing {
        ActivationSharing::Tensor => true,
        ActivationSharing::Token | ActivationSharing::Group { .. } | ActivationSharing::Head => false,
    };
    if !shared || scale == ActivationScale::Static {
        return Vec::new();
    }
    debug_assert_eq!(windows.iter().map(Range::len).sum::<usize>(), x.rows(), "every row is in a window");
    let mut found = vec![Extremes::none(symmetric); x.rows()];
    for window in windows {
        let rows = x.values[window.start * x.width..window.end * x.width].par_chunks(x.width.max(1));
        let whole = rows
            .map(|row| {
                let mut found = Extremes::none(symmetric);
                extremes(isa, row, symmetric, &mut found);
                found
            })
            .reduce(|| Extremes::none(symmetric), Extremes::join);
        found[window.clone()].fill(whole);
    }
    found
}

/// Quantizes and dequantizes in place, in f32.
pub(crate) fn fake_quantize(
    isa: Isa,
    x: &mut CpuBuffer,
    quantizer: &Quantizer,
    head_dim: usize,
    windows: &[Range<usize>],
) {
    let width = x.width;
    let whole = whole_windows(isa, x, quantizer, windows);
    let stored_heads = quantizer.scales.len() > 1;
    let length = if stored_heads { head_dim } else { run_length(&quantizer.activation, width, head_dim) };
    x.values.par_chunks_mut(width.max(1)).enumerate().for_each(|(row, values)| {
        requantize(isa, values, quantizer, length, whole.get(row).copied(), Multiplier::Scale);
    });
}

/// Inputs that are quantized and dequantized where they are packed; `whole` as [`whole_windows`] finds it.
fn requantized(
    isa: Isa,
    x: &CpuBuffer,
    unit: Unit,
    quantizer: &Quantizer,
    multiplier: Multiplier,
    whole: &[Extremes],
) -> Strips {
    let width = x.width;
    let length = run_length(&quantizer.activation, width, width);
    Strips::pack(isa, unit, (x.rows(), width), |rows, out| {
        out.copy_from_slice(&x.values[rows.start * width..rows.end * width]);
        for (row, values) in rows.zip(out.chunks_exact_mut(width.max(1))) {
            requantize(isa, values, quantizer, length, whole.get(row).copied(), multiplier);
        }
    })
}

/// Codes and scales as a serving kernel has them.
fn exact(isa: Isa, x: &CpuBuffer, quantizer: &Quantizer, windows: &[Range<usize>]) -> CpuOperand {
    let activation = quantizer.activation;
    let global = match activation.scale {
        ActivationScale::Local => quantizer.global_scale,
        ActivationScale::PowerOfTwo => 1.0,
        ActivationScale::Static | ActivationScale::Dynamic => return codes(isa, x, quantizer, windows),
    };
    let unit = Unit::floats(isa, Compute::Bf16);
    // The code is the library's; what multiplies it is the stored scale alone.
    let strips = requantized(isa, x, unit, quantizer, Multiplier::Stored, &[]);
    CpuOperand { strips, kind: OperandKind::Scaled { activation, global } }
}

/// Integers and fp8: codes, and the scales that their sums are multiplied with.
fn codes(isa: Isa, x: &CpuBuffer, quantizer: &Quantizer, windows: &[Range<usize>]) -> CpuOperand {
    let activation = quantizer.activation;
    let width = x.width;
    let segment = run_length(&activation, width, width);
    let integers = matches!(activation.code, Code::Int { .. });
    let unit = if integers { Unit::integers(isa) } else { Unit::floats(isa, Compute::Bf16) };
    // Bytes are unsigned; the shift is taken back from the sums.
    let shift = if unit == Unit::Quad { 128.0 } else { 0.0 };
    let whole = whole_windows(isa, x, quantizer, windows);
    let mut scales = vec![CodeScale::default(); x.values.len() / segment.max(1)];
    let strips = Strips::pack_beside(isa, unit, (x.rows(), width), &mut scales, |row, out, scales| {
        out.copy_from_slice(&x.values[row * width..(row + 1) * width]);
        encode(isa, out, quantizer, segment, whole.get(row).copied(), shift, scales);
    });
    let offsets = if integers { scales.iter().map(|scale| scale.offset).collect() } else { Vec::new() };
    let scales = scales.iter().map(|scale| scale.scale).collect();
    CpuOperand { strips, kind: OperandKind::Codes(CodeScales { activation, segment, scales, offsets }) }
}
