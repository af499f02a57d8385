//! `e^x` of 64 floats at once, with the bits of [`math::exp`](crate::cpu::math::exp): its chain of dependent operations
//! is long, and eight of them side by side keep a processor busy where one after the other does not.
#![expect(unsafe_code, reason = "vector instructions need their instruction set")]

use super::line::{LINE, Line, Portable};

/// Lines whose exponentials are found side by side.
pub(crate) const LINES: usize = 4;

/// A line that becomes doubles and comes back.
///
/// # Safety
/// Every method asks for a processor that has the instruction set.
pub(crate) trait Wide: Line {
    /// Eight doubles.
    type Doubles: Doubles;

    unsafe fn widen(self) -> [Self::Doubles; 2];
    /// Rounded once.
    unsafe fn narrow(doubles: [Self::Doubles; 2]) -> Self;
}

/// Eight doubles.
///
/// # Safety
/// As [`Wide`].
pub(crate) trait Doubles: Copy {
    /// `self * factor + term`, each rounded.
    unsafe fn times_plus(self, factor: Self, term: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn splat(value: f64) -> Self;
    /// The double whose exponent is the low bits of this one: 2^n for `n + 1.5 * 2^52`.
    unsafe fn power(self) -> Self;
}

/// `e^x`.
///
/// # Safety
/// As [`Wide`].
#[inline(always)]
pub(crate) unsafe fn exp<L: Wide>(x: [L; LINES]) -> [L; LINES] {
    const ROUND: f64 = 6_755_399_441_055_744.0;
    /// Of the powers of r, from the tenth on.
    const TERMS: [f64; 10] = [
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    // SAFETY: the caller's promise.
    unsafe {
        let splat = L::Doubles::splat(0.0);
        let (mut r, mut power, mut p) = ([splat; 2 * LINES], [splat; 2 * LINES], [splat; 2 * LINES]);
        for at in 0..LINES {
            let inside = L::splat(100.0).smaller(L::splat(-110.0).larger(x[at]));
            [r[2 * at], r[2 * at + 1]] = inside.widen();
        }
        for at in 0..2 * LINES {
            let shifted =
                r[at].times_plus(L::Doubles::splat(std::f64::consts::LOG2_E), L::Doubles::splat(ROUND));
            power[at] = shifted.power();
            let n = shifted.times_plus(L::Doubles::splat(1.0), L::Doubles::splat(-ROUND));
            r[at] = n.times_plus(L::Doubles::splat(-std::f64::consts::LN_2), r[at]);
            p[at] = L::Doubles::splat(1.0 / 3_628_800.0);
        }
        // Compilers that see how long this loop is unroll it, and then put one chain behind the other again.
        for term in std::hint::black_box(TERMS.as_slice()) {
            for at in 0..2 * LINES {
                p[at] = p[at].times_plus(r[at], L::Doubles::splat(*term));
            }
        }
        let mut out = x;
        for at in 0..LINES {
            out[at] = L::narrow([p[2 * at].mul(power[2 * at]), p[2 * at + 1].mul(power[2 * at + 1])]);
        }
        out
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Doubles, Wide};
    use crate::cpu::line::{Avx2, Avx512};

    #[derive(Clone, Copy)]
    pub(crate) struct Doubles512(__m512d);

    #[derive(Clone, Copy)]
    pub(crate) struct Doubles256(__m256d, __m256d);

    impl Wide for Avx512 {
        type Doubles = Doubles512;

        #[inline(always)]
        unsafe fn widen(self) -> [Doubles512; 2] {
            // SAFETY: the caller's promise.
            unsafe {
                let high = _mm512_extractf32x8_ps::<1>(self.0);
                [_mm512_castps512_ps256(self.0), high].map(|half| Doubles512(_mm512_cvtps_pd(half)))
            }
        }

        #[inline(always)]
        unsafe fn narrow([low, high]: [Doubles512; 2]) -> Avx512 {
            // SAFETY: the caller's promise.
            unsafe {
                let low = _mm512_castps256_ps512(_mm512_cvtpd_ps(low.0));
                Avx512(_mm512_insertf32x8::<1>(low, _mm512_cvtpd_ps(high.0)))
            }
        }
    }

    impl Doubles for Doubles512 {
        #[inline(always)]
        unsafe fn times_plus(self, factor: Doubles512, term: Doubles512) -> Doubles512 {
            // SAFETY: the caller's promise.
            Doubles512(unsafe { _mm512_add_pd(_mm512_mul_pd(self.0, factor.0), term.0) })
        }

        #[inline(always)]
        unsafe fn mul(self, other: Doubles512) -> Doubles512 {
            // SAFETY: the caller's promise.
            Doubles512(unsafe { _mm512_mul_pd(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn splat(value: f64) -> Doubles512 {
            // SAFETY: the caller's promise.
            Doubles512(unsafe { _mm512_set1_pd(value) })
        }

        #[inline(always)]
        unsafe fn power(self) -> Doubles512 {
            // SAFETY: the caller's promise.
            unsafe {
                let exponent = _mm512_add_epi64(_mm512_castpd_si512(self.0), _mm512_set1_epi64(1023));
                Doubles512(_mm512_castsi512_pd(_mm512_slli_epi64::<52>(exponent)))
            }
        }
    }

    impl Wide for Avx2 {
        type Doubles = Doubles256;

        #[inline(always)]
        unsafe fn widen(self) -> [Doubles256; 2] {
            // SAFETY: the caller's promise.
            unsafe { [eight(self.0), eight(self.1)] }
        }

        #[inline(always)]
        unsafe fn narrow([low, high]: [Doubles256; 2]) -> Avx2 {
            // SAFETY: the caller's promise.
            unsafe {
                Avx2(
                    _mm256_set_m128(_mm256_cvtpd_ps(low.1), _mm256_cvtpd_ps(low.0)),
                    _mm256_set_m128(_mm256_cvtpd_ps(high.1), _mm256_cvtpd_ps(high.0)),
                )
            }
        }
    }

    /// # Safety
    /// As [`Wide`].
    #[inline(always)]
    unsafe fn eight(floats: __m256) -> Doubles256 {
        // SAFETY: the caller's promise.
        unsafe {
            let high = _mm256_extractf128_ps::<1>(floats);
            Doubles256(_mm256_cvtps_pd(_mm256_castps256_ps128(floats)), _mm256_cvtps_pd(high))
        }
    }

    impl Doubles for Doubles256 {
        #[inline(always)]
        unsafe fn times_plus(self, factor: Doubles256, term: Doubles256) -> Doubles256 {
            // SAFETY: the caller's promise.
            unsafe {
                Doubles256(
                    _mm256_add_pd(_mm256_mul_pd(self.0, factor.0), term.0),
                    _mm256_add_pd(_mm256_mul_pd(self.1, factor.1), term.1),
                )
            }
        }

        #[inline(always)]
        unsafe fn mul(self, other: Doubles256) -> Doubles256 {
            // SAFETY: the caller's promise.
            unsafe { Doubles256(_mm256_mul_pd(self.0, other.0), _mm256_mul_pd(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn splat(value: f64) -> Doubles256 {
            // SAFETY: the caller's promise.
            unsafe { Doubles256(_mm256_set1_pd(value), _mm256_set1_pd(value)) }
        }

        #[inline(always)]
        unsafe fn power(self) -> Doubles256 {
            // SAFETY: the caller's promise.
            unsafe { Doubles256(power(self.0), power(self.1)) }
        }
    }

    /// # Safety
    /// As [`Wide`].
    #[inline(always)]
    unsafe fn power(doubles: __m256d) -> __m256d {
        // SAFETY: the caller's promise.
        unsafe {
            let exponent = _mm256_add_epi64(_mm256_castpd_si256(doubles), _mm256_set1_epi64x(1023));
            _mm256_castsi256_pd(_mm256_slli_epi64::<52>(exponent))
        }
    }
}

impl Wide for Portable {
    type Doubles = [f64; 8];

    #[inline(always)]
    unsafe fn widen(self) -> [[f64; 8]; 2] {
        let half = |first: usize| std::array::from_fn(|lane| f64::from(self.0[first + lane]));
        [half(0), half(LINE / 2)]
    }

    #[inline(always)]
    unsafe fn narrow(doubles: [[f64; 8]; 2]) -> Portable {
        Portable(std::array::from_fn(|lane| doubles[lane / 8][lane % 8] as f32))
    }
}

impl Doubles for [f64; 8] {
    #[inline(always)]
    unsafe fn times_plus(self, factor: [f64; 8], term: [f64; 8]) -> [f64; 8] {
        std::array::from_fn(|lane| self[lane] * factor[lane] + term[lane])
    }

    #[inline(always)]
    unsafe fn mul(self, other: [f64; 8]) -> [f64; 8] {
        std::array::from_fn(|lane| self[lane] * other[lane])
    }

    #[inline(always)]
    unsafe fn splat(value: f64) -> [f64; 8] {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn power(self) -> [f64; 8] {
        self.map(|value| f64::from_bits(value.to_bits().wrapping_add(1023) << 52))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::isa::for_each_isa;
    #[cfg(target_arch = "x86_64")]
    use crate::cpu::line::{Avx2, Avx512};
    use crate::cpu::math;

    #[inline(always)]
    fn each<L: Wide>(values: &mut [f32]) {
        let (lines, _) = values.as_chunks_mut::<LINE>();
        for lines in lines.chunks_exact_mut(LINES) {
            // SAFETY: inlined where the instruction set is.
            unsafe {
                let mut x = [L::splat(0.0); LINES];
                for at in 0..LINES {
                    x[at] = L::load(&lines[at]);
                }
                let x = exp(x);
                for at in 0..LINES {
                    x[at].store(&mut lines[at]);
                }
            }
        }
    }

    for_each_isa! {
        fn exponentials(values: &mut [f32]) {
            avx512bf16: each::<Avx512>, avx512: each::<Avx512>, avx2: each::<Avx2>, portable: each::<Portable>,
        }
    }

    #[test]
    fn exponentials_are_those_of_one_by_one() {
        // All exponents and signs, with mantissas all over; NaN and infinities are among them.
        let x: Vec<f32> = (0..1 << 18_u32)
            .map(|at: u32| f32::from_bits(at << 14 | at.wrapping_mul(2_654_435) & 0x3fff))
            .collect();
        for isa in Isa::here() {
            let mut found = x.clone();
            exponentials(isa, &mut found);
            for (x, found) in x.iter().zip(found) {
                let expected = math::exp(*x);
                let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                assert!(same, "{isa:?}: e^{x:e}: {found:e} for {expected:e}");
            }
        }
    }
}
