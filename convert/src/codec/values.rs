//! Which bit patterns are numbers. Tells NaN and infinity apart from the rest without ever making a float of them.

use ctq_model::{DType, Error, Result, TensorSource};

/// Why the element at `bytes` is not a finite number; `None` where it is one.
///
/// E8M0 exponents are U8 here, as in the files. Types that are not floats are always fine.
pub(crate) fn flaw(dtype: DType, bytes: &[u8]) -> Option<&'static str> {
    let (exponent, mantissa) = match dtype {
        DType::F16 => split(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])), 0x7c00, 0x03ff),
        DType::BF16 => split(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])), 0x7f80, 0x007f),
        DType::F32 => {
            split(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]), 0x7f80_0000, 0x007f_ffff)
        }
        DType::F8E4M3 => return (bytes[0] & 0x7f == 0x7f).then_some("NaN"),
        DType::U8 | DType::F8E8M0 => return (bytes[0] == 0xff).then_some("NaN (exponent 255)"),
        DType::Bool
        | DType::I8
        | DType::U16
        | DType::I16
        | DType::U32
        | DType::I32
        | DType::U64
        | DType::I64
        | DType::F8E5M2
        | DType::F64 => return None,
    };
    match (exponent, mantissa) {
        (false, _) => None,
        (true, false) => Some("infinite"),
        (true, true) => Some("NaN"),
    }
}

/// Whether all exponent bits are set, and whether any mantissa bit is.
const fn split(bits: u32, exponent: u32, mantissa: u32) -> (bool, bool) {
    (bits & exponent == exponent, bits & mantissa != 0)
}

/// Index and flaw of the first element that is not a finite number.
pub(crate) fn first_flaw(dtype: DType, bytes: &[u8]) -> Option<(usize, &'static str)> {
    let elements = bytes.chunks_exact(dtype.bytes()).enumerate();
    elements.into_iter().find_map(|(index, element)| flaw(dtype, element).map(|flaw| (index, flaw)))
}

/// Checks a float vector that is used as it is stored: a norm's weight, a bias, a static scale.
pub(crate) fn check_vector(source: &dyn TensorSource, name: &str) -> Result<()> {
    let Some(tensor) = source.tensor(name)? else { return Ok(()) };
    match first_flaw(tensor.dtype, &tensor.bytes) {
        None => Ok(()),
        Some((index, flaw)) => {
            Err(Error::tensor(tensor.file, name, format!("element {index} is {flaw}"), super::REWRITE))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nan_and_infinity_are_flaws() {
        let bf16 = |bits: u16| flaw(DType::BF16, &bits.to_le_bytes());
        assert_eq!(bf16(0x7f80), Some("infinite"));
        assert_eq!(bf16(0xff80), Some("infinite"));
        assert_eq!(bf16(0x7fc0), Some("NaN"));
        assert_eq!((bf16(0x7f7f), bf16(0x8000), bf16(0xbf80)), (None, None, None));
        assert_eq!(flaw(DType::F16, &0x7c01_u16.to_le_bytes()), Some("NaN"));
        assert_eq!(flaw(DType::F16, &0x7bff_u16.to_le_bytes()), None);
        for value in [0.0_f32, -1.5, f32::MAX, f32::MIN_POSITIVE, f32::NAN, f32::INFINITY, f32::NEG_INFINITY]
        {
            let found = flaw(DType::F32, &value.to_le_bytes());
            assert_eq!(found.is_none(), value.is_finite());
        }
        let nan: Vec<u8> = (0..=255).filter(|byte| flaw(DType::F8E4M3, &[*byte]).is_some()).collect();
        assert_eq!(nan, [0x7f, 0xff]);
        let nan: Vec<u8> = (0..=255).filter(|byte| flaw(DType::U8, &[*byte]).is_some()).collect();
        assert_eq!(nan, [0xff]);
    }
}
