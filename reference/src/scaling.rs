//! From codes to weights: scales and zero points, and the formula that applies them to one row.
//!
//! Every rounding is one that compressed-tensors makes (spec 2.1, 2.6, 2.7, 2.9). Knows nothing of how codes are
//! stored.

use ctq_model::inventory::Linear;
use ctq_model::matrix::{Formula, Sharing};
use ctq_model::scheme::{Storage, WordLayout, ZeroStorage};
use ctq_model::{DType, Error as ModelError, TensorSource};

use crate::Result;
use crate::codes::unpack;
use crate::number::{e4m3, e8m0, round_bf16, round_f16};
use crate::stored;

/// What turns a row of codes into a row of weights.
pub(crate) enum Scaling {
    /// The code is the weight.
    None,
    /// `RN((code - zero) * scale)`, rounded to `dtype`, the scale's own.
    Affine { scales: Table, zeros: Option<Vec<f32>>, dtype: DType },
    /// `RN_bf16(code * scale)`; for NVFP4 the scale is the quotient of the stored one and the global one.
    Bf16 { scales: Table },
}

/// One number for each set of elements that share a scale.
pub(crate) struct Table {
    values: Vec<f32>,
    sharing: Sharing,
    /// Entries a row of the table.
    columns: usize,
    /// Group of each column where act-order scattered them; `None`: `k / size`.
    groups: Option<Vec<u32>>,
}

impl Table {
    /// Where in the table the scale of element (n, k) is. Spec 2.2.
    fn index(&self, n: usize, k: usize) -> usize {
        match self.sharing {
            Sharing::Tensor => 0,
            Sharing::Channel => n,
            Sharing::Group { size } => {
                let group = self.groups.as_ref().map_or(k / size, |groups| groups[k] as usize);
                n * self.columns + group
            }
            Sharing::Block { rows, columns } => n / rows * self.columns + k / columns,
        }
    }
}

impl Scaling {
    /// Reads the scales and zero points of `linear`.
    ///
    /// # Errors
    /// Where one is missing, or its size or dtype contradicts the scheme.
    pub(crate) fn open(source: &dyn TensorSource, linear: &Linear) -> Result<Scaling> {
        let scheme = &linear.scheme;
        let (rows, columns) = scheme.sharing.shape(linear.n, linear.k);
        let name = format!("{}.weight_scale", linear.module);
        let table = |values: Vec<f32>, groups: Option<Vec<u32>>| Table {
            values,
            sharing: scheme.sharing,
            columns,
            groups,
        };
        match scheme.storage.formula() {
            Formula::Dense => Ok(Scaling::None),
            Formula::Affine => {
                let values = stored::floats(source, &name, rows * columns)?;
                let scales = table(values, groups(source, linear, columns)?);
                let zeros = zeros(source, linear, (rows, columns))?;
                Ok(Scaling::Affine { scales, zeros, dtype: scheme.operand_dtype() })
            }
            Formula::Nvfp4 => {
                let global = format!("{}.weight_global_scale", linear.module);
                let divisor = stored::floats(source, &global, 1)?[0];
                let codes = stored::of_dtype(source, &name, rows * columns, &[DType::F8E4M3])?;
                // A division in f32: the reciprocal's product has other bits.
                let values = codes.bytes.iter().map(|code| e4m3(*code) / divisor).collect();
                Ok(Scaling::Bf16 { scales: table(values, None) })
            }
            Formula::Mx => {
                let codes = stored::of_dtype(source, &name, rows * columns, &[DType::U8, DType::F8E8M0])?;
                // The library holds the power of two as bf16, which loses nothing.
                let values = codes.bytes.iter().map(|code| e8m0(*code)).collect();
                Ok(Scaling::Bf16 { scales: table(values, None) })
            }
        }
    }

    /// Turns the codes of row `n` into weights, in place.
    pub(crate) fn apply(&self, n: usize, row: &mut [f32]) {
        match self {
            Scaling::None => {}
            Scaling::Affine { scales, zeros, dtype } => {
                let round = rounding(*dtype);
                for (k, value) in row.iter_mut().enumerate() {
                    let at = scales.index(n, k);
                    // The library rounds the difference too, but codes and zero points of at most 8 bits, and their
                    // differences, are exact in every scale dtype.
                    let zero = zeros.as_ref().map_or(0.0, |zeros| zeros[at]);
                    let code = if zeros.is_some() { *value - zero } else { *value };
                    *value = round(code * scales.values[at]);
                }
            }
            Scaling::Bf16 { scales } => {
                for (k, value) in row.iter_mut().enumerate() {
                    *value = round_bf16(*value * scales.values[scales.index(n, k)]);
                }
            }
        }
    }
}

/// Rounding of an f32 product to the dtype of the scales.
fn rounding(dtype: DType) -> fn(f32) -> f32 {
    match dtype {
        DType::BF16 => round_bf16,
        DType::F16 => round_f16,
        DType::F32
        | DType::Bool
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
        | DType::F64 => |value| value,
    }
}

/// Group of each column: `weight_g_idx`, looked up directly (spec 2.4).
fn groups(source: &dyn TensorSource, linear: &Linear, columns: usize) -> Result<Option<Vec<u32>>> {
    if !linear.scheme.act_order {
        return Ok(None);
    }
    let name = format!("{}.weight_g_idx", linear.module);
    let groups = stored::words(source, &name, linear.k)?;
    match groups.iter().find(|group| **group as usize >= columns) {
        None => Ok(Some(groups)),
        Some(group) => Err(ModelError::tensor(
            source.file_of(&name),
            &name,
            format!("names group {group}, and there are {columns}"),
            "download the checkpoint again, or write it again with the quantizer",
        )
        .into()),
    }
}

/// Zero points in the order of the scales, [rows, columns].
fn zeros(
    source: &dyn TensorSource,
    linear: &Linear,
    (rows, columns): (usize, usize),
) -> Result<Option<Vec<f32>>> {
    let name = format!("{}.weight_zero_point", linear.module);
    match (linear.scheme.zeros, linear.scheme.storage) {
        (ZeroStorage::None, _) => Ok(None),
        (ZeroStorage::PackedRows, Storage::PackedInt { bits, layout }) => {
            packed_zeros(source, &name, (bits, layout), (rows, columns)).map(Some)
        }
        (
            ZeroStorage::Plain | ZeroStorage::PackedRows,
            Storage::PackedInt { .. }
            | Storage::PlainInt { .. }
            | Storage::PlainFp8
            | Storage::Dense { .. }
            | Storage::Nvfp4
            | Storage::Mxfp4
            | Storage::Mxfp8,
        ) => {
            let zeros = stored::signed_bytes(source, &name, rows * columns)?;
            Ok(Some(zeros.into_iter().map(f32::from).collect()))
        }
    }
}

/// Zero points packed along the rows: words [words, columns], the layout of the codes.
fn packed_zeros(
    source: &dyn TensorSource,
    name: &str,
    (bits, layout): (u8, WordLayout),
    (rows, columns): (usize, usize),
) -> Result<Vec<f32>> {
    let words = stored::words(source, name, layout.words(bits, rows) * columns)?;
    let mut zeros = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        for column in 0..columns {
            let word = |at: usize| words.get(at * columns + column).copied().unwrap_or(0);
            zeros.push(unpack(word, bits, layout, row) as f32);
        }
    }
    Ok(zeros)
}
