//! One instruction's worth of a product: a word of inputs times a vector of words of weights, added to a vector of
//! sums. One type for each instruction set and [`Unit`](super::Unit); lanes are outputs.
//!
//! The methods compile to single instructions where they are inlined into a function that has the instruction set;
//! that is why all of them are `inline(always)`.
#![expect(unsafe_code, reason = "vector instructions take pointers and need their instruction set")]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Products of one unit, summed per lane.
///
/// # Safety
/// Every method asks for a processor that has the instruction set, and for pointers to as many words as are read or
/// written: [`Dot::LANES`], or one for [`Dot::broadcast`].
pub(crate) trait Dot {
    /// Sums of one vector of outputs.
    type Sums: Copy;
    /// Words of weights, or of inputs.
    type Words: Copy;
    /// Outputs of a vector.
    const LANES: usize;

    unsafe fn zero() -> Self::Sums;
    unsafe fn load_sums(from: *const u32) -> Self::Sums;
    unsafe fn store_sums(sums: Self::Sums, to: *mut u32);
    /// Lane by lane.
    unsafe fn add(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    unsafe fn load(from: *const u32) -> Self::Words;
    unsafe fn broadcast(from: *const u32) -> Self::Words;
    unsafe fn dot(sums: Self::Sums, inputs: Self::Words, weights: Self::Words) -> Self::Sums;
}

macro_rules! sums {
    ($register:ty, $zero:ident, $load:ident, $store:ident, $add:ident) => {
        type Sums = $register;

        #[inline(always)]
        unsafe fn zero() -> $register {
            // SAFETY: the caller's promise.
            unsafe { $zero() }
        }

        #[inline(always)]
        unsafe fn load_sums(from: *const u32) -> $register {
            // SAFETY: the caller's promise.
            unsafe { $load(from.cast()) }
        }

        #[inline(always)]
        unsafe fn store_sums(sums: $register, to: *mut u32) {
            // SAFETY: the caller's promise.
            unsafe { $store(to.cast(), sums) }
        }

        #[inline(always)]
        unsafe fn add(a: $register, b: $register) -> $register {
            // SAFETY: the caller's promise.
            unsafe { $add(a, b) }
        }
    };
}

macro_rules! words {
    ($register:ty, $load:ident, $broadcast:ident) => {
        type Words = $register;

        #[inline(always)]
        unsafe fn load(from: *const u32) -> $register {
            // SAFETY: the caller's promise.
            unsafe { $load(from.cast()) }
        }

        #[inline(always)]
        unsafe fn broadcast(from: *const u32) -> $register {
            // SAFETY: the caller's promise.
            unsafe { $broadcast(*from.cast()) }
        }
    };
}

/// f32 by fused multiply-add, 16 lanes.
#[cfg(target_arch = "x86_64")]
pub(crate) struct FloatAvx512;

#[cfg(target_arch = "x86_64")]
impl Dot for FloatAvx512 {
    const LANES: usize = 16;
    sums!(__m512, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps);
    words!(__m512, _mm512_loadu_ps, _mm512_set1_ps);

    #[inline(always)]
    unsafe fn dot(sums: __m512, inputs: __m512, weights: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fmadd_ps(inputs, weights, sums) }
    }
}

/// f32 by fused multiply-add, 8 lanes.
#[cfg(target_arch = "x86_64")]
pub(crate) struct FloatAvx2;

#[cfg(target_arch = "x86_64")]
impl Dot for FloatAvx2 {
    const LANES: usize = 8;
    sums!(__m256, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps);
    words!(__m256, _mm256_loadu_ps, _mm256_set1_ps);

    #[inline(always)]
    unsafe fn dot(sums: __m256, inputs: __m256, weights: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_fmadd_ps(inputs, weights, sums) }
    }
}

/// Pairs of bf16 by `vdpbf16ps`: the odd element of a pair before the even one, each fused, subnormals flushed.
#[cfg(target_arch = "x86_64")]
pub(crate) struct PairAvx512;

#[cfg(target_arch = "x86_64")]
impl Dot for PairAvx512 {
    const LANES: usize = 16;
    sums!(__m512, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps);
    words!(__m512i, _mm512_loadu_si512, _mm512_set1_epi32);

