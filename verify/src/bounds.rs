//! How far apart runtime and reference may be. All bounds of `verify`, in one place.
//!
//! The runtime computes in f32, the reference in f64. A plain f32 chain leaves about 1e-6 after a layer; an error in
//! a formula, a scale or a layout leaves 1e-3 or more. The bounds stand between the two.

/// Relative error (Frobenius) of a layer's output, activations not quantized, compute f32.
pub const LAYER: f64 = 1e-5;

/// Relative error of a position's output, the median of all positions, activations quantized.
///
/// Rounding is discontinuous: one activation within 1e-7 of a boundary moves its position by 1e-3, so single
/// positions prove nothing and the median does.
pub const LAYER_MEDIAN: f64 = 2e-3;

/// Where the median is beyond [`LAYER_MEDIAN`]: its largest share of what quantizing activations changes at all.
///
/// A dynamic int8 scale puts the largest value of every token on a rounding boundary, so each token has a code that may
/// fall on either side. In a layer of 64 inputs that one code is up to eight tenths of all rounding; activations that
/// were not quantized at all are the whole of it.
pub const FLIP_SHARE: f64 = 0.9;

/// Relative error (Frobenius) of free-running logits, activations not quantized.
pub const LOGITS: f64 = 1e-4;

/// Difference of the mean nll of free-running logits, activations not quantized: nats, or a share of the mean where
/// that is above 1.
pub const NLL: f64 = 1e-5;
