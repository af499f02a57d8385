//! `nvfp4-pack-quantized`: fp4 codes two a byte, an fp8 scale for 16, and one f32 that divides the scales.

use ctq_model::matrix::Formula;
use ctq_model::{DType, Result};

use super::{BadCode, Codec, Module, RowLayout, nibbles, values};

/// `weight_packed` U8 of E2M1 codes. All 16 codes are numbers.
pub(super) struct Nvfp4;

impl Codec for Nvfp4 {
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

/// The bits of `weight_global_scale`; `None` for formats that have none.
pub(super) fn global_scale(module: &Module<'_>) -> Result<Option<u32>> {
    match module.linear.scheme.storage.formula() {
        Formula::Dense | Formula::Affine | Formula::Mx => return Ok(None),
        Formula::Nvfp4 => {}
    }
    /// The bits of 1.0, which the library divides by where the tensor is absent.
    const ONE: u32 = 0x3f80_0000;
    let leaf = "weight_global_scale";
    if module.source.info(&module.name(leaf)).is_none() {
        return Ok(Some(ONE));
    }
    let tensor = module.tensor(leaf, 4)?;
    let bits = u32::from_le_bytes([tensor.bytes[0], tensor.bytes[1], tensor.bytes[2], tensor.bytes[3]]);
    if let Some(flaw) = values::flaw(DType::F32, &tensor.bytes) {
        return Err(module.bad(leaf, format!("is {flaw}, and every scale is divided by it")));
    }
    if bits << 1 == 0 {
        return Err(module.bad(leaf, "is zero, and every scale is divided by it"));
    }
    Ok(Some(bits))
}
