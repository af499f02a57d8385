//! Which bit patterns are numbers. Tells NaN and infinity apart from the rest without ever making a float of them.

use ctq_model::{DType, Error, Result, TensorSource};

/// The bits of a number without its sign, and the least of these patterns that is no finite number; `None` where all are.
///
/// E8M0 exponents are U8 here, as in the files. Types that are not floats are always fine.
const fn flawed_from(dtype: DType) -> Option<(u32, u32)> {
    match dtype {
        DType::F16 => Some((0x7fff, 0x7c00)),
        DType::BF16 => Some((0x7fff, 0x7f80)),
        DType::F32 => Some((0x7fff_ffff, 0x7f80_0000)),
        DType::F8E4M3 => Some((0x7f, 0x7f)),
        DType::U8 | DType::F8E8M0 => Some((0xff, 0xff)),
        DType::Bool
        | DType::I8
        | DType::U16
        | DType::I16
        | DType::U32
        | DType::I32
        | DType::U64
        | DType::I64
        | DType::F8E5M2
        | DType::F64 => None,
    }
}

/// Why the element at `bytes` is not a finite number; `None` where it is one.
pub(crate) fn flaw(dtype: DType, bytes: &[u8]) -> Option<&'static str> {
    let (mask, least) = flawed_from(dtype)?;
    let bits = bytes.iter().rev().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
    let magnitude = bits & mask;
    // Of the fp8 types neither has an infinity.
    let infinite = magnitude == least && matches!(dtype, DType::F16 | DType::BF16 | DType::F32);
    let exponent = matches!(dtype, DType::U8 | DType::F8E8M0);
    (magnitude >= least).then_some(match (infinite, exponent) {
        (true, _) => "infinite",
        (false, true) => "NaN (exponent 255)",
        (false, false) => "NaN",
    })
}

/// Index and flaw of the first element that is not a finite number.
pub(crate) fn first_flaw(dtype: DType, bytes: &[u8]) -> Option<(usize, &'static str)> {
    let width = dtype.bytes();
    // Whole runs are looked through first, without a branch an element.
    let mut runs = bytes.chunks(RUN * width).enumerate().filter(|(_, run)| may_be_flawed(dtype, run));
    runs.find_map(|(number, run)| {
        let mut elements = run.chunks_exact(width).enumerate();
        elements.find_map(|(index, element)| flaw(dtype, element).map(|flaw| (number * RUN + index, flaw)))
    })
}

/// Elements that are looked through at a time.
const RUN: usize = 2048;

/// False only where no element has a flaw: where the largest magnitude is below that of all flaws.
fn may_be_flawed(dtype: DType, bytes: &[u8]) -> bool {
    let Some((mask, least)) = flawed_from(dtype) else { return false };
    // Of one width, and signed where that is how processors compare.
    let largest = match dtype.bytes() {
        1 => u32::from(bytes.iter().fold(0, |largest, byte| largest.max(byte & mask as u8))),
        2 => {
            let magnitude = |half: &[u8; 2]| i16::from_le_bytes(*half) & mask as i16;
            bytes.as_chunks().0.iter().fold(0, |largest, half| largest.max(magnitude(half))) as u32
        }
        _ => {
            let magnitude = |word: &[u8; 4]| i32::from_le_bytes(*word) & mask as i32;
            bytes.as_chunks().0.iter().fold(0, |largest, word| largest.max(magnitude(word))) as u32
        }
    };
    largest >= least
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

    /// Every bit pattern of a half and the corners of the others, at either end of a run and beyond the first.
    #[test]
    fn looking_through_runs_overlooks_nothing() {
        let halves: Vec<Vec<u8>> = (0..=u16::MAX).map(|bits| bits.to_le_bytes().to_vec()).collect();
        let words = [0_u32, 0x7f7f_ffff, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x8000_0000, 0xff7f_ffff];
        let words = words.map(|bits| bits.to_le_bytes().to_vec()).to_vec();
        let bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        let cases = [
            (DType::BF16, &halves),
            (DType::F16, &halves),
            (DType::F32, &words),
            (DType::F8E4M3, &bytes),
            (DType::U8, &bytes),
            (DType::F8E8M0, &bytes),
        ];
        for (dtype, patterns) in cases {
            for pattern in patterns {
                assert_eq!(
                    may_be_flawed(dtype, pattern),
                    flaw(dtype, pattern).is_some(),
                    "{dtype} {pattern:x?}"
                );
            }
        }
        for at in [0, RUN - 1, RUN, 2 * RUN + 7] {
            let mut bytes = vec![0; (2 * RUN + 8) * 2];
            bytes[at * 2..at * 2 + 2].copy_from_slice(&0x7f80_u16.to_le_bytes());
            assert_eq!(first_flaw(DType::BF16, &bytes), Some((at, "infinite")));
            bytes[(2 * RUN + 7) * 2..].copy_from_slice(&0xffff_u16.to_le_bytes());
            assert_eq!(first_flaw(DType::BF16, &bytes).unwrap().0, at);
        }
    }
}
