//! `weight_zero_point`: plain I8, or packed along the rows in the words of the module's own layout.

use ctq_model::Result;
use ctq_model::scheme::{Storage, ZeroStorage};

use super::pack::PackedInt;
use super::{Codec, Module};

const LEAF: &str = "weight_zero_point";

/// Reads the zero points as signed integers in the order of the scales; `None` where the scheme uses none.
pub(super) fn read(module: &Module<'_>) -> Result<Option<Vec<i8>>> {
    let scheme = &module.linear.scheme;
    let (rows, columns) = scheme.sharing.shape(module.linear.n, module.linear.k);
    match scheme.zeros {
        ZeroStorage::None => Ok(None),
        ZeroStorage::Plain => {
            let tensor = module.tensor(LEAF, rows * columns)?;
            Ok(Some(tensor.bytes.iter().map(|byte| byte.cast_signed()).collect()))
        }
        ZeroStorage::PackedRows => {
            let codec = packing(scheme.storage)
                .ok_or_else(|| module.bad(LEAF, "is packed, and the module's weights are not"))?;
            let tensor = module.tensor(LEAF, codec.row_bytes(rows) * columns)?;
            Ok(Some(unpack_rows(&codec, rows, columns, &tensor.bytes)))
        }
    }
}

/// The inverse of [`read`]: the bytes of the tensor. `None` where the scheme has no such tensor.
pub(super) fn write(
    zeros: &[i8],
    storage: Storage,
    zero_storage: ZeroStorage,
    (rows, columns): (usize, usize),
) -> Option<Vec<u8>> {
    match zero_storage {
        ZeroStorage::None => None,
        ZeroStorage::Plain => Some(zeros.iter().map(|zero| zero.cast_unsigned()).collect()),
        ZeroStorage::PackedRows => Some(pack_rows(&packing(storage)?, rows, columns, zeros)),
    }
}

/// Zero points are packed as the codes beside them.
fn packing(storage: Storage) -> Option<PackedInt> {
    match storage {
        Storage::PackedInt { bits, layout } => Some(PackedInt { bits, layout }),
        Storage::Dense { .. }
        | Storage::PlainInt { .. }
        | Storage::PlainFp8
        | Storage::Nvfp4
        | Storage::Mxfp4
        | Storage::Mxfp8 => None,
    }
}

/// Words [words, columns]: each column is a row of codes stood on end.
fn unpack_rows(codec: &PackedInt, rows: usize, columns: usize, stored: &[u8]) -> Vec<i8> {
    let half = 1_i16 << (codec.bits - 1);
    let mut zeros = vec![0; rows * columns];
    let mut codes = vec![0; rows];
    for column in 0..columns {
        let words: Vec<u8> =
            stored.chunks_exact(4).skip(column).step_by(columns).flatten().copied().collect();
        codec.unpack(&words, &mut codes);
        for (row, code) in codes.iter().enumerate() {
            zeros[row * columns + column] = (i16::from(*code) - half) as i8;
        }
    }
    zeros
}

fn pack_rows(codec: &PackedInt, rows: usize, columns: usize, zeros: &[i8]) -> Vec<u8> {
    let half = 1_i16 << (codec.bits - 1);
    let mut stored = vec![0; codec.row_bytes(rows) * columns];
    for column in 0..columns {
        let codes: Vec<u8> =
            zeros.iter().skip(column).step_by(columns).map(|zero| (i16::from(*zero) + half) as u8).collect();
        let mut words = vec![0; codec.row_bytes(rows)];
        codec.pack_row(&codes, &mut words);
        for (index, word) in words.chunks_exact(4).enumerate() {
            let at = (index * columns + column) * 4;
            stored[at..at + 4].copy_from_slice(word);
        }
    }
    stored
}

#[cfg(test)]
mod tests {
    use ctq_model::scheme::WordLayout;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_run_along_the_rows() {
        // z[n, c] = ((word[n / 8, c] >> 4 (n % 8)) & 15) - 8 for 4 bits.
        let words = [0x7654_3210_u32, 0xfedc_ba98, 0x0000_0009, 0x0000_000a];
        let stored: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let codec = PackedInt { bits: 4, layout: WordLayout::Dense };
        let zeros = unpack_rows(&codec, 9, 2, &stored);
        let expected: Vec<i8> = (0..8).flat_map(|n| [n - 8, n]).chain([1, 2]).collect();
        assert_eq!(zeros, expected);
    }

    proptest! {
        #[test]
        fn unpack_undoes_pack(
            bits in 2..=8_u8,
            padded: bool,
            rows in 1..70_usize,
            columns in 1..5_usize,
            seed in prop::collection::vec(any::<u8>(), 350),
        ) {
            let layout = if padded { WordLayout::Padded } else { WordLayout::Dense };
            let codec = PackedInt { bits, layout };
            let half = 1_i16 << (bits - 1);
            let zeros: Vec<i8> =
                seed[..rows * columns].iter().map(|s| (i16::from(*s) % (2 * half) - half) as i8).collect();
            let stored = pack_rows(&codec, rows, columns, &zeros);
            prop_assert_eq!(stored.len(), layout.words(bits, rows) * columns * 4);
            prop_assert_eq!(unpack_rows(&codec, rows, columns, &stored), zeros);
        }
    }
}
