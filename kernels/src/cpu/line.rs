//! Sixteen floats that are worked on at once, one type for each instruction set: where loops have to be vectors of runs
//! that share something, and compilers would rather gather one float of each run.
//!
//! The methods compile to a few instructions where they are inlined into a function that has the instruction set; that
//! is why all of them are `inline(always)`, and why they are not called from closures, which might stand alone.
#![expect(unsafe_code, reason = "vector instructions need their instruction set")]

/// Floats of a [`Line`].
pub(crate) const LINE: usize = 16;

/// Sixteen floats.
///
/// # Safety
/// Every method asks for a processor that has the instruction set.
pub(crate) trait Line: Copy {
    unsafe fn load(from: &[f32; LINE]) -> Self;
    unsafe fn store(self, to: &mut [f32; LINE]);
    unsafe fn splat(value: f32) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// The smaller of each two; `other` where one is NaN.
    unsafe fn smaller(self, other: Self) -> Self;
    /// The larger of each two; `other` where one is NaN.
    unsafe fn larger(self, other: Self) -> Self;
    /// Those bits of `self` that `mask` has.
    unsafe fn masked(self, mask: u32) -> Self;
    /// Bits of either.
    unsafe fn or(self, other: Self) -> Self;
    /// Nearest whole numbers, ties to even.
    unsafe fn round(self) -> Self;
    /// Zero instead of NaN.
    unsafe fn without_nan(self) -> Self;
    /// The largest of all, none of which is NaN.
    unsafe fn largest(self) -> f32;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LINE, Line};

    /// One register of 512 bits.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(pub(in crate::cpu) __m512);

    /// Two registers of 256 bits.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(pub(in crate::cpu) __m256, pub(in crate::cpu) __m256);

    /// Operations on two lines, lane by lane.
    macro_rules! both {
        ($($name:ident: $wide:ident, $narrow:ident;)*) => {
            impl Avx512 {
                $(#[inline(always)]
                unsafe fn $name(self, other: Avx512) -> Avx512 {
                    // SAFETY: the caller's promise.
                    Avx512(unsafe { $wide(self.0, other.0) })
                })*
            }
            impl Avx2 {
                $(#[inline(always)]
                unsafe fn $name(self, other: Avx2) -> Avx2 {
                    // SAFETY: the caller's promise.
                    unsafe { Avx2($narrow(self.0, other.0), $narrow(self.1, other.1)) }
                })*
            }
        };
    }
    both! {
        sum: _mm512_add_ps, _mm256_add_ps;
        difference: _mm512_sub_ps, _mm256_sub_ps;
        product: _mm512_mul_ps, _mm256_mul_ps;
        quotient: _mm512_div_ps, _mm256_div_ps;
        minimum: _mm512_min_ps, _mm256_min_ps;
        maximum: _mm512_max_ps, _mm256_max_ps;
        all_bits: _mm512_and_ps, _mm256_and_ps;
        any_bits: _mm512_or_ps, _mm256_or_ps;
    }

    /// What both have in common.
    macro_rules! common {
        () => {
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                // SAFETY: the caller's promise.
                unsafe { self.sum(other) }
            }

            #[inline(always)]
            unsafe fn sub(self, other: Self) -> Self {
                // SAFETY: the caller's promise.
                unsafe { self.difference(other) }
            }

            #[inline(always)]
            unsafe fn mul(self, other: Self) -> Self {
                // SAFETY: the caller's promise.
                unsafe { self.product(other) }
            }

            #[inline(always)]
            unsafe fn div(self, other: Self) -> Self {
                // SAFETY: the caller's promise.
                unsafe { self.quotient(other) }
            }

            #[inline(always)]
            unsafe fn smaller(self, other: Self) -> Self {
                // SAFETY: the caller's promise.
                unsafe { self.minimum(other) }
            }

            #[inline(always)]
            unsafe fn larger(self, other: Self) -> Self {
                // SAFETY: the caller's promise.
                unsafe { self.maximum(other) }
            }

            #[inline(always)]
            unsafe fn masked(self, mask: u32) -> Self {
                // SAFETY: the caller's promise.
                unsafe { self.all_bits(Self::splat(f32::from_bits(mask))) }
            }

            #[inline(always)]
            unsafe fn or(self, other: Self) -> Self {
                // SAFETY: the caller's promise.
                unsafe { self.any_bits(other) }
            }
        };
    }

    impl Line for Avx512 {
        common!();

        #[inline(always)]
        unsafe fn load(from: &[f32; LINE]) -> Avx512 {
            // SAFETY: the caller's promise, and sixteen floats.
            Avx512(unsafe { _mm512_loadu_ps(from.as_ptr()) })
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut [f32; LINE]) {
            // SAFETY: the caller's promise, and sixteen floats.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Avx512 {
            // SAFETY: the caller's promise.
            Avx512(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        unsafe fn round(self) -> Avx512 {
            // SAFETY: the caller's promise.
            Avx512(unsafe { _mm512_roundscale_ps::<8>(self.0) })
        }

        #[inline(always)]
        unsafe fn without_nan(self) -> Avx512 {
            // SAFETY: the caller's promise.
            unsafe { Avx512(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_ORD_Q>(self.0, self.0), self.0)) }
        }

        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            // SAFETY: the caller's promise.
            unsafe { _mm512_reduce_max_ps(self.0) }
        }
    }

    impl Line for Avx2 {
        common!();

        #[inline(always)]
        unsafe fn load(from: &[f32; LINE]) -> Avx2 {
            let from = from.as_ptr();
            // SAFETY: the caller's promise, and twice eight floats.
            unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut [f32; LINE]) {
            let to = to.as_mut_ptr();
            // SAFETY: the caller's promise, and twice eight floats.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Avx2 {
            // SAFETY: the caller's promise.
            unsafe { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn round(self) -> Avx2 {
            // SAFETY: the caller's promise.
            unsafe { Avx2(_mm256_round_ps::<8>(self.0), _mm256_round_ps::<8>(self.1)) }
        }

        #[inline(always)]
        unsafe fn without_nan(self) -> Avx2 {
            // SAFETY: the caller's promise.
            unsafe {
                let ordered = Avx2(
                    _mm256_cmp_ps::<_CMP_ORD_Q>(self.0, self.0),
                    _mm256_cmp_ps::<_CMP_ORD_Q>(self.1, self.1),
                );
                self.all_bits(ordered)
            }
        }

        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            // SAFETY: the caller's promise.
            unsafe {
                let eight = _mm256_max_ps(self.0, self.1);
                let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use self::x86::{Avx2, Avx512};

/// One float after the other: the definition.
#[derive(Clone, Copy)]
pub(crate) struct Portable(pub(super) [f32; LINE]);

impl Portable {
    #[inline(always)]
    fn with(self, other: Portable, operation: impl Fn(f32, f32) -> f32) -> Portable {
        Portable(std::array::from_fn(|lane| operation(self.0[lane], other.0[lane])))
    }
}

impl Line for Portable {
    #[inline(always)]
    unsafe fn load(from: &[f32; LINE]) -> Portable {
        Portable(*from)
    }

    #[inline(always)]
    unsafe fn store(self, to: &mut [f32; LINE]) {
        *to = self.0;
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Portable {
        Portable([value; LINE])
    }

    #[inline(always)]
    unsafe fn add(self, other: Portable) -> Portable {
        self.with(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Portable) -> Portable {
        self.with(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Portable) -> Portable {
        self.with(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Portable) -> Portable {
        self.with(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn smaller(self, other: Portable) -> Portable {
        self.with(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn larger(self, other: Portable) -> Portable {
        self.with(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn masked(self, mask: u32) -> Portable {
        Portable(self.0.map(|value| f32::from_bits(value.to_bits() & mask)))
    }

    #[inline(always)]
    unsafe fn or(self, other: Portable) -> Portable {
        self.with(other, |a, b| f32::from_bits(a.to_bits() | b.to_bits()))
    }

    #[inline(always)]
    unsafe fn round(self) -> Portable {
        Portable(self.0.map(f32::round_ties_even))
    }

    #[inline(always)]
    unsafe fn without_nan(self) -> Portable {
        Portable(self.0.map(|value| if value.is_nan() { 0.0 } else { value }))
    }

    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
