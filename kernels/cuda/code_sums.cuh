// Products of codes, whichever tensor cores make them: operand A, and what becomes of the sums of a segment.
// The formulas are those of kernels/src/cpu/exact.rs.
#pragma once
#include "codes.cuh"
#include "matrix.cuh"

struct CodesArgs {
    Matrix matrix;            // with its stored scales
    const u8* x;              // codes [m, k_tiles * 64]: bytes by code_slot(), integers or fp8; or f16
    const float* scales;      // of activations [m, k / segment]
    const float* offsets;     // zero points of integers, as the scales, or null
    const i32* input_sums;    // sums of the integers of each segment [m, segments] where weights have zero points
    float* y;                 // [m, y_stride]
    u32 m;
    u32 y_stride;
    u32 step;                 // k of one segment
    u32 segment;              // k that share an activation scale
};

enum CodeArithmetic : u32 {
    // Both sides are integers without zero points, or with some.
    INTEGERS,
    SHIFTED_INTEGERS,
    // Activations are f16.
    HALVES,
    // Both sides are fp8, and so are the tensor cores. Those of Hopper keep about 14 bits of a sum: what a stage sums is
    // added in f32.
    FP8
};

template <u32 ARITHMETIC> struct CodesKind {
    typedef i32 Sum;
    // k of one instruction, and bytes of an activation: a step takes 32 bytes of a token either way.
    static constexpr u32 STEP = 32, BYTES = 1;
};
template <> struct CodesKind<HALVES> {
    typedef float Sum;
    static constexpr u32 STEP = 16, BYTES = 2;
};
template <> struct CodesKind<FP8> {
    typedef float Sum;
    static constexpr u32 STEP = 32, BYTES = 1;
};

// Register `r` of operand A of step `s`, as codes of 8 bits lie in a tile: bytes in the order of code_slot().
DEV u32 byte_codes(const u32 (&words)[8], u32 s, u32 r) {
    return pick_bytes(words[4 * s + r / 2 * 2], words[4 * s + r / 2 * 2 + 1], r & 1 ? 0x7351 : 0x6240);
}

// Operand A of one step: bytes in the order of code_slot(). A stored integer is `bias` above its value: with 128 - bias
// more it is 128 above, without a carry, and the highest bit makes a signed byte of it.
template <u32 CODE> DEV void integer_operand(const u32 (&words)[CodeBits<CODE>::value], u32 s, u32 bias, u32 (&a)[4]) {
    constexpr u32 SIZE = CodeBits<CODE>::value;
    u32 above = (128 - bias) * 0x01010101u;
    UNROLL
    for (u32 r = 0; r < 4; r++) {
        u32 bytes;
        if constexpr (SIZE == 4) bytes = words[2 * s + r / 2] >> (4 * (r & 1)) & 0x0f0f0f0fu;
        else bytes = byte_codes(words, s, r);
        a[r] = (bytes + above) ^ 0x80808080u;
    }
}

// Operand A of one step: integers less their zero points, or fp8 numbers times 2^-8, which f16 holds exactly. No code
// of weights is a NaN: those are refused when a checkpoint is read.
template <u32 CODE>
DEV void half_operand(const Matrix& m, const u32 (&words)[CodeBits<CODE>::value], u32 s, const float (&zero)[2], u32 (&a)[4]) {
    UNROLL
    for (u32 r = 0; r < 4; r++) {
        if (CODE == CODE_E4M3) {
            u32 word = words[(2 * s + r / 2) % CodeBits<CODE>::value], high = r & 1 ? word : word << 8;
            a[r] = (high & 0x80008000u) | (high & 0x7f007f00u) >> 1;
        } else {
            a[r] = pack_f16(code_value<CODE>(m, code_of<CODE>(words, s, r, 0), zero[r & 1]),
                            code_value<CODE>(m, code_of<CODE>(words, s, r, 1), zero[r & 1]));
        }
    }
}

// Ones where k, from `first` on in the order of code_slot(), is inside the matrix: times them a row's codes are summed.
DEV u32 ones(u32 first, u32 k) {
    if (first + 16 <= k) return 0x01010101u;
    u32 word = 0;
    UNROLL
    for (u32 i = 0; i < 4; i++)
        if (first + 2 * (lane() % 4) + i / 2 + 8 * (i % 2) < k) word |= 1u << (8 * i);
    return word;
}

// What activations of one token have in one segment.
struct TokenFactors {
    float scale, offset;
    u32 sum;
};

// Zero points up to here leave a difference of two codes below 2^8 in magnitude, and sums in 32 bits.
#define NEAR_ZERO 128.0f

// sum of (q - o)(w - z) = sum of q w - o sum of w - z (sum of q - o length), rounded once.
DEV float shift_back(i32 sum, const TokenFactors& token, i32 column, i32 zero, u32 length) {
    if (magnitude(token.offset) <= NEAR_ZERO) {
        u32 offset = (u32)(i32)token.offset;
        u32 inputs = token.sum - offset * length;
        return (float)(i32)((u32)sum - offset * (u32)column - (u32)zero * inputs);
    }
    double offset = (double)token.offset;
    double inputs = (double)(i32)token.sum - offset * (double)length;
    return (float)((double)sum - offset * (double)column - (double)zero * inputs);
}

// A segment's place among those of activations.
struct SegmentPlace {
    u32 start, length;
    // Scales of a token, and which of them; segments of a token, and which of them.
    u32 scales, scale, segments, segment;
};

template <bool SHIFTED> DEV TokenFactors token_factors(const CodesArgs& args, const SegmentPlace& place, u32 token) {
    // Nobody stores what tokens beyond the last get.
    token = least(token, args.m - 1);
    u64 at = (u64)token * place.scales + place.scale;
    TokenFactors factors{place.scales > 1 ? args.scales[at] : 1.0f, 0.0f, 0};
    if (SHIFTED) {
        if (args.offsets) factors.offset = args.offsets[at];
        if (args.input_sums) factors.sum = (u32)args.input_sums[(u64)token * place.segments + place.segment];
    }
    return factors;
}

DEV SegmentPlace segment_place(const CodesArgs& args, u32 start) {
    u32 k = args.matrix.k;
    return SegmentPlace{start, least(args.step, k - start), k / args.segment, start / args.segment,
                        (k + args.step - 1) / args.step, start / args.step};
}
