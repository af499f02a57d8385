//! Small floats: what their bits stand for, and how an f32 is rounded to one.
//!
//! Knows single numbers; does not know which tensor they are in. Sources: the OCP OFP8 and MX specifications, and
//! spec 2.5 to 2.7 for where compressed-tensors departs from them.

use half::{bf16, f16};

/// Magnitudes of fp4 E2M1 in the order of their codes.
pub(crate) const E2M1_MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The number a nibble stands for: bit 3 is the sign, so that 8 is -0.
pub(crate) fn e2m1(code: u8) -> f32 {
    let magnitude = E2M1_MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The number an fp8 E4M3 (fn) byte stands for: bias 7, no infinity, 0x7f and 0xff are NaN.
pub(crate) fn e4m3(code: u8) -> f32 {
    let exponent = i32::from(code >> 3 & 15);
    let mantissa = f32::from(code & 7);
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * power_of_two(-9),
        (_, _) => (1.0 + mantissa / 8.0) * power_of_two(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The scale an E8M0 byte stands for, `2^(code - 127)`. As in compressed-tensors, 255 is infinite (OCP: NaN), and
/// 0 is the subnormal 2^-127, which bf16 can hold too.
pub(crate) fn e8m0(code: u8) -> f32 {
    power_of_two(i32::from(code) - 127)
}

/// `2^exponent` for exponents from -127; infinite from 128 on.
pub(crate) fn power_of_two(exponent: i32) -> f32 {
    debug_assert!(exponent >= -127, "no such power is needed");
    match exponent {
        i32::MIN..=-127 => f32::from_bits(1 << 22),
        -126..=127 => f32::from_bits(((exponent + 127) as u32) << 23),
        128..=i32::MAX => f32::INFINITY,
    }
}

/// Rounded to the nearest bf16, ties to even.
pub(crate) fn round_bf16(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// Rounded to the nearest f16, ties to even.
pub(crate) fn round_f16(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// Rounded to the nearest E4M3, ties to even; for magnitudes up to 448. Keeps the sign of zero.
pub(crate) fn round_e4m3(value: f32) -> f32 {
    // Spacing of E4M3 around the value: eight steps a binade, 2^-9 below 2^-6.
    let exponent = ((value.to_bits() >> 23 & 0xff) as i32 - 127).max(-6);
    let step = power_of_two(exponent - 3);
    // Dividing and multiplying by a power of two is exact, so this rounds once.
    (value / step).round_ties_even() * step
}

/// Rounded to the nearest E2M1, ties to the even code; for magnitudes up to 6. A zero becomes +0, a negative
/// number that rounds to zero becomes -0 (compressed-tensors multiplies by the sign, which is 0 for zeros).
pub(crate) fn round_e2m1(value: f32) -> f32 {
    let magnitude = value.abs();
    let rounded = if magnitude <= 0.25 {
        0.0
    } else if magnitude < 0.75 {
        0.5
    } else if magnitude <= 1.25 {
        1.0
    } else if magnitude < 1.75 {
        1.5
    } else if magnitude <= 2.5 {
        2.0
    } else if magnitude < 3.5 {
        3.0
    } else if magnitude <= 5.0 {
        4.0
    } else if magnitude.is_nan() {
        magnitude
    } else {
        6.0
    };
    if value == 0.0 { 0.0 } else { rounded.copysign(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_e4m3_code_rounds_to_itself() {
        for code in 0..=255_u8 {
            let value = e4m3(code);
            if !value.is_nan() {
                assert_eq!(round_e4m3(value).to_bits(), value.to_bits(), "code {code:#x}");
            }
        }
        assert_eq!(e4m3(0x7e), 448.0);
        assert_eq!(e4m3(0x01), 1.0 / 512.0);
    }

    #[test]
    fn e4m3_ties_go_to_even_and_small_numbers_to_zero() {
        assert_eq!(round_e4m3(17.0), 16.0);
        assert_eq!(round_e4m3(19.0), 20.0);
        assert_eq!(round_e4m3(1.0 / 1024.0), 0.0);
        assert_eq!(round_e4m3(3.0 / 1024.0), 4.0 / 1024.0);
        assert_eq!(round_e4m3(-1e-30).to_bits(), (-0.0_f32).to_bits());
    }

    #[test]
    fn e2m1_ties_go_to_the_even_code() {
        let midpoints =
            [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)];
        for (value, expected) in midpoints {
            assert_eq!(round_e2m1(value), expected);
            assert_eq!(round_e2m1(-value), -expected);
        }
        assert_eq!(round_e2m1(-0.0).to_bits(), 0);
        assert_eq!(round_e2m1(-0.1).to_bits(), (-0.0_f32).to_bits());
    }

    #[test]
    fn e8m0_reaches_a_subnormal_and_infinity() {
        assert_eq!(e8m0(127), 1.0);
        assert_eq!(e8m0(1), f32::MIN_POSITIVE);
        assert_eq!(e8m0(0), f32::MIN_POSITIVE / 2.0);
        assert_eq!(round_bf16(e8m0(0)), e8m0(0));
        assert_eq!(e8m0(255), f32::INFINITY);
    }
}
