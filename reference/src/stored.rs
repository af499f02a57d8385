//! Tensors as stored: looked up by name, held against the number of elements expected, turned into numbers.
//!
//! Knows bytes and dtypes; does not know what a tensor is for.

use ctq_model::{DType, Error as ModelError, Tensor, TensorSource};
use half::{bf16, f16};

use crate::Result;

const DAMAGED: &str = "download the checkpoint again, or write it again with the quantizer";

/// The tensor `name` of `elements` elements, in any shape: scales come as [N], [N, 1], [1] and [].
///
/// # Errors
/// Where it is missing, or holds another number of elements or bytes.
pub(crate) fn tensor<'a>(source: &'a dyn TensorSource, name: &str, elements: usize) -> Result<Tensor<'a>> {
    let tensor = source
        .tensor(name)?
        .ok_or_else(|| ModelError::missing(source.root(), name, "the scheme of its module needs it"))?;
    let found = tensor.elements();
    if found != elements {
        let what = format!("shape {:?} holds {found} elements where {elements} are expected", tensor.shape);
        return Err(ModelError::tensor(tensor.file, name, what, DAMAGED).into());
    }
    let bytes = elements * tensor.dtype.bytes();
    if tensor.bytes.len() != bytes {
        let what = format!("{} bytes where {bytes} are expected", tensor.bytes.len());
        return Err(ModelError::tensor(tensor.file, name, what, DAMAGED).into());
    }
    Ok(tensor)
}

/// The numbers of a BF16, F16 or F32 tensor, in its order. Exact.
///
/// # Errors
/// As [`tensor()`], and where the dtype is another.
pub(crate) fn floats(source: &dyn TensorSource, name: &str, elements: usize) -> Result<Vec<f32>> {
    let tensor = tensor(source, name, elements)?;
    match dense_floats(tensor.dtype, &tensor.bytes) {
        Some(values) => Ok(values),
        None => {
            let what = format!("dtype {} where BF16, F16 or F32 is expected", tensor.dtype);
            Err(ModelError::tensor(tensor.file, name, what, DAMAGED).into())
        }
    }
}

/// The elements of an I8 tensor.
///
/// # Errors
/// As [`tensor()`], and where the dtype is another.
pub(crate) fn signed_bytes(source: &dyn TensorSource, name: &str, elements: usize) -> Result<Vec<i8>> {
    let tensor = of_dtype(source, name, elements, &[DType::I8])?;
    Ok(tensor.bytes.iter().map(|byte| *byte as i8).collect())
}

/// The elements of an I32 tensor as unsigned words.
///
/// # Errors
/// As [`tensor()`], and where the dtype is another.
pub(crate) fn words(source: &dyn TensorSource, name: &str, elements: usize) -> Result<Vec<u32>> {
    let tensor = of_dtype(source, name, elements, &[DType::I32])?;
    Ok(tensor.bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// A tensor of one of `dtypes`.
///
/// # Errors
/// As [`tensor()`], and where the dtype is another.
pub(crate) fn of_dtype<'a>(
    source: &'a dyn TensorSource,
    name: &str,
    elements: usize,
    dtypes: &[DType],
) -> Result<Tensor<'a>> {
    let tensor = tensor(source, name, elements)?;
    if dtypes.contains(&tensor.dtype) {
        return Ok(tensor);
    }
    let expected: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
    let what = format!("dtype {} where {} is expected", tensor.dtype, expected.join(" or "));
    Err(ModelError::tensor(tensor.file, name, what, DAMAGED).into())
}

/// Little-endian BF16, F16 or F32 as f32, `None` for every other dtype.
pub(crate) fn dense_floats(dtype: DType, bytes: &[u8]) -> Option<Vec<f32>> {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        DType::BF16 => Some(pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect()),
        DType::F16 => Some(pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect()),
        DType::F32 => {
            Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        DType::Bool
        | DType::U8
        | DType::I8
        | DType::U16
        | DType::I16
        | DType::U32
        | DType::I32
        | DType::U64
        | DType::I64
        | DType::F8E4M3
        | DType::F8E5M2
        | DType::F8E8M0
        | DType::F64 => None,
    }
}
