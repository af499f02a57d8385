//! `pack-quantized`: offset-binary integers in the 32-bit words of a row, in either of the two layouts.
//!
//! Words are little-endian and filled from their lowest bit, so a row of words is a string of bits whose bit `j` is bit
//! `j % 8` of byte `j / 8`.

use ctq_model::scheme::WordLayout;

use super::{BadCode, Codec, RowLayout};

/// `weight_packed` I32.
pub(super) struct PackedInt {
    pub(super) bits: u8,
    pub(super) layout: WordLayout,
}

impl Codec for PackedInt {
    fn row_bytes(&self, k: usize) -> usize {
        self.layout.words(self.bits, k) * 4
    }

    /// Widths that fill bytes leave no gap in a word, in either layout.
    fn layout(&self) -> RowLayout {
        if matches!(self.bits, 4 | 8) { RowLayout::AsTiled } else { RowLayout::Own }
    }

    fn check_row(&self, _: &[u8]) -> Result<(), BadCode> {
        Ok(())
    }

    fn unpack_row(&self, stored: &[u8], codes: &mut [u8]) {
        self.unpack(stored, codes);
    }

    fn pack_row(&self, codes: &[u8], stored: &mut [u8]) {
        let mask = self.mask();
        for (index, code) in codes.iter().enumerate() {
            let at = self.first_bit(index);
            let pair = (u16::from(*code) & mask) << (at % 8);
            stored[at / 8] |= pair as u8;
            if let Some(next) = stored.get_mut(at / 8 + 1) {
                *next |= (pair >> 8) as u8;
            }
        }
    }
}

impl PackedInt {
    /// Unpacks as many codes as `codes` has room for.
    pub(super) fn unpack(&self, stored: &[u8], codes: &mut [u8]) {
        let mask = self.mask();
        for (index, code) in codes.iter_mut().enumerate() {
            let at = self.first_bit(index);
            let high = stored.get(at / 8 + 1).copied().unwrap_or(0);
            let pair = u16::from_le_bytes([stored[at / 8], high]);
            *code = ((pair >> (at % 8)) & mask) as u8;
        }
    }

    const fn mask(&self) -> u16 {
        (1 << self.bits) - 1
    }

    /// Where code `index` of a row begins, in bits.
    const fn first_bit(&self, index: usize) -> usize {
        let bits = self.bits as usize;
        match self.layout {
            WordLayout::Dense => index * bits,
            WordLayout::Padded => {
                let codes_in_word = 32 / bits;
                index / codes_in_word * 32 + index % codes_in_word * bits
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout() -> impl Strategy<Value = WordLayout> {
        prop_oneof![Just(WordLayout::Dense), Just(WordLayout::Padded)]
    }

    /// The library's own wording: value `i` in the padded layout is `(word[i / f] >> (i % f * bits)) & mask`, in the
    /// dense one bits `i * bits ..` of the words laid end to end.
    fn naive(words: &[u32], bits: usize, layout: WordLayout, index: usize) -> u8 {
        let bit = |j: usize| (words[j / 32] >> (j % 32)) & 1;
        let value: u32 = match layout {
            WordLayout::Dense => (0..bits).map(|b| bit(index * bits + b) << b).sum(),
            WordLayout::Padded => {
                let per_word = 32 / bits;
                (words[index / per_word] >> (index % per_word * bits)) & ((1 << bits) - 1)
            }
        };
        value as u8
    }

    proptest! {
        #[test]
        fn unpack_reads_what_the_library_defines(bits in 1..=8_u8, layout in layout(), words in prop::collection::vec(any::<u32>(), 1..40)) {
            let codec = PackedInt { bits, layout };
            let count = match layout {
                WordLayout::Dense => words.len() * 32 / usize::from(bits),
                WordLayout::Padded => words.len() * (32 / usize::from(bits)),
            };
            let stored: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut codes = vec![0; count];
            codec.unpack(&stored, &mut codes);
            for (index, code) in codes.iter().enumerate() {
                prop_assert_eq!(*code, naive(&words, bits.into(), layout, index));
            }
        }

        #[test]
        fn unpack_undoes_pack_and_the_tail_is_zero(bits in 1..=8_u8, layout in layout(), seed in prop::collection::vec(any::<u8>(), 1..200)) {
            let codec = PackedInt { bits, layout };
            let codes: Vec<u8> = seed.iter().map(|s| s & codec.mask() as u8).collect();
            let mut stored = vec![0; codec.row_bytes(codes.len())];
            codec.pack_row(&codes, &mut stored);
            let mut again = vec![0; codes.len()];
            codec.unpack(&stored, &mut again);
            prop_assert_eq!(&again, &codes);
            let ones: u32 = stored.iter().map(|byte| byte.count_ones()).sum();
            prop_assert_eq!(ones, codes.iter().map(|code| code.count_ones()).sum::<u32>());
        }
    }
}
