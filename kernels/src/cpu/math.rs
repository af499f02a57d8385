//! Elementary functions and roundings from formulas of our own, so that bits do not depend on the platform's libm.
//! One number in, one number out: knows neither matrices nor schemes.

/// Nearest bf16, ties to even, as an f32. Infinities and NaN stay.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    f32::from_bits(if x.is_nan() { bits } else { rounded })
}

/// `e^x` rounded once: 2^n times a Taylor polynomial of degree 10 on `|r| <= ln(2)/2`, in f64.
///
/// The relative error before the rounding is below 1e-12, so the result is the nearest f32 but where e^x lies that
/// close to the middle of two. Branch-free; products and sums are rounded one by one, so that every instruction set
/// gives the same bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Beyond these e^x is 0 or infinite in f32; the clamp keeps 2^n in the range of f64.
    let x = f64::from(x.clamp(-110.0, 100.0));
    // Adding and subtracting 1.5 * 2^52 rounds to the nearest integer without a library call.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * std::f64::consts::LN_2;
    let mut p = 1.0 / 3_628_800.0;
    p = p * r + 1.0 / 362_880.0;
    p = p * r + 1.0 / 40_320.0;
    p = p * r + 1.0 / 5_040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // The low bits of `shifted` are n, and those of ROUND are zero: no conversion that vectors lack. A NaN has no n; it
    // is in `p` already.
    let power = shifted.to_bits().wrapping_add(1023) << 52;
    (p * f64::from_bits(power)) as f32
}

