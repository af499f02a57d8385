//! How codes become operands: which scheme has a short way, of those in `kernels/cuda/operands.cuh`. All ways give the
//! same bits.

use ctq_container::TILE;
use ctq_model::DType;

use crate::cuda::matrix::{CodeClass, CudaMatrix, Rounding, Worth};

/// The largest zero point that leaves 136 plus it a bf16 number.
const LARGEST_ZERO: i8 = 120;

/// Ways to make operands that have kernels of their own: `Format` in hopper_product.cuh, `Arithmetic` in operands.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Int4,
    Int4F32,
    E2m1,
    Int8,
    Int8F32,
    E4m3,
    E4m3F32,
    Bf16,
}

impl Format {
    /// Bytes of a scale in a stage.
    pub(crate) const fn scale_bytes(self) -> usize {
        match self {
            Format::Int4 | Format::Int8 | Format::E4m3 => 2,
            Format::Int4F32 | Format::Int8F32 | Format::E4m3F32 => 4,
            Format::E2m1 => 1,
            Format::Bf16 => 0,
        }
    }

    /// The kernel of this format among `names`, in the order of the formats.
    pub(crate) fn pick(self, names: &[&'static str; 8]) -> &'static str {
        names[self as usize]
    }
}

/// What makes operands of a matrix; `None` where its weights must be decoded before: f16 and f32 codes, weights that are
/// rounded to f16, scales that change inside a k16 slice or at no multiple or divisor of 64 k.
pub(crate) fn format<M>(weight: &CudaMatrix<M>, worth: Worth) -> Option<Format> {
    let group = weight.group_size();
    let whole_stages =
        group >= weight.k || group.is_multiple_of(TILE) || (group >= 16 && TILE.is_multiple_of(group));
    if weight.class() == CodeClass::Bf16 {
        return Some(Format::Bf16);
    }
    if !whole_stages || (worth == Worth::Operand && weight.rounding() == Rounding::F16) {
        return None;
    }
    let small_scales = matches!(weight.scale_dtype, Some(DType::F8E4M3 | DType::U8 | DType::F8E8M0));
    let by_bf16 = weight.scale_dtype == Some(DType::BF16) && worth == Worth::Operand;
    let (none, narrow) = (weight.zeros.is_none(), weight.largest_zero <= LARGEST_ZERO);
    match weight.class() {
        CodeClass::Int4 if by_bf16 && narrow => Some(Format::Int4),
        CodeClass::Int4 => Some(Format::Int4F32),
        CodeClass::E2m1 if small_scales && none => Some(Format::E2m1),
        CodeClass::Int8 if by_bf16 && none => Some(Format::Int8),
        CodeClass::Int8 => Some(Format::Int8F32),
        CodeClass::E4m3 if by_bf16 && none => Some(Format::E4m3),
        CodeClass::E4m3 if none => Some(Format::E4m3F32),
        CodeClass::E2m1 | CodeClass::E4m3 | CodeClass::F16 | CodeClass::F32 => None,
        CodeClass::Bf16 => Some(Format::Bf16),
    }
}
