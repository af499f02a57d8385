//! Vectors of outputs, one type for each instruction set: load, store and fused multiply-add, nothing more.
//!
//! The methods compile to single instructions where they are inlined into a function that has the instruction set;
//! that is why all of them are `inline(always)`.
#![expect(unsafe_code, reason = "vector instructions take pointers and need their instruction set")]

/// A vector of floats.
pub(crate) trait Vector: Copy {
    /// Float type of one lane.
    type Element: Copy + Fused;
    /// Lanes.
    const LANES: usize;

    /// # Safety
    /// `from` points to `LANES` floats, and the processor has the instruction set.
    unsafe fn load(from: *const Self::Element) -> Self;

    /// # Safety
    /// `to` points to `LANES` floats, and the processor has the instruction set.
    unsafe fn store(self, to: *mut Self::Element);

    /// `factor * weights + sums`, rounded once.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn fused(factor: Self::Element, weights: Self, sums: Self) -> Self;
}

/// Fused multiply-add of one float.
pub(crate) trait Fused {
    /// `self * weight + sum`, rounded once.
    fn fused(self, weight: Self, sum: Self) -> Self;
}

impl Fused for f32 {
    #[inline(always)]
    fn fused(self, weight: f32, sum: f32) -> f32 {
        self.mul_add(weight, sum)
    }
}

impl Fused for f64 {
    #[inline(always)]
    fn fused(self, weight: f64, sum: f64) -> f64 {
        self.mul_add(weight, sum)
    }
}

/// One float: the definition, and whatever is left over at the edge of a panel.
#[derive(Clone, Copy)]
pub(crate) struct Scalar<T>(T);

impl<T: Copy + Fused> Vector for Scalar<T> {
    type Element = T;
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        // SAFETY: the caller's promise.
        Scalar(unsafe { *from })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        // SAFETY: the caller's promise.
        unsafe { *to = self.0 }
    }

    #[inline(always)]
    unsafe fn fused(factor: T, weights: Self, sums: Self) -> Self {
        Scalar(factor.fused(weights.0, sums.0))
    }
}

macro_rules! x86_vector {
    ($name:ident, $element:ty, $lanes:literal, $register:ident, $load:ident, $store:ident, $splat:ident, $fused:ident) => {
        /// A register of this instruction set.
        #[cfg(target_arch = "x86_64")]
        #[derive(Clone, Copy)]
        pub(crate) struct $name(std::arch::x86_64::$register);

        #[cfg(target_arch = "x86_64")]
        impl Vector for $name {
            type Element = $element;
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn load(from: *const $element) -> Self {
                // SAFETY: the caller's promise.
                $name(unsafe { std::arch::x86_64::$load(from) })
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut $element) {
                // SAFETY: the caller's promise.
                unsafe { std::arch::x86_64::$store(to, self.0) }
            }

            #[inline(always)]
            unsafe fn fused(factor: $element, weights: Self, sums: Self) -> Self {
                // SAFETY: the caller's promise.
                $name(unsafe {
                    std::arch::x86_64::$fused(std::arch::x86_64::$splat(factor), weights.0, sums.0)
                })
            }
        }
    };
}

x86_vector!(Avx512, f32, 16, __m512, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps);
x86_vector!(Avx2, f32, 8, __m256, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps);
