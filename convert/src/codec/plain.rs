//! One code a byte: `int-quantized`, `float-quantized` and `naive-quantized` files.

use ctq_model::DType;

use super::{BadCode, Codec, RowLayout, values};

/// `weight` I8: sign-extended integers of which `bits` are used. Kept as `value + 2^(bits-1)`.
pub(super) struct PlainInt {
    pub(super) bits: u8,
}

impl PlainInt {
    fn half(&self) -> i16 {
        1 << (self.bits - 1)
    }
}

impl Codec for PlainInt {
    fn row_bytes(&self, k: usize) -> usize {
        k
    }

    fn layout(&self) -> RowLayout {
        RowLayout::Own
    }

    fn check_row(&self, stored: &[u8]) -> Result<(), BadCode> {
        let half = self.half();
        let fits = |byte: &u8| (-half..half).contains(&i16::from(byte.cast_signed()));
        if self.bits == 8 || stored.iter().fold(true, |all, byte| all & fits(byte)) {
            return Ok(());
        }
        let column = stored.iter().position(|byte| !fits(byte)).unwrap_or_default();
        let (value, bits) = (stored[column].cast_signed(), self.bits);
        let what = format!("the code {value} does not fit the {bits} bits that quantization_config states");
        Err(BadCode { column, what })
    }

    fn unpack_row(&self, stored: &[u8], codes: &mut [u8]) {
        // In two's complement, also where the value is negative.
        let half = self.half() as u8;
        for (byte, code) in stored.iter().zip(codes) {
            *code = byte.wrapping_add(half);
        }
    }

    fn pack_row(&self, codes: &[u8], stored: &mut [u8]) {
        let half = self.half() as u8;
        for (code, byte) in codes.iter().zip(stored) {
            *byte = code.wrapping_sub(half);
        }
    }
}

/// `weight` F8_E4M3.
pub(super) struct PlainFp8;

impl Codec for PlainFp8 {
    fn row_bytes(&self, k: usize) -> usize {
        k
    }

    fn layout(&self) -> RowLayout {
        RowLayout::AsTiled
    }

    fn check_row(&self, stored: &[u8]) -> Result<(), BadCode> {
        match values::first_flaw(DType::F8E4M3, stored) {
            None => Ok(()),
            Some((column, flaw)) => Err(BadCode { column, what: format!("the weight is {flaw}") }),
        }
    }

    fn unpack_row(&self, stored: &[u8], codes: &mut [u8]) {
        codes.copy_from_slice(stored);
    }

    fn pack_row(&self, codes: &[u8], stored: &mut [u8]) {
        stored.copy_from_slice(codes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn integers_of_every_width_come_back(bits in 2..=8_u8, seed: Vec<i8>) {
            let half = 1_i16 << (bits - 1);
            let values: Vec<i8> = seed.iter().map(|v| (i16::from(*v).rem_euclid(2 * half) - half) as i8).collect();
            let stored: Vec<u8> = values.iter().map(|v| v.cast_unsigned()).collect();
            let mut codes = vec![0; stored.len()];
            let fits = PlainInt { bits }.check_row(&stored).is_ok();
            prop_assert!(fits);
            PlainInt { bits }.unpack_row(&stored, &mut codes);
            for (code, value) in codes.iter().zip(&values) {
                prop_assert_eq!(i16::from(*code), i16::from(*value) + half);
            }
            let mut again = vec![0; stored.len()];
            PlainInt { bits }.pack_row(&codes, &mut again);
            prop_assert_eq!(again, stored);
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = PlainInt { bits: 4 }.check_row(&[0, 7, 8]).err().unwrap();
        assert_eq!(error.column, 2);
        assert_eq!(error.what, "the code 8 does not fit the 4 bits that quantization_config states");
        let error = PlainFp8.check_row(&[0x7e, 0xff]).err().unwrap();
        assert_eq!((error.column, error.what.as_str()), (1, "the weight is NaN"));
    }
}
