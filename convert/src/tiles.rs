//! Between the two orders of one matrix: unpacked and row-major ([`QuantMatrix`]), and tiled ([`TiledMatrix`]). A
//! bijection on everything but the padding.

use ctq_container::{ScaleTable, TiledMatrix, Tiling};
use ctq_model::inventory::Linear;
use ctq_model::matrix::Scales;
use ctq_model::{QuantMatrix, Result, TensorSource};
use rayon::prelude::*;

use crate::codec::{self, CodeRows};

/// Tiles a matrix: codes, scales and zero points, each row of tiles by itself.
pub fn tile(matrix: &QuantMatrix) -> TiledMatrix {
    let tiling = Tiling::new(matrix.n, matrix.k, matrix.code.tile_bits());
    let mut codes = vec![0; tiling.bytes()];
    let row_tiles = codes.par_chunks_exact_mut(tiling.row_tile_bytes());
    row_tiles.enumerate().for_each(|(row_tile, out)| tiling.tile_rows(&matrix.codes, row_tile, out));
    tile_around(matrix, codes)
}

/// Reads a linear and tiles it at once: its unpacked codes are never in memory but for a row of tiles.
///
/// # Errors
/// As [`codec::encode`].
pub(crate) fn tile_linear(source: &dyn TensorSource, linear: &Linear) -> Result<TiledMatrix> {
    let bare = codec::encode_around(source, linear, Vec::new())?;
    let rows = CodeRows::new(source, linear)?;
    let mut codes = vec![0; rows.tiling().bytes()];
    let row_tiles = codes.par_chunks_exact_mut(rows.tiling().row_tile_bytes()).enumerate();
    let failures = row_tiles.map_init(Vec::new, |scratch, (row_tile, out)| {
        rows.check(rows.rows(row_tile))?;
        rows.tile_one(row_tile, out, scratch);
        Ok(())
    });
    failures.find_first(Result::is_err).unwrap_or(Ok(()))?;
    Ok(tile_around(&bare, codes))
}

/// Everything of a matrix but its codes, beside tiled `codes`.
pub(crate) fn tile_around(matrix: &QuantMatrix, codes: Vec<u8>) -> TiledMatrix {
    let (n, k) = (matrix.n, matrix.k);
    let scales = matrix.scales.as_ref().map(|scales| ScaleTable {
        dtype: scales.dtype,
        sharing: scales.sharing,
        bytes: ScaleTable::arrange(scales.sharing, n, k, scales.dtype.bytes(), &scales.bytes).into(),
    });
    let zeros = matrix.zeros.as_ref().zip(matrix.scales.as_ref()).map(|(zeros, scales)| {
        let zeros: Vec<u8> = zeros.iter().map(|zero| zero.cast_unsigned()).collect();
        ScaleTable::arrange(scales.sharing, n, k, 1, &zeros).into()
    });
    let permutation = matrix.permutation.as_ref();
    TiledMatrix {
        n,
        k,
        code: matrix.code,
        formula: matrix.formula,
        codes: codes.into(),
        scales,
        zeros,
        global_scale: matrix.global_scale,
        permutation: permutation.map(|p| p.iter().flat_map(|k| k.to_le_bytes()).collect::<Vec<u8>>().into()),
    }
}

/// The inverse of [`tile`].
pub fn untile(matrix: &TiledMatrix) -> QuantMatrix {
    let (n, k) = (matrix.n, matrix.k);
    let scales = matrix.scales.as_ref().map(|scales| Scales {
        dtype: scales.dtype,
        sharing: scales.sharing,
        bytes: ScaleTable::restore(scales.sharing, n, k, scales.dtype.bytes(), &scales.bytes),
    });
    let zeros = matrix.zeros.as_ref().zip(matrix.scales.as_ref()).map(|(zeros, scales)| {
        let zeros = ScaleTable::restore(scales.sharing, n, k, 1, zeros);
        zeros.iter().map(|zero| zero.cast_signed()).collect()
    });
    let permutation = matrix.permutation.as_ref();
    QuantMatrix {
        n,
        k,
        code: matrix.code,
        formula: matrix.formula,
        codes: matrix.tiling().untile(&matrix.codes),
        scales,
        zeros,
        global_scale: matrix.global_scale,
        permutation: permutation
            .map(|p| p.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
    }
}
