//! The waist between the format side and the tile side: one linear's codes, scales and zeros, unpacked and untiled.
//!
//! Plain data: what the values *mean* is computed by the kernels, and independently by the reference.

use serde::{Deserialize, Serialize};

use crate::DType;

/// What one stored code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Code {
    /// A signed integer of `1..=8` bits, kept as `value + 2^(bits-1)`.
    Int {
        /// Bits of the integer.
        bits: u8,
    },
    /// fp8 E4M3 (fn): 1-4-3, bias 7, no infinity, 0x7f and 0xff are NaN.
    E4m3,
    /// fp4 E2M1: 1-2-1, magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6.
    E2m1,
    /// An unquantized bf16 number.
    Bf16,
    /// An unquantized f16 number.
    F16,
    /// An unquantized f32 number.
    F32,
}

impl Code {
    /// Bits that one code takes in a tile: the next of 4, 8, 16 and 32.
    pub const fn tile_bits(self) -> usize {
        match self {
            Code::Int { bits } if bits <= 4 => 4,
            Code::E2m1 => 4,
            Code::Int { .. } | Code::E4m3 => 8,
            Code::Bf16 | Code::F16 => 16,
            Code::F32 => 32,
        }
    }

    /// Bytes that one code takes in [`QuantMatrix::codes`].
    pub const fn unpacked_bytes(self) -> usize {
        match self {
            Code::Int { .. } | Code::E2m1 | Code::E4m3 => 1,
            Code::Bf16 | Code::F16 => 2,
            Code::F32 => 4,
        }
    }
}

/// Which codes share a scale. `k` is the reduction axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// The whole matrix: one scale.
    Tensor,
    /// A row: one scale each.
    Channel,
    /// `size` consecutive k of a row: [rows, ceil(k / size)] scales.
    Group {
        /// Codes along k that share a scale.
        size: usize,
    },
    /// A rectangle: [ceil(n / rows), ceil(k / columns)] scales.
    Block {
        /// Rows of the rectangle.
        rows: usize,
        /// Columns of the rectangle.
        columns: usize,
    },
}

impl Sharing {
    /// Shape of the scales of an `n` x `k` matrix.
    pub const fn shape(self, n: usize, k: usize) -> (usize, usize) {
        match self {
            Sharing::Tensor => (1, 1),
            Sharing::Channel => (n, 1),
            Sharing::Group { size } => (n, k.div_ceil(size)),
            Sharing::Block { rows, columns } => (n.div_ceil(rows), k.div_ceil(columns)),
        }
    }
}

/// How a weight is made from a code and its scale; each formula is bit for bit that of compressed-tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Formula {
    /// The code is the weight.
    Dense,
    /// `round(( code - zero ) * scale)`, rounded to the scale's own dtype.
    Affine,
    /// `round_bf16( code * (scale / global) )`, scale fp8, global f32, quotient and product rounded to f32 before.
    Nvfp4,
    /// `round_bf16( code * 2^(scale - 127) )`.
    Mx,
}

/// Scales as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    /// BF16, F16 or F32 for [`Formula::Affine`]; F8_E4M3 for NVFP4; U8 for MX.
    pub dtype: DType,
    /// Which codes share one.
    pub sharing: Sharing,
    /// Little-endian bytes in the order of [`Sharing::shape`], row-major.
    pub bytes: Vec<u8>,
}

/// One linear's weight, unpacked and untiled: `n` output rows by `k` inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantMatrix {
    /// Output rows.
    pub n: usize,
    /// Inputs, the reduction axis.
    pub k: usize,
    /// What a code stands for.
    pub code: Code,
    /// How code and scale make a weight.
    pub formula: Formula,
    /// Row-major `n * k` codes of [`Code::unpacked_bytes`] little-endian bytes; columns in the order of `permutation`.
    pub codes: Vec<u8>,
    /// Scales; `None` for dense weights.
    pub scales: Option<Scales>,
    /// Zero points in the order of the scales, as signed integers; `None` where all are zero by definition.
    pub zeros: Option<Vec<i8>>,
    /// Divisor of the scales ([`Formula::Nvfp4`]), as the bits of an f32.
    pub global_scale: Option<u32>,
    /// Column `j` of `codes` is input `permutation[j]`: act-order, which makes groups consecutive. `None`: in order.
    pub permutation: Option<Vec<u32>>,
}
