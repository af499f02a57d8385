//! How many bytes a matrix takes in a part file, and what its metadata says of it. Knows lengths, not values.

use ctq_model::DType;
use ctq_model::inventory::Linear;
use ctq_model::matrix::{Code, Formula, Sharing};
use ctq_model::scheme::ZeroStorage;
use serde::{Deserialize, Serialize};

use crate::tiling::TILE;
use crate::{ScaleTable, TiledMatrix, Tiling};

/// Shape, meaning and true byte lengths of one matrix, as a part file's metadata states them. A length of 0: absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MatrixRecord {
    /// Output rows.
    pub n: usize,
    /// Inputs, the reduction axis.
    pub k: usize,
    /// Rows, and k, of a tile.
    pub tile: usize,
    /// What a code stands for.
    pub code: Code,
    /// How code and scale make a weight.
    pub formula: Formula,
    /// Which codes share a scale; `None` for dense weights.
    pub sharing: Option<Sharing>,
    /// Element type of the scales; U8 for exponents.
    pub scale_dtype: Option<DType>,
    /// Bytes of `<module>.codes`.
    pub codes: usize,
    /// Bytes of `<module>.scales`.
    pub scales: usize,
    /// Bytes of `<module>.zeros`.
    pub zeros: usize,
    /// Bytes of `<module>.permutation`.
    pub permutation: usize,
    /// Divisor of NVFP4 scales, as the bits of an f32.
    pub global_scale: Option<u32>,
}

impl MatrixRecord {
    /// What the scheme of `linear` makes of it: a permutation where the columns may be permuted, no global scale yet.
    pub fn of(linear: &Linear) -> MatrixRecord {
        let (n, k, scheme) = (linear.n, linear.k, &linear.scheme);
        let code = scheme.storage.code();
        let scale_dtype = scheme.scale_dtype.map(|dtype| match dtype {
            DType::F8E8M0 => DType::U8,
            other => other,
        });
        let sharing = scale_dtype.map(|_| scheme.sharing);
        let elements = sharing.map_or(0, |sharing| ScaleTable::elements(sharing, n, k));
        let has_zeros = match scheme.zeros {
            ZeroStorage::None => false,
            ZeroStorage::Plain | ZeroStorage::PackedRows => true,
        };
        MatrixRecord {
            n,
            k,
            tile: TILE,
            code,
            formula: scheme.storage.formula(),
            sharing,
            scale_dtype,
            codes: Tiling::new(n, k, code.tile_bits()).bytes(),
            scales: elements * scale_dtype.map_or(0, DType::bytes),
            zeros: if has_zeros { elements } else { 0 },
            permutation: if scheme.act_order { k * 4 } else { 0 },
            global_scale: None,
        }
    }

    /// What a tiled matrix is.
    pub(crate) fn of_matrix(matrix: &TiledMatrix) -> MatrixRecord {
        MatrixRecord {
            n: matrix.n,
            k: matrix.k,
            tile: TILE,
            code: matrix.code,
            formula: matrix.formula,
            sharing: matrix.scales.as_ref().map(|scales| scales.sharing),
            scale_dtype: matrix.scales.as_ref().map(|scales| scales.dtype),
            codes: matrix.codes.len(),
            scales: matrix.scales.as_ref().map_or(0, |scales| scales.bytes.len()),
            zeros: matrix.zeros.as_ref().map_or(0, |zeros| zeros.len()),
            permutation: matrix.permutation.as_ref().map_or(0, |permutation| permutation.len()),
            global_scale: matrix.global_scale,
        }
    }

    /// Bytes of everything the matrix stores.
    pub fn stored_bytes(&self) -> u64 {
        (self.codes + self.scales + self.zeros + self.permutation) as u64
    }

    /// True where `self`, found in a file, is a matrix of the scheme that `expected` was made from.
    pub(crate) fn fits(&self, expected: &MatrixRecord) -> bool {
        let permutation_fits = self.permutation == 0 || self.permutation == expected.permutation;
        let global_fits = self.global_scale.is_some() == (self.formula == Formula::Nvfp4);
        let found = MatrixRecord { permutation: expected.permutation, global_scale: None, ..self.clone() };
        permutation_fits && global_fits && found == *expected
    }
}

/// Refuses what would make a length overflow or divide by zero, so that a forged manifest cannot.
pub(crate) fn check_linear(linear: &Linear) -> Result<(), String> {
    const LIMIT: usize = 1 << 31;
    let bits_fit = match linear.scheme.storage.code() {
        Code::Int { bits } => (1..=8).contains(&bits),
        Code::E4m3 | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32 => true,
    };
    let sharing_fits = match linear.scheme.sharing {
        Sharing::Tensor | Sharing::Channel => true,
        Sharing::Group { size } => size > 0,
        Sharing::Block { rows, columns } => rows > 0 && columns > 0,
    };
    let shape_fits = (1..LIMIT).contains(&linear.n) && (1..LIMIT).contains(&linear.k);
    if bits_fit && sharing_fits && shape_fits {
        return Ok(());
    }
    Err(format!("`{}` has an impossible shape or scheme: {} x {}", linear.module, linear.n, linear.k))
}
