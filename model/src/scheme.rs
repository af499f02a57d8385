//! How one linear is stored and how its activations are quantized.
//!
//! Names the kinds; which of them a module is, is found out in the private module `resolve`. Computes nothing with the
//! values.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::DType;
use crate::matrix::{Code, Formula, Sharing};

/// Scheme of one linear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheme {
    /// How codes lie in the checkpoint.
    pub storage: Storage,
    /// Which codes share a scale; [`Sharing::Tensor`] for dense weights.
    pub sharing: Sharing,
    /// Dtype of the stored scales; `None` for dense weights.
    pub scale_dtype: Option<DType>,
    /// How zero points are stored.
    pub zeros: ZeroStorage,
    /// Whether `weight_g_idx` orders the columns.
    pub act_order: bool,
    /// Quantization of the inputs.
    pub input: Option<Activation>,
    /// Quantization of the outputs.
    pub output: Option<Activation>,
}

/// How codes lie in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Storage {
    /// `weight` in a float type.
    Dense {
        /// BF16, F16 or F32.
        dtype: DType,
    },
    /// `weight_packed` I32: `bits`-wide offset-binary integers.
    PackedInt {
        /// Bits of one integer.
        bits: u8,
        /// How integers share words.
        layout: WordLayout,
    },
    /// `weight` I8: one integer a byte, of which `bits` are used.
    PlainInt {
        /// Bits that the scheme uses.
        bits: u8,
    },
    /// `weight` F8_E4M3 with float scales.
    PlainFp8,
    /// `weight_packed` U8 with fp8 scales and a global scale.
    Nvfp4,
    /// `weight_packed` U8 with E8M0 scales.
    Mxfp4,
    /// `weight` F8_E4M3 with E8M0 scales.
    Mxfp8,
}

/// How integers share the 32-bit words of a row; the two agree for 1, 2, 4 and 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WordLayout {
    /// A bit string: values may straddle words (compressed-tensors since mid-2026).
    Dense,
    /// `floor(32 / bits)` values a word, the top bits unused (before).
    Padded,
}

impl WordLayout {
    /// Words that `count` values of `bits` take.
    pub const fn words(self, bits: u8, count: usize) -> usize {
        match self {
            WordLayout::Dense => (count * bits as usize).div_ceil(32),
            WordLayout::Padded => count.div_ceil(32 / bits as usize),
        }
    }
}

/// How zero points are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroStorage {
    /// None, or zeros that a symmetric scheme does not use.
    None,
    /// One I8 a scale.
    Plain,
    /// I32 words, packed along the rows.
    PackedRows,
}

/// How an activation is quantized before (or after) a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activation {
    /// What a code stands for: [`Code::Int`], [`Code::E4m3`] or [`Code::E2m1`].
    pub code: Code,
    /// Whether codes are centred on zero without a zero point.
    pub symmetric: bool,
    /// Which elements share a scale.
    pub sharing: ActivationSharing,
    /// Where the scale comes from.
    pub scale: ActivationScale,
}

/// Which elements of an activation share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationSharing {
    /// All of a window.
    Tensor,
    /// One token.
    Token,
    /// `size` consecutive elements of a token.
    Group {
        /// Elements that share a scale.
        size: usize,
    },
    /// One head of a token's keys, values or queries.
    Head,
}

/// Where an activation's scale comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationScale {
    /// Stored beside the module.
    Static,
    /// From the data, in f32.
    Dynamic,
    /// From the data, rounded to fp8 under a stored global scale (NVFP4).
    Local,
    /// From the data, a power of two (MX).
    PowerOfTwo,
}

impl Storage {
    /// What a code stands for.
    pub const fn code(self) -> Code {
        match self {
            Storage::Dense { dtype: DType::F16 } => Code::F16,
            Storage::Dense { dtype: DType::F32 } => Code::F32,
            Storage::Dense { .. } => Code::Bf16,
            Storage::PackedInt { bits, .. } | Storage::PlainInt { bits } => Code::Int { bits },
            Storage::PlainFp8 | Storage::Mxfp8 => Code::E4m3,
            Storage::Nvfp4 | Storage::Mxfp4 => Code::E2m1,
        }
    }

