//! One matrix in tiles, with its scales beside them: what a backend is given to multiply with.

use ctq_model::DType;
use ctq_model::matrix::{Code, Formula, Sharing};
use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::tiling::{TILE, Tiling};

/// A tiled matrix of `n` output rows by `k` inputs.
#[derive(Clone, Debug)]
pub struct TiledMatrix {
    /// Output rows.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// What a code stands for.
    pub code: Code,
    /// How code and scale make a weight.
    pub formula: Formula,
    /// Codes in the order of [`Tiling`].
    pub codes: Bytes,
    /// Scales; `None` for dense weights.
    pub scales: Option<ScaleTable>,
    /// Zero points, I8, in the order of the scales.
    pub zeros: Option<Bytes>,
    /// Divisor of NVFP4 scales, as the bits of an f32.
    pub global_scale: Option<u32>,
    /// Column `j` of the tiles is input `permutation[j]`, as little-endian u32.
    pub permutation: Option<Bytes>,
}

impl TiledMatrix {
    /// Geometry of the codes.
    pub fn tiling(&self) -> Tiling {
        Tiling::new(self.n, self.k, self.code.tile_bits())
    }
}

/// Scales of one matrix as raw little-endian elements.
///
/// Row-wise scales (one a row, or one a row and group) lie `[row tile][group][64 rows]`, so that a range of row tiles
/// is a range of bytes and a panel reads 64 neighbours; rows beyond the matrix are zero. A single scale and blocks
/// keep their row-major order.
#[derive(Clone, Debug)]
pub struct ScaleTable {
    /// BF16, F16, F32, F8_E4M3 or U8 (an exponent).
    pub dtype: DType,
    /// Which codes share one.
    pub sharing: Sharing,
    /// The elements.
    pub bytes: Bytes,
}

/// Order of per-scale elements (scales and zero points) in a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ScaleOrder {
    /// As stored.
    RowMajor,
    /// `[row tile][group][64 rows]`.
    Tiled,
}

impl ScaleOrder {
    pub(crate) const fn of(sharing: Sharing) -> ScaleOrder {
        match sharing {
            Sharing::Tensor | Sharing::Block { .. } => ScaleOrder::RowMajor,
            Sharing::Channel | Sharing::Group { .. } => ScaleOrder::Tiled,
        }
    }
}

impl ScaleTable {
    /// Index of the scale of (`row`, `k`), where `k` counts columns of the tiles.
    pub fn index(&self, row: usize, k: usize, matrix_k: usize) -> usize {
        scale_index(self.sharing, row, k, matrix_k)
    }

    /// Elements that the scales (or zero points) of an `n` x `k` matrix take in this order.
    pub fn elements(sharing: Sharing, n: usize, k: usize) -> usize {
        let (rows, columns) = sharing.shape(n, k);
        match ScaleOrder::of(sharing) {
            ScaleOrder::RowMajor => rows * columns,
            ScaleOrder::Tiled => n.div_ceil(TILE) * TILE * columns,
        }
    }

    /// Brings row-major elements of `width` bytes into this order.
    ///
    /// # Panics
    /// If `bytes` has the wrong length.
    pub fn arrange(sharing: Sharing, n: usize, k: usize, width: usize, bytes: &[u8]) -> Vec<u8> {
        let (rows, columns) = sharing.shape(n, k);
        assert_eq!(bytes.len(), rows * columns * width);
        if ScaleOrder::of(sharing) == ScaleOrder::RowMajor {
            return bytes.to_vec();
        }
        let mut arranged = vec![0; ScaleTable::elements(sharing, n, k) * width];
        match width {
            1 => arrange_rows::<1>(columns, bytes, &mut arranged),
            2 => arrange_rows::<2>(columns, bytes, &mut arranged),
            4 => arrange_rows::<4>(columns, bytes, &mut arranged),
            _ => arrange_rows::<8>(columns, bytes, &mut arranged),
        }
        arranged
    }