    #[inline(always)]
    unsafe fn dot(sums: __m512, inputs: __m512i, weights: __m512i) -> __m512 {
        // SAFETY: the caller's promise; both are 512 bits.
        unsafe {
            let bf16 = |words: __m512i| std::mem::transmute::<__m512i, __m512bh>(words);
            _mm512_dpbf16_ps(sums, bf16(inputs), bf16(weights))
        }
    }
}

/// Four products of unsigned inputs and signed weights of 8 bits by `vpdpbusd`, 16 lanes.
#[cfg(target_arch = "x86_64")]
pub(crate) struct QuadAvx512;

#[cfg(target_arch = "x86_64")]
impl Dot for QuadAvx512 {
    const LANES: usize = 16;
    sums!(__m512i, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_add_epi32);
    words!(__m512i, _mm512_loadu_si512, _mm512_set1_epi32);

    #[inline(always)]
    unsafe fn dot(sums: __m512i, inputs: __m512i, weights: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_dpbusd_epi32(sums, inputs, weights) }
    }
}

/// Two products of 16-bit integers, 16 lanes.
#[cfg(target_arch = "x86_64")]
pub(crate) struct ShortAvx512;

#[cfg(target_arch = "x86_64")]
impl Dot for ShortAvx512 {
    const LANES: usize = 16;
    sums!(__m512i, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_add_epi32);
    words!(__m512i, _mm512_loadu_si512, _mm512_set1_epi32);

    #[inline(always)]
    unsafe fn dot(sums: __m512i, inputs: __m512i, weights: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_add_epi32(sums, _mm512_madd_epi16(inputs, weights)) }
    }
}

/// Two products of 16-bit integers, 8 lanes.
#[cfg(target_arch = "x86_64")]
pub(crate) struct ShortAvx2;

#[cfg(target_arch = "x86_64")]
impl Dot for ShortAvx2 {
    const LANES: usize = 8;
    sums!(__m256i, _mm256_setzero_si256, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_add_epi32);
    words!(__m256i, _mm256_loadu_si256, _mm256_set1_epi32);

    #[inline(always)]
    unsafe fn dot(sums: __m256i, inputs: __m256i, weights: __m256i) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(inputs, weights)) }
    }
}

/// One f32 after the other: the definition.
pub(crate) struct FloatPortable;

impl Dot for FloatPortable {
    type Sums = f32;
    type Words = f32;
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> f32 {
        0.0
    }

    #[inline(always)]
    unsafe fn load_sums(from: *const u32) -> f32 {
        // SAFETY: the caller's promise.
        f32::from_bits(unsafe { *from })
    }

    #[inline(always)]
    unsafe fn store_sums(sums: f32, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { *to = sums.to_bits() }
    }

    #[inline(always)]
    unsafe fn add(a: f32, b: f32) -> f32 {
        a + b
    }

    #[inline(always)]
    unsafe fn load(from: *const u32) -> f32 {
        // SAFETY: the caller's promise.
        f32::from_bits(unsafe { *from })
    }

    #[inline(always)]
    unsafe fn broadcast(from: *const u32) -> f32 {
        // SAFETY: the caller's promise.
        f32::from_bits(unsafe { *from })
    }

    #[inline(always)]
    unsafe fn dot(sums: f32, input: f32, weight: f32) -> f32 {
        input.mul_add(weight, sums)
    }
}

/// Two products of 16-bit integers: the definition.
pub(crate) struct ShortPortable;

impl Dot for ShortPortable {
    type Sums = i32;
    type Words = u32;
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> i32 {
        0
    }

    #[inline(always)]
    unsafe fn load_sums(from: *const u32) -> i32 {
        // SAFETY: the caller's promise.
        unsafe { *from }.cast_signed()
    }

    #[inline(always)]
    unsafe fn store_sums(sums: i32, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { *to = sums.cast_unsigned() }
    }

    #[inline(always)]
    unsafe fn add(a: i32, b: i32) -> i32 {
        a + b
    }

    #[inline(always)]
    unsafe fn load(from: *const u32) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { *from }
    }

    #[inline(always)]
    unsafe fn broadcast(from: *const u32) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { *from }
    }

    #[inline(always)]
    unsafe fn dot(sums: i32, inputs: u32, weights: u32) -> i32 {
        let half = |word: u32, shift: u32| i32::from((word >> shift) as u16 as i16);
        sums + half(inputs, 0) * half(weights, 0) + half(inputs, 16) * half(weights, 16)
    }
}