    /// How code and scale make a weight.
    pub const fn formula(self) -> Formula {
        match self {
            Storage::Dense { .. } => Formula::Dense,
            Storage::PackedInt { .. } | Storage::PlainInt { .. } | Storage::PlainFp8 => Formula::Affine,
            Storage::Nvfp4 => Formula::Nvfp4,
            Storage::Mxfp4 | Storage::Mxfp8 => Formula::Mx,
        }
    }

    /// The tensor that holds the codes.
    pub const fn leaf(self) -> &'static str {
        match self {
            Storage::Dense { .. } | Storage::PlainInt { .. } | Storage::PlainFp8 | Storage::Mxfp8 => "weight",
            Storage::PackedInt { .. } | Storage::Nvfp4 | Storage::Mxfp4 => "weight_packed",
        }
    }
}

impl Scheme {
    /// Dtype of the decompressed weight, as compressed-tensors yields it.
    pub fn operand_dtype(&self) -> DType {
        match self.storage.formula() {
            Formula::Dense => match self.storage {
                Storage::Dense { dtype } => dtype,
                Storage::PackedInt { .. }
                | Storage::PlainInt { .. }
                | Storage::PlainFp8
                | Storage::Nvfp4
                | Storage::Mxfp4
                | Storage::Mxfp8 => DType::BF16,
            },
            Formula::Affine => self.scale_dtype.unwrap_or(DType::BF16),
            Formula::Nvfp4 | Formula::Mx => DType::BF16,
        }
    }

    /// True where inputs or outputs are quantized.
    pub fn quantizes_activations(&self) -> bool {
        self.input.is_some() || self.output.is_some()
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.storage {
            Storage::Dense { dtype } => write!(f, "{}", dtype.name().to_lowercase())?,
            Storage::PackedInt { bits, .. } | Storage::PlainInt { bits } => {
                write!(f, "int{bits} {}", self.sharing)?;
                if self.zeros != ZeroStorage::None {
                    f.write_str(" asym")?;
                }
                if self.act_order {
                    f.write_str(" act-order")?;
                }
            }
            Storage::PlainFp8 => write!(f, "fp8 {}", self.sharing)?,
            Storage::Nvfp4 => f.write_str("nvfp4")?,
            Storage::Mxfp4 => f.write_str("mxfp4")?,
            Storage::Mxfp8 => f.write_str("mxfp8")?,
        }
        if let Some(input) = &self.input {
            write!(f, ", inputs {input}")?;
        }
        if let Some(output) = &self.output {
            write!(f, ", outputs {output}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sharing::Tensor => f.write_str("tensor"),
            Sharing::Channel => f.write_str("channel"),
            Sharing::Group { size } => write!(f, "g{size}"),
            Sharing::Block { rows, columns } => write!(f, "block {rows}x{columns}"),
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.scale, self.code) {
            (ActivationScale::Local, _) => return f.write_str("nvfp4"),
            (ActivationScale::PowerOfTwo, Code::E2m1) => return f.write_str("mxfp4"),
            (ActivationScale::PowerOfTwo, _) => return f.write_str("mxfp8"),
            (ActivationScale::Static | ActivationScale::Dynamic, _) => {}
        }
        match self.code {
            Code::Int { bits } => write!(f, "int{bits}")?,
            Code::E2m1 => f.write_str("fp4")?,
            Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => f.write_str("fp8")?,
        }
        match self.sharing {
            ActivationSharing::Tensor => f.write_str(" tensor")?,
            ActivationSharing::Token => f.write_str(" token")?,
            ActivationSharing::Group { size } => write!(f, " g{size}")?,
            ActivationSharing::Head => f.write_str(" head")?,
        }
        if !self.symmetric {
            f.write_str(" asym")?;
        }
        f.write_str(match self.scale {
            ActivationScale::Static => " static",
            ActivationScale::Dynamic | ActivationScale::Local | ActivationScale::PowerOfTwo => " dynamic",
        })
    }
}
