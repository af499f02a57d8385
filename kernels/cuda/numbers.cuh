// Roundings and elementary functions in plain IEEE arithmetic: the formulas of the CPU backend
// (kernels/src/cpu/math.rs), operation by operation, so that both give the same bits.
#pragma once
#include "arch.cuh"

// Whether the bits are neither a NaN's nor an infinity's.
DEV bool is_finite(u32 bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

// Nearest bf16 number as an f32. Infinities and NaN stay.
DEV float round_bf16(float x) {
    u32 bits = bits_of(x);
    u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return x != x ? x : float_of(rounded);
}

// e^x rounded once: 2^n times a Taylor polynomial of degree 10 on |r| <= ln(2)/2, in f64.
DEV float exp_rounded(float x) {
    // A NaN passes both comparisons and stays.
    double wide = x < -110.0f ? -110.0 : x > 100.0f ? 100.0 : (double)x;
    const double ROUND = 6755399441055744.0;
    double n = (wide * 1.4426950408889634074 + ROUND) - ROUND;
    double r = wide - n * 0.69314718055994530942;
    double p = 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // A NaN has no exponent; it is in p already.
    i32 exponent = n == n ? (i32)n : 0;
    return (float)(p * double_of((u64)(exponent + 1023) << 52));
}

// x / (1 + e^-x).
DEV float silu(float x) { return x / (1.0f + exp_rounded(-x)); }

// e^x = p * 2^n for x of at most 88, in f32 alone: p is a polynomial (that of Cephes' expf) on |r| <= ln(2)/2.
struct Exponential {
    float p;
    // Its low bits are those of n.
    u32 n;
};
DEV Exponential exponential_parts(float x) {
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    const float ROUND = 12582912.0f;
    float shifted = fused(x, 1.44269504f, ROUND);
    float n = shifted - ROUND;
    // ln(2) in two parts, the first short enough for an exact product.
    float r = fused(n, -0.693359375f, x);
    r = fused(n, 2.12194440e-4f, r);
    float p = fused(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    return Exponential{fused(p, r * r, r) + 1.0f, bits_of(shifted)};
}

// e^x for x of at most 88, within about one unit in the last place of f32. Below -87, close to the smallest normal
// number, it is 0. exp_fast(0) is 1.
DEV float exp_fast(float x) {
    Exponential parts = exponential_parts(x);
    // A NaN is in p already, whatever its exponent.
    float scaled = parts.p * float_of((parts.n + 127u) << 23);
    return x < -87.0f ? 0.0f : scaled;
}

// The same for an x that is no NaN. What is not 0 is a normal number: a sum of exponents is the product with 2^n.
DEV float exp_fast_number(float x) {
    Exponential parts = exponential_parts(x);
    float scaled = float_of(bits_of(parts.p) + (parts.n << 23));
    return x < -87.0f ? 0.0f : scaled;
}

// tanh(x) by exp_fast, within a few units in the last place: a Taylor polynomial where 1 - e^-2|x| would cancel.
DEV float tanh_fast(float x) {
    float size = magnitude(x);
    float e = exp_fast(-2.0f * size);
    float far = (1.0f - e) / (1.0f + e);
    float square = x * x;
    float p = fused(-0.00886323552f, square, 0.0218694885f);
    p = fused(p, square, -0.0539682540f);
    p = fused(p, square, 0.133333333f);
    p = fused(p, square, -0.333333333f);
    float near = fused(p * square, x, x);
    return size < 0.25f ? near : x < 0.0f ? -far : far;
}

// As f32::clamp: a NaN stays.
DEV float clamped(float x, float low, float high) { return x < low ? low : high < x ? high : x; }

// Nearest fp8 E4M3 number for |x| <= 448, ties to even.
DEV float round_e4m3(float x) {
    u32 bits = bits_of(x);
    float normal = float_of((bits + 0x7ffffu + ((bits >> 20) & 1u)) & ~0xfffffu);
    // Subnormal: steps of 2^-9. A NaN takes this way too.
    return magnitude(x) >= 0.015625f ? normal : nearest(x * 512.0f) / 512.0f;
}

// Code of an fp8 E4M3 number; zero for a NaN.
DEV u32 e4m3_code(float x) {
    // The exponent's bias is 120 less than that of an f32; subnormal codes are subnormal numbers of f32.
    u32 bits = bits_of(x * 0x1p-120f);
    return x == x ? (bits >> 24 & 0x80) | (bits >> 20 & 0x7f) : 0;
}

// Nearest fp4 E2M1 number, ties to the even code, saturating at 6 (compressed-tensors' `cast_to_fp4`).
DEV float round_e2m1(float x) {
    float m = magnitude(x);
    float rounded = m <= 0.25f ? 0.0f
                    : m < 0.75f ? 0.5f
                    : m <= 1.25f ? 1.0f
                    : m < 1.75f ? 1.5f
                    : m <= 2.5f ? 2.0f
                    : m < 3.5f ? 3.0f
                    : m <= 5.0f ? 4.0f
                                : 6.0f;
    return x < 0.0f ? -rounded : rounded;
}

// e^x in f64, as the `libm` crate computes it (FreeBSD's e_exp.c): argument reduction to |r| <= ln(2)/2, a rational
// function of r, and 2^k in two steps where one would leave the range.
DEV double exp_double(double x) {
    if (x != x) return x;
    if (x > 709.782712893383973096) return double_of(0x7ff0000000000000ull);
    if (x < -745.13321910194110842) return 0.0;
    u32 size = (u32)(bits_of(x) >> 32) & 0x7fffffffu;
    bool negative = bits_of(x) >> 63;
    i32 k = 0;
    double high = x, low = 0.0;
    if (size > 0x3fd62e42) {
        k = size >= 0x3ff0a2b2 ? (i32)(1.44269504088896338700e+00 * x + (negative ? -0.5 : 0.5)) : negative ? -1 : 1;
        high = x - (double)k * 6.93147180369123816490e-01;
        low = (double)k * 1.90821492927058770002e-10;
    } else if (size <= 0x3e300000) {
        return 1.0 + x;
    }
    double r = high - low;
    double square = r * r;
    double p = 4.13813679705723846039e-08;
    p = -1.65339022054652515390e-06 + square * p;
    p = 6.61375632143793436117e-05 + square * p;
    p = -2.77777777770155933842e-03 + square * p;
    p = 1.66666666666666019037e-01 + square * p;
    double c = r - square * p;
    double y = 1.0 + (r * c / (2.0 - c) - low + high);
    if (k > 1023) {
        y *= double_of(0x7fe0000000000000ull);  // 2^1023
        k -= 1023;
    } else if (k < -1022) {
        y *= double_of(0x0360000000000000ull);  // 2^-969: no subnormal yet, so that there is one rounding
        k += 969;
    }
    return y * double_of((u64)(k + 1023) << 52);
}