    /// The inverse of [`ScaleTable::arrange`].
    ///
    /// # Panics
    /// If `bytes` has the wrong length.
    pub fn restore(sharing: Sharing, n: usize, k: usize, width: usize, bytes: &[u8]) -> Vec<u8> {
        let (rows, columns) = sharing.shape(n, k);
        assert_eq!(bytes.len(), ScaleTable::elements(sharing, n, k) * width);
        if ScaleOrder::of(sharing) == ScaleOrder::RowMajor {
            return bytes.to_vec();
        }
        let mut stored = Vec::with_capacity(rows * columns * width);
        for index in 0..rows * columns {
            let at = arranged_index(index / columns, index % columns, columns) * width;
            stored.extend_from_slice(&bytes[at..at + width]);
        }
        stored
    }
}

/// Row-major elements of `WIDTH` bytes to `[row tile][column][64 rows]`.
///
/// # Panics
/// If the bytes are not whole elements.
fn arrange_rows<const WIDTH: usize>(columns: usize, stored: &[u8], arranged: &mut [u8]) {
    /// Columns at a time: what is written of them stays in the nearest cache.
    const RUN: usize = 64;
    let (stored, []) = stored.as_chunks::<WIDTH>() else { panic!("elements of {WIDTH} bytes") };
    let (arranged, _) = arranged.as_chunks_mut::<WIDTH>();
    let tile = (TILE * columns).max(1);
    for (stored, arranged) in stored.chunks(tile).zip(arranged.chunks_mut(tile)) {
        for first in (0..columns).step_by(RUN) {
            for (row, stored) in stored.chunks(columns).enumerate() {
                let run = &stored[first..columns.min(first + RUN)];
                for (element, to) in run.iter().zip(arranged[first * TILE..].chunks_mut(TILE)) {
                    to[row] = *element;
                }
            }
        }
    }
}

const fn arranged_index(row: usize, column: usize, columns: usize) -> usize {
    ((row / TILE) * columns + column) * TILE + row % TILE
}

fn scale_index(sharing: Sharing, row: usize, k: usize, matrix_k: usize) -> usize {
    match sharing {
        Sharing::Tensor => 0,
        Sharing::Channel => arranged_index(row, 0, 1),
        Sharing::Group { size } => arranged_index(row, k / size, matrix_k.div_ceil(size)),
        Sharing::Block { rows, columns } => (row / rows) * matrix_k.div_ceil(columns) + k / columns,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sharing() -> impl Strategy<Value = Sharing> {
        prop_oneof![
            Just(Sharing::Tensor),
            Just(Sharing::Channel),
            (1..40_usize).prop_map(|size| Sharing::Group { size }),
            (1..40_usize, 1..40_usize).prop_map(|(rows, columns)| Sharing::Block { rows, columns }),
        ]
    }

    proptest! {
        #[test]
        fn every_code_finds_the_scale_it_was_stored_with(n in 1..140_usize, k in 1..90_usize, sharing in sharing()) {
            let (rows, columns) = sharing.shape(n, k);
            let stored: Vec<u8> = (0..rows * columns).flat_map(|i| (i as u32).to_le_bytes()).collect();
            let arranged = ScaleTable::arrange(sharing, n, k, 4, &stored);
            prop_assert_eq!(ScaleTable::restore(sharing, n, k, 4, &arranged), stored);
            let table = ScaleTable { dtype: DType::F32, sharing, bytes: arranged.into() };
            for row in 0..n {
                for column in 0..k {
                    let at = table.index(row, column, k) * 4;
                    let found = u32::from_le_bytes(table.bytes[at..at + 4].try_into().unwrap()) as usize;
                    let expected = match sharing {
                        Sharing::Tensor => 0,
                        Sharing::Channel => row,
                        Sharing::Group { size } => row * columns + column / size,
                        Sharing::Block { rows: height, columns: width } => (row / height) * columns + column / width,
                    };
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }
}
