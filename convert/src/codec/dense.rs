//! Unquantized weights: the code is the weight's own bits.

use ctq_model::DType;

use super::{BadCode, Codec, values};

/// `weight` in a float type.
pub(super) struct Dense {
    pub(super) dtype: DType,
}

impl Codec for Dense {
    fn row_bytes(&self, k: usize) -> usize {
        k * self.dtype.bytes()
    }

    fn unpack_row(&self, stored: &[u8], codes: &mut [u8]) -> Result<(), BadCode> {
        codes.copy_from_slice(stored);
        match values::first_flaw(self.dtype, stored) {
            None => Ok(()),
            Some((column, flaw)) => Err(BadCode { column, what: format!("the weight is {flaw}") }),
        }
    }

    fn pack_row(&self, codes: &[u8], stored: &mut [u8]) {
        stored.copy_from_slice(codes);
    }
}
