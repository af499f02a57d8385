//! `mxfp4-pack-quantized` and `mxfp8-quantized`: fp4 and fp8 codes under power-of-two scales for 32.

use super::plain::PlainFp8;
use super::{BadCode, Codec, RowLayout, nibbles};

/// `weight_packed` U8 of E2M1 codes. All 16 codes are numbers.
pub(super) struct Mxfp4;

impl Codec for Mxfp4 {
    fn row_bytes(&self, k: usize) -> usize {
        k.div_ceil(2)
    }

    fn layout(&self) -> RowLayout {
        RowLayout::AsTiled
    }

    fn check_row(&self, _: &[u8]) -> Result<(), BadCode> {
        Ok(())
    }

    fn unpack_row(&self, stored: &[u8], codes: &mut [u8]) {
        nibbles::unpack(stored, codes);
    }

    fn pack_row(&self, codes: &[u8], stored: &mut [u8]) {
        nibbles::pack(codes, stored);
    }
}

/// `weight` F8_E4M3: laid out as other fp8 weights.
pub(super) struct Mxfp8;

impl Codec for Mxfp8 {
    fn row_bytes(&self, k: usize) -> usize {
        PlainFp8.row_bytes(k)
    }

    fn layout(&self) -> RowLayout {
        PlainFp8.layout()
    }

    fn check_row(&self, stored: &[u8]) -> Result<(), BadCode> {
        PlainFp8.check_row(stored)
    }

    fn unpack_row(&self, stored: &[u8], codes: &mut [u8]) {
        PlainFp8.unpack_row(stored, codes);
    }

    fn pack_row(&self, codes: &[u8], stored: &mut [u8]) {
        PlainFp8.pack_row(codes, stored);
    }
}
