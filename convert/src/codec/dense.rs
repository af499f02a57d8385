//! Unquantized weights: the code is the weight's own bits.

use ctq_model::DType;

use super::{BadCode, Codec, RowLayout, values};

/// `weight` in a float type.
pub(super) struct Dense {
    pub(super) dtype: DType,
}

impl Codec for Dense {
    fn row_bytes(&self, k: usize) -> usize {
        k * self.dtype.bytes()
    }

    fn layout(&self) -> RowLayout {
        RowLayout::AsTiled
    }

    fn check_row(&self, stored: &[u8]) -> Result<(), BadCode> {
        match values::first_flaw(self.dtype, stored) {
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
