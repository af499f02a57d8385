//! Fake quantization of activations as compressed-tensors computes it, in f32, operation by operation.
//!
//! Spec 3.1 to 3.6 with xd = f32; in the library `forward_quantize`, `calculate_qparams`, `fake_quantize` and
//! `generate_mx_scales`. Knows arithmetic; does not know where a scale is stored or which module it serves.
//! Bits, not only values: a dynamic scheme adds a zero point of zero, which turns -0 into +0; a static symmetric one
//! does not.

use ctq_model::matrix::Code;
use ctq_model::scheme::{Activation, ActivationSharing};
use ndarray::Array2;

use crate::number::{power_of_two, round_e2m1, round_e4m3};
use crate::{Error, Result};

/// Where a scale comes from, with what the checkpoint stores for it.
#[derive(Clone, Debug, PartialEq)]
pub enum ScaleSource {
    /// Stored: one scale, or one for each head, upcast to f32; zero points likewise where the scheme is asymmetric.
    Static {
        /// One, or one a head.
        scales: Vec<f32>,
        /// As many as scales.
        zeros: Option<Vec<f32>>,
    },
    /// From the data, in f32.
    Dynamic,
    /// From the data, rounded to fp8 under this stored factor (NVFP4).
    Local {
        /// `input_global_scale`.
        global: f32,
    },
    /// From the data, a power of two (MX).
    PowerOfTwo,
}

/// Features of one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenShape {
    /// All of them.
    pub width: usize,
    /// Heads they are made of, head after head; 1 for the input of a linear.
    pub heads: usize,
}

/// Fake quantization by one scheme.
#[derive(Clone, Debug)]
pub struct Quantizer {
    grid: Grid,
    symmetric: bool,
    source: ScaleSource,
    unit: Unit,
}

/// Consecutive elements of a row-major [tokens, width] matrix that share a scale.
#[derive(Clone, Copy, Debug)]
enum Unit {
    All,
    Elements(usize),
}

/// The numbers a code can stand for.
#[derive(Clone, Copy, Debug)]
enum Grid {
    Int { bits: u8 },
    E4m3,
    E2m1,
}

impl Quantizer {
    /// Prepares the quantization of [tokens, `shape.width`] matrices; `module` is named in messages.
    ///
    /// # Errors
    /// Where the scheme has no meaning for such a matrix.
    pub fn new(
        module: &str,
        activation: &Activation,
        source: ScaleSource,
        shape: TokenShape,
    ) -> Result<Quantizer> {
        let wrong = |what: String| Error::Activation { module: module.to_owned(), what };
        let TokenShape { width, heads } = shape;
        let grid = Grid::of(activation.code)
            .ok_or_else(|| wrong(format!("codes of type {:?} quantize nothing", activation.code)))?;
        let unit = match (activation.sharing, &source) {
            (_, ScaleSource::Static { scales, zeros }) => {
                if scales.len() != 1 && scales.len() != heads {
                    return Err(wrong(format!("{} scales for {heads} heads", scales.len())));
                }
                if zeros.as_ref().is_some_and(|zeros| zeros.len() != scales.len()) {
                    return Err(wrong("scales and zero points differ in number".to_owned()));
                }
                Unit::Elements(width / scales.len())
            }
            (ActivationSharing::Tensor, _) => Unit::All,
            (ActivationSharing::Token, _) => Unit::Elements(width),
            (ActivationSharing::Head, _) => Unit::Elements(width / heads),
            (ActivationSharing::Group { size }, _) => {
                if !(width / heads).is_multiple_of(size) {
                    return Err(wrong(format!("groups of {size} do not divide {} features", width / heads)));
                }
                Unit::Elements(size)
            }
        };
        Ok(Quantizer { grid, symmetric: activation.symmetric, source, unit })
    }

    /// Replaces every element of the [tokens, width] matrix by what its code stands for.
    pub fn apply(&self, x: &mut Array2<f32>) {
        if x.is_empty() {
            return;
        }
        let mut standard = x.as_standard_layout().into_owned();
        let elements = standard.as_slice_mut().expect("standard layout is contiguous");
        let size = match self.unit {
            Unit::All => elements.len(),
            Unit::Elements(size) => size,
        };
        for (index, unit) in elements.chunks_exact_mut(size).enumerate() {
            let (scale, zero) = self.parameters(index, unit);
            self.grid.fake_quantize(unit, scale, zero);
        }
        *x = standard;
    }

