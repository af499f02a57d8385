//! Stored codes, row by row, as the numbers they stand for: integers without their zero point, floats without
//! their scale. Spec 2.3 to 2.9.
//!
//! Knows how codes lie in bytes and words; does not know scales.

use std::path::Path;

use ctq_model::inventory::Linear;
use ctq_model::scheme::{Storage, WordLayout};
use ctq_model::{DType, Tensor, TensorSource};

use crate::Result;
use crate::number::{e2m1, e4m3};
use crate::stored::{self, of_dtype};

/// The codes of an [n, k] matrix.
pub(crate) struct Codes<'a> {
    tensor: Tensor<'a>,
    kind: Kind,
    k: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    /// The codes are the weights.
    Dense(DType),
    /// `per_row` words a row.
    Words { bits: u8, layout: WordLayout, per_row: usize },
    /// One signed integer a byte.
    SignedBytes,
    /// One fp8 a byte.
    E4m3,
    /// Two fp4 a byte, the low nibble first.
    Nibbles,
}

impl<'a> Codes<'a> {
    /// Finds the tensor that holds the codes of `linear`.
    ///
    /// # Errors
    /// Where it is missing, or its size or dtype contradicts the scheme.
    pub(crate) fn open(source: &'a dyn TensorSource, linear: &Linear) -> Result<Codes<'a>> {
        let (n, k) = (linear.n, linear.k);
        let name = format!("{}.{}", linear.module, linear.scheme.storage.leaf());
        let (tensor, kind) = match linear.scheme.storage {
            Storage::Dense { dtype } => (of_dtype(source, &name, n * k, &[dtype])?, Kind::Dense(dtype)),
            Storage::PackedInt { bits, layout } => {
                // Files of early 2024 call the packed words `weight`.
                let old = format!("{}.weight", linear.module);
                let name = if source.info(&name).is_none() { old } else { name };
                let per_row = layout.words(bits, k);
                let words = of_dtype(source, &name, n * per_row, &[DType::I32])?;
                (words, Kind::Words { bits, layout, per_row })
            }
            Storage::PlainInt { .. } => (of_dtype(source, &name, n * k, &[DType::I8])?, Kind::SignedBytes),
            Storage::PlainFp8 | Storage::Mxfp8 => {
                (of_dtype(source, &name, n * k, &[DType::F8E4M3])?, Kind::E4m3)
            }
            Storage::Nvfp4 | Storage::Mxfp4 => {
                (of_dtype(source, &name, n * k.div_ceil(2), &[DType::U8])?, Kind::Nibbles)
            }
        };
        Ok(Codes { tensor, kind, k })
    }

    /// The file they are in, for messages.
    pub(crate) fn file(&self) -> &Path {
        self.tensor.file
    }

    /// Writes row `n` into `out`, k numbers.
    pub(crate) fn row(&self, n: usize, out: &mut [f32]) {
        let row = |bytes: usize| &self.tensor.bytes[n * bytes..(n + 1) * bytes];
        match self.kind {
            Kind::Dense(dtype) => {
                let values = stored::dense_floats(dtype, row(self.k * dtype.bytes()));
                out.copy_from_slice(&values.expect("Storage::Dense holds BF16, F16 or F32"));
            }
            Kind::Words { bits, layout, per_row } => {
                let row = row(per_row * 4);
                let word = |at: usize| {
                    row.get(at * 4..at * 4 + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                };
                for (k, value) in out.iter_mut().enumerate() {
                    *value = unpack(word, bits, layout, k) as f32;
                }
            }
            Kind::SignedBytes => {
                for (value, byte) in out.iter_mut().zip(row(self.k)) {
                    *value = f32::from(*byte as i8);
                }
            }
            Kind::E4m3 => {
                for (value, byte) in out.iter_mut().zip(row(self.k)) {
                    *value = e4m3(*byte);
                }
            }
            Kind::Nibbles => {
                let row = row(self.k.div_ceil(2));
                for (k, value) in out.iter_mut().enumerate() {
                    *value = e2m1(row[k / 2] >> (4 * (k % 2)) & 15);
                }
            }
        }
    }
}

/// Integer `index` of a packed row, whose words `word` hands out (0 beyond the last): stored as
/// `value + 2^(bits - 1)`, low bits first.
pub(crate) fn unpack(word: impl Fn(usize) -> u32, bits: u8, layout: WordLayout, index: usize) -> i32 {
    let width = usize::from(bits);
    let stored = match layout {
        WordLayout::Dense => {
            let first = index * width;
            // A value may begin in the top bits of one word and end in the next: look through both.
            let both = u64::from(word(first / 32)) | u64::from(word(first / 32 + 1)) << 32;
            both >> (first % 32)
        }
        WordLayout::Padded => {
            let per_word = 32 / width;
            u64::from(word(index / per_word)) >> (index % per_word * width)
        }
    };
    (stored & ((1 << bits) - 1)) as i32 - (1 << (bits - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 3-bit values 0, 1, .. 7, 0, 1, ..: the eleventh straddles the first two words.
    #[test]
    fn dense_values_straddle_words_and_padded_values_do_not() {
        let values: Vec<u64> = (0..20).map(|i| i % 8).collect();
        let string = values.iter().enumerate().fold(0_u64, |string, (i, v)| string | v << (3 * i));
        let dense = |at: usize| [string as u32, (string >> 32) as u32].get(at).copied().unwrap_or(0);
        let padded = |at: usize| {
            let words = values
                .chunks(10)
                .map(|c| c.iter().enumerate().fold(0, |w, (i, v)| w | (*v as u32) << (3 * i)));
            words.collect::<Vec<u32>>().get(at).copied().unwrap_or(0)
        };
        for (index, value) in values.iter().enumerate() {
            assert_eq!(unpack(dense, 3, WordLayout::Dense, index), *value as i32 - 4);
            assert_eq!(unpack(padded, 3, WordLayout::Padded, index), *value as i32 - 4);
        }
    }
}
