//! The way back: which original tensors a matrix holds, and their bytes. What does not come back byte for byte is found
//! out by comparing, and kept beside the tiles.

use std::borrow::Cow;

use ctq_model::inventory::Linear;
use ctq_model::matrix::{Formula, Sharing};
use ctq_model::scheme::ZeroStorage;
use ctq_model::{DType, QuantMatrix};

use super::{act_order, pack, zeros};

/// A tensor of a linear that says something about its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaf {
    /// `weight` or `weight_packed`.
    Codes,
    /// `weight_scale`.
    Scales,
    /// `weight_zero_point`.
    Zeros,
    /// `weight_g_idx`.
    GroupIndex,
    /// `weight_shape`.
    Shape,
    /// `weight_global_scale`.
    GlobalScale,
}

impl Leaf {
    /// Of the last segment of a tensor's name; `None` for a bias and for the scales of activations, which no matrix
    /// holds.
    pub fn of(segment: &str) -> Option<Leaf> {
        match segment {
            "weight" | "weight_packed" => Some(Leaf::Codes),
            "weight_scale" => Some(Leaf::Scales),
            "weight_zero_point" => Some(Leaf::Zeros),
            "weight_g_idx" => Some(Leaf::GroupIndex),
            "weight_shape" => Some(Leaf::Shape),
            "weight_global_scale" => Some(Leaf::GlobalScale),
            _ => None,
        }
    }
}

/// The bytes of a tensor as far as the matrix of `linear` knows them; `dtype` is that of the original tensor.
///
/// `None` where the matrix holds nothing of it: zero points that a symmetric scheme does not use, group indices that
/// order nothing, a shape in a foreign type.
pub fn regenerate<'a>(
    matrix: &'a QuantMatrix,
    linear: &Linear,
    leaf: Leaf,
    dtype: DType,
) -> Option<Cow<'a, [u8]>> {
    let scheme = &linear.scheme;
    match leaf {
        Leaf::Codes => match matrix.formula {
            Formula::Dense => Some(Cow::Borrowed(&matrix.codes)),
            Formula::Affine | Formula::Nvfp4 | Formula::Mx => Some(Cow::Owned(pack(matrix, scheme.storage))),
        },
        Leaf::Scales => matrix.scales.as_ref().map(|scales| Cow::Borrowed(&scales.bytes[..])),
        Leaf::Zeros => match scheme.zeros {
            ZeroStorage::None => None,
            ZeroStorage::Plain | ZeroStorage::PackedRows => {
                let shape = scheme.sharing.shape(matrix.n, matrix.k);
                zeros::write(matrix.zeros.as_ref()?, scheme.storage, scheme.zeros, shape).map(Cow::Owned)
            }
        },
        Leaf::GroupIndex => match scheme.sharing {
            Sharing::Group { size } if scheme.act_order => {
                Some(Cow::Owned(act_order::restore(matrix.permutation.as_deref(), size, matrix.k)))
            }
            Sharing::Group { .. } | Sharing::Tensor | Sharing::Channel | Sharing::Block { .. } => None,
        },
        Leaf::Shape => shape(matrix, dtype).map(Cow::Owned),
        Leaf::GlobalScale => matrix.global_scale.map(|bits| Cow::Owned(bits.to_le_bytes().to_vec())),
    }
}

fn shape(matrix: &QuantMatrix, dtype: DType) -> Option<Vec<u8>> {
    let sides = [matrix.n as u64, matrix.k as u64];
    match dtype {
        DType::I64 => Some(sides.iter().flat_map(|side| side.to_le_bytes()).collect()),
        DType::I32 => Some(sides.iter().flat_map(|side| (*side as u32).to_le_bytes()).collect()),
        DType::Bool
        | DType::U8
        | DType::I8
        | DType::U16
        | DType::I16
        | DType::U32
        | DType::U64
        | DType::F8E4M3
        | DType::F8E5M2
        | DType::F8E8M0
        | DType::F16
        | DType::BF16
        | DType::F32
        | DType::F64 => None,
    }
}