    /// Scale and zero point of one unit. `None` where the library has no zero point to add.
    fn parameters(&self, index: usize, unit: &[f32]) -> (f32, Option<f32>) {
        let (low, high) = range(unit);
        let largest = low.abs().max(high.abs());
        match &self.source {
            ScaleSource::Static { scales, zeros } => {
                let at = index % scales.len();
                (scales[at], zeros.as_ref().map(|zeros| zeros[at]))
            }
            ScaleSource::Dynamic if self.symmetric => {
                (or_if_zero(largest / self.grid.half_range(), f32::EPSILON), Some(0.0))
            }
            ScaleSource::Dynamic => {
                let (bottom, top) = self.grid.bounds();
                let scale = (high - low) / (top - bottom);
                let zero = (bottom - low / scale).clamp(bottom, top).round_ties_even();
                // Nothing but zeros: 0 / 0, which the library's cast to int8 makes 0.
                let zero = if zero.is_nan() { 0.0 } else { zero };
                (or_if_zero(scale, f32::EPSILON), Some(zero))
            }
            ScaleSource::Local { global } => {
                let scale = global * (largest / self.grid.half_range());
                let scale = round_e4m3(scale.clamp(-448.0, 448.0));
                (or_if_zero(scale, 0.125) / global, Some(0.0))
            }
            ScaleSource::PowerOfTwo => (self.grid.power_of_two_scale(largest), Some(0.0)),
        }
    }
}

/// Smallest and largest element, zero included: zero must always have a code.
fn range(unit: &[f32]) -> (f32, f32) {
    unit.iter().fold((0.0, 0.0), |(low, high): (f32, f32), value| (low.min(*value), high.max(*value)))
}

/// The library's guard against dividing by zero.
fn or_if_zero(scale: f32, substitute: f32) -> f32 {
    if scale == 0.0 { substitute } else { scale }
}

impl Grid {
    fn of(code: Code) -> Option<Grid> {
        match code {
            Code::Int { bits } => Some(Grid::Int { bits }),
            Code::E4m3 => Some(Grid::E4m3),
            Code::E2m1 => Some(Grid::E2m1),
            Code::Bf16 | Code::F16 | Code::F32 => None,
        }
    }

    /// Smallest and largest code; symmetric integers use the full range too.
    fn bounds(self) -> (f32, f32) {
        match self {
            Grid::Int { bits } => {
                let half = power_of_two(i32::from(bits) - 1);
                (-half, half - 1.0)
            }
            Grid::E4m3 => (-448.0, 448.0),
            Grid::E2m1 => (-6.0, 6.0),
        }
    }

    /// What the largest magnitude is divided by: 127.5 for int8.
    fn half_range(self) -> f32 {
        let (low, high) = self.bounds();
        (high - low) / 2.0
    }

    fn round(self, value: f32) -> f32 {
        match self {
            Grid::Int { .. } => value.round_ties_even(),
            Grid::E4m3 => round_e4m3(value),
            Grid::E2m1 => round_e2m1(value),
        }
    }

    /// Spec 3.1: every line rounds to f32.
    fn fake_quantize(self, unit: &mut [f32], scale: f32, zero: Option<f32>) {
        let (low, high) = self.bounds();
        for value in unit {
            let mut scaled = *value / scale;
            if let Some(zero) = zero {
                scaled += zero;
            }
            let mut code = self.round(scaled.clamp(low, high));
            if let Some(zero) = zero {
                code -= zero;
            }
            *value = code * scale;
        }
    }

    /// Spec 3.2, MX: the largest magnitude rounded to a power of two, up from a mantissa of 1.75, then divided by the
    /// power of two below the grid's largest number; held in the range of E8M0.
    fn power_of_two_scale(self, largest: f32) -> f32 {
        const BUMP: u32 = 1 << 21;
        let below_largest_code = match self {
            Grid::E2m1 => 2,
            Grid::E4m3 => 8,
            // The library has no MX integers; the power below the largest code is what the name would mean.
            Grid::Int { bits } => i32::from(bits) - 2,
        };
        let exponent = ((largest.to_bits() + BUMP) >> 23) as i32 - below_largest_code;
        power_of_two(exponent.clamp(0, 255) - 127)
    }
}