/// `e^x` for x of at most 88, within 0.9 units in the last place of f32, in f32 alone: 2^n times a polynomial of degree 6
/// on `|r| <= ln(2)/2`, the one that begins with `1 + r` and has the smallest largest relative error, 3.1e-9. Below -87,
/// close to the smallest normal number, it is 0. `e^0` is 1, a NaN stays.
///
/// A fused multiply-add is rounded once everywhere, so every instruction set gives the same bits.
#[inline(always)]
pub(crate) fn exp_fast(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln(2) in two parts, the first short enough for an exact product.
    let r = n.mul_add(-355.0 / 512.0, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 0.001_381_454_f32.mul_add(r, 0.008_368_745);
    let p = p.mul_add(r, 0.041_668_39);
    let p = p.mul_add(r, 0.166_665_21);
    let p = p.mul_add(r, 0.499_999_93);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    // A NaN is in `p` already, whatever its exponent.
    let scaled = p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { scaled }
}

/// `tanh(x)` by [`exp_fast`], within a few units in the last place: a Taylor polynomial where `1 - e^-2|x|` would cancel.
#[inline(always)]
pub(crate) fn tanh_fast(x: f32) -> f32 {
    let e = exp_fast(-2.0 * x.abs());
    let far = (1.0 - e) / (1.0 + e);
    let square = x * x;
    let p = (-0.008_863_236_f32).mul_add(square, 0.021_869_488);
    let p = p.mul_add(square, -0.053_968_254);
    let p = p.mul_add(square, 0.133_333_33);
    let p = p.mul_add(square, -0.333_333_33);
    let near = (p * square).mul_add(x, x);
    if x.abs() < 0.25 { near } else { far.copysign(x) }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Nearest fp8 E4M3 number for `|x| <= 448`, ties to even. Branch-free.
#[inline(always)]
pub(crate) fn round_e4m3(x: f32) -> f32 {
    let bits = x.to_bits();
    let normal = f32::from_bits(bits.wrapping_add(0x7_ffff + ((bits >> 20) & 1)) & !0xf_ffff);
    // Subnormal: steps of 2^-9, those of f32 from 2^14 on.
    const ROUND: f32 = 16_384.0;
    let subnormal = ((x.abs() + ROUND) - ROUND).copysign(x);
    if x.abs() >= 0.015_625 { normal } else { subnormal }
}

/// Nearest fp4 E2M1 number, ties to the even code, saturating at 6 (compressed-tensors' `cast_to_fp4`); 6 for NaN.
/// The definition of what runs of sixteen do.
#[cfg(test)]
pub(crate) fn round_e2m1(x: f32) -> f32 {
    let magnitude = if x.abs() < 6.0 { x.abs() } else { 6.0 };
    // Steps of a half below 2, of 1 below 4, else of 2: those of f32 from 2^22, 2^23 and 2^24 on.
    let large = if magnitude < 4.0 { 8_388_608.0 } else { 16_777_216.0 };
    let round = if magnitude < 2.0 { 4_194_304.0 } else { large };
    let rounded = (magnitude + round) - round;
    if x < 0.0 { -rounded } else { rounded }
}

/// Value of an fp8 E4M3 (fn) code.
pub(crate) fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// Value of an fp4 E2M1 code.
pub(crate) fn e2m1(code: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[usize::from(code & 7)];
    if code & 8 != 0 { -magnitude } else { magnitude }
}

/// `2^(code - 127)` rounded to bf16: what compressed-tensors makes of an E8M0 scale.
pub(crate) fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::INFINITY,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_the_nearest_f32() {
        let mut x = -87.0_f32;
        while x < 88.0 {
            assert_eq!(exp(x).to_bits(), (libm::exp(f64::from(x)) as f32).to_bits(), "{x}");
            x += 0.000_93;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(200.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(-100.0), libm::exp(-100.0) as f32, "a subnormal result");
    }

    /// Every 2^9 th f32, and those beside each of them that ends in zeros: ties and what lies next to them.
    fn sampled() -> impl Iterator<Item = f32> {
        let ends = (0..=u32::MAX >> 9).map(|high| high << 9);
        ends.flat_map(|bits| [bits.wrapping_sub(1), bits, bits + 1, bits + 0x7e]).map(f32::from_bits)
    }

    #[test]
    fn fp4_rounding_is_the_ladder_of_compressed_tensors() {
        for x in sampled() {
            let magnitude = x.abs();
            let expected = if magnitude <= 0.25 {
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
            } else {
                6.0
            };
            let expected = if x < 0.0 { -expected } else { expected };
            assert_eq!(round_e2m1(x).to_bits(), f32::to_bits(expected), "{x:e}");
        }
    }

    #[test]
    fn fp8_rounding_is_that_of_integers_at_each_exponent() {
        for x in sampled().filter(|x| x.abs() <= 448.0) {
            // Three bits after the leading one, or steps of 2^-9.
            let exponent = libm::ilogbf(x).max(-6);
            let step = libm::ldexp(1.0, exponent - 3);
            let expected = ((f64::from(x) / step).round_ties_even() * step) as f32;
            assert_eq!(round_e4m3(x).to_bits(), expected.to_bits(), "{x:e}");
        }
        assert!(round_e4m3(f32::NAN).is_nan());
    }

    /// Distance to the true value in units of its last place as an f32.
    fn units(found: f32, x: f32, of: fn(f64) -> f64) -> f64 {
        let value = of(f64::from(x));
        let exponent = (value.abs().to_bits() >> 52) as i32 - 1023;
        (f64::from(found) - value).abs() / 2.0_f64.powi(exponent.max(-126) - 23)
    }

    #[test]
    fn the_fast_exponential_is_within_one_unit() {
        let mut worst = 0.0_f64;
        // Every 997th number from the smallest to 87, of both signs: all exponents, and mantissas of all kinds.
        for bits in (1..=87.0_f32.to_bits()).step_by(997) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                worst = worst.max(units(exp_fast(x), x, libm::exp));
            }
        }
        assert!(worst < 0.9, "{worst} units");
        assert_eq!(exp_fast(0.0), 1.0);
        assert_eq!(exp_fast(-0.0), 1.0);
        assert_eq!(exp_fast(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_fast(-87.0_f32.next_up()).to_bits(), 0);
        assert!(exp_fast(-87.0) >= f32::MIN_POSITIVE);
        assert!(exp_fast(f32::NAN).is_nan());
        assert!(exp_fast(-f32::NAN).is_nan());
    }

    #[test]
    fn the_fast_tangent_is_within_a_few_units() {
        for bits in (1..=100.0_f32.to_bits()).step_by(9973) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let units = units(tanh_fast(x), x, libm::tanh);
                assert!(units <= 4.0, "{x:e}: {units} units");
            }
        }
        assert_eq!(tanh_fast(f32::INFINITY), 1.0);
        assert_eq!(tanh_fast(f32::NEG_INFINITY), -1.0);
        assert!(tanh_fast(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounding_is_that_of_the_half_crate() {
        for high in 0..=0xffff_u32 {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(high << 16 | low);
                let expected = half::bf16::from_f32(x).to_f32();
                let found = round_bf16(x);
                assert!(
                    found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
                    "{x:e}"
                );
            }
        }
    }

    #[test]
    fn e4m3_rounding_finds_the_nearest_code() {
        let codes: Vec<f32> = (0..127).map(e4m3).collect();
        for index in 0..codes.len() - 1 {
            let (below, above) = (codes[index], codes[index + 1]);
            assert_eq!(round_e4m3(below), below);
            let middle = (below + above) / 2.0;
            let even = if index % 2 == 0 { below } else { above };
            assert_eq!(round_e4m3(middle), even, "a tie between {below} and {above}");
            assert_eq!(round_e4m3(f32::from_bits(middle.to_bits() - 1)), below);
            assert_eq!(round_e4m3(-f32::from_bits(middle.to_bits() + 1)), -above);
        }
    }
}
