// Fragments of operand A in few instructions, with the bits of the CPU backend's weights rounded to bf16. Knows where codes stand in a lane's words; knows no memory and no products.
//
// Which way a matrix's weights are made is settled by its scheme (linear/format.rs):
//   * BY_BF16: codes and scales are bf16 numbers and the product is rounded to bf16: one multiplication of two numbers
//     at a time rounds it once, as the product in f32 is exact.
//   * BY_TABLE: E2M1 codes with scales of 8 bits. The eight magnitudes times each of the 256 scales lie in shared memory;
//     bytes are picked by code.
//   * BY_F32: any other codes of 4 or 8 bits, where weights are not rounded to f16; products in f32, scales as f32.
//   * AS_STORED: bf16 codes.
//   * BY_ANY: what tensor_product.cuh does with anything else; not here.
#pragma once
#include "matrix.cuh"

enum Arithmetic : u32 { BY_BF16, BY_TABLE, BY_F32, AS_STORED, BY_ANY };

// 16 bytes of shared memory, read at once.
struct alignas(16) Entry { u32 words[4]; };

// The same bf16 number twice.
DEV u32 twice(float value) { return pack_bf16(value, value); }

// Bytes of a scale, as shared memory holds it.
template <u32 ARITHMETIC> struct ScaleBytes {
    static constexpr u32 value = ARITHMETIC == BY_BF16 ? 2 : ARITHMETIC == BY_TABLE ? 1 : ARITHMETIC == BY_F32 ? 4 : 0;
};
template <u32 BYTES> DEV u32 scale_of(const u8* scales, u64 index) {
    if (BYTES == 4) return ((const u32*)scales)[index];
    if (BYTES == 2) return ((const u16*)scales)[index];
    return BYTES == 1 ? scales[index] : 0;
}

// What the codes of one row and group are taken with: by arithmetic, the scale, and what is subtracted from a code.
template <u32 CODE, u32 ARITHMETIC> struct Scaling {};
template <u32 CODE> struct Scaling<CODE, BY_BF16> { u32 scale, offset; };
template <> struct Scaling<CODE_E2M1, BY_TABLE> { Entry magnitudes; };
template <u32 CODE> struct Scaling<CODE, BY_F32> { float scale, zero; };

// An entry for each scale of 8 bits: the low bytes of its products with the eight magnitudes of E2M1, then the high ones.
#define MAGNITUDES_ENTRY 16
#define MAGNITUDES_BYTES (256 * MAGNITUDES_ENTRY)
// Called for each stored scale once; whoever looks it up meets whoever fills it first.
DEV void fill_magnitudes(const Matrix& m, u8* table, u32 stored) {
    float scale = scale_value(m, stored);
    u32 bytes[4] = {0, 0, 0, 0};
    UNROLL
    for (u32 code = 0; code < 8; code++) {
        float weight = code_value<CODE_E2M1>(m, code, 0.0f) * scale;
        if (m.rounding == ROUND_F16) weight = f16_to_f32(f32_to_f16(weight));
        u32 bits = pack_bf16(weight, 0.0f);
        bytes[code / 4] |= (bits & 255) << (8 * (code % 4));
        bytes[2 + code / 4] |= (bits >> 8 & 255) << (8 * (code % 4));
    }
    store16(table + stored * MAGNITUDES_ENTRY, Quad{bytes[0], bytes[1], bytes[2], bytes[3]});
}

// `stored` are the bits of a scale, `zero` its zero point: with bf16 at most 120, so that the offset is a bf16 number.
template <u32 CODE> DEV void prepare(const Matrix& m, const u8*, u32 stored, float zero, Scaling<CODE, BY_BF16>& to) {
    to.scale = stored | stored << 16;
    // A code in the mantissa of 128 is 128 more than it; that of an fp8 number is the number.
    to.offset = CODE == CODE_E4M3 ? 0 : twice(m.code_offset - 8388608.0f + 128.0f + zero);
}
template <u32 CODE>
DEV void prepare(const Matrix&, const u8* table, u32 stored, float, Scaling<CODE, BY_TABLE>& to) {
    to.magnitudes = *(const Entry*)(table + stored * MAGNITUDES_ENTRY);
}
template <u32 CODE> DEV void prepare(const Matrix&, const u8*, u32 stored, float zero, Scaling<CODE, BY_F32>& to) {
    to.scale = float_of(stored);
    to.zero = zero;
}
template <u32 CODE> DEV void prepare(const Matrix&, const u8*, u32, float, Scaling<CODE, AS_STORED>&) {}

// The pair of register `r` of slice `s` as 4-bit codes in bits 0..4 of each half, or 8-bit codes in bits 0..8.
template <u32 CODE> DEV u32 code_pair(const u32 (&words)[CodeBits<CODE>::value], u32 s, u32 r) {
    if (CodeBits<CODE>::value == 4) return words[s] >> (4 * r) & 0x000f000f;
    return words[(2 * s + (r >> 1)) % CodeBits<CODE>::value] >> (8 * (r & 1)) & 0x00ff00ff;
}

// Values of a pair of codes as bf16 numbers, exact, integers less `offset`.
template <u32 CODE> DEV u32 pair_values(const u32 (&words)[CodeBits<CODE>::value], u32 s, u32 r, u32 offset) {
    u32 pair = code_pair<CODE>(words, s, r);
    if (CODE == CODE_INT4) return subtract_bf16(pair | 0x43004300, offset);
    // The mantissa holds seven bits; the eighth takes 128 from what is subtracted, 256 where codes have eight bits.
    if (CODE == CODE_INT8) return subtract_bf16((pair & 0x007f007f) | 0x43004300, offset ^ (pair & 0x00800080));
    // The exponent's bias is 120 less than that of bf16; subnormal codes are subnormal numbers of bf16.
    return multiply_bf16((pair & 0x00800080) << 8 | (pair & 0x007f007f) << 4, 0x7b807b80);
}

// Operand A of slice `s`: row lane / 4 of the atom is taken with rows[0], row lane / 4 + 8 with rows[1].
template <u32 CODE>
DEV void operand(const Matrix&, const u32 (&words)[CodeBits<CODE>::value], u32 s, const Scaling<CODE, BY_BF16> (&rows)[2],
                 u32 (&a)[4]) {
    UNROLL
    for (u32 r = 0; r < 4; r++)
        a[r] = multiply_bf16(pair_values<CODE>(words, s, r, rows[r & 1].offset), rows[r & 1].scale);
}

// Codes 0, 4, 2 and 6 of the word are of the upper row, in registers 0 and 2; the others of the lower one.
template <u32 CODE>
DEV void operand(const Matrix&, const u32 (&words)[CodeBits<CODE>::value], u32 s, const Scaling<CODE, BY_TABLE> (&rows)[2],
                 u32 (&a)[4]) {
    UNROLL
    for (u32 high = 0; high < 2; high++) {
        u32 codes = words[s] >> (4 * high);
        u32 selector = ((codes & 0x0f0f) | (words[s] >> (12 + 4 * high) & 0xf0f0)) & 0x7777;
        const Entry& entry = rows[high].magnitudes;
        u32 low_bytes = pick_bytes(entry.words[0], entry.words[1], selector);
        u32 high_bytes = pick_bytes(entry.words[2], entry.words[3], selector);
        a[high] = pick_bytes(low_bytes, high_bytes, 0x5140);
        a[high + 2] = pick_bytes(low_bytes, high_bytes, 0x7362);
    }
    UNROLL
    for (u32 r = 0; r < 4; r++) a[r] ^= words[s] << (12 - 4 * r) & 0x80008000;
}

template <u32 CODE>
DEV void operand(const Matrix& m, const u32 (&words)[CodeBits<CODE>::value], u32 s, const Scaling<CODE, BY_F32> (&rows)[2],
                 u32 (&a)[4]) {
    UNROLL
    for (u32 r = 0; r < 4; r++) {
        const Scaling<CODE, BY_F32>& row = rows[r & 1];
        float weights[2];
        if (CODE == CODE_E4M3) {
            u32 values = pair_values<CODE>(words, s, r, 0);
            weights[0] = float_of(values << 16) - row.zero;
            weights[1] = float_of(values & 0xffff0000) - row.zero;
        } else {
            weights[0] = code_value<CODE>(m, code_of<CODE>(words, s, r, 0), row.zero);
            weights[1] = code_value<CODE>(m, code_of<CODE>(words, s, r, 1), row.zero);
        }
        a[r] = pack_bf16(weights[0] * row.scale, weights[1] * row.scale);
    }
}

template <u32 CODE>
DEV void operand(const Matrix&, const u32 (&words)[CodeBits<CODE>::value], u32 s, const Scaling<CODE, AS_STORED> (&)[2],
                 u32 (&a)[4]) {
    UNROLL
    for (u32 r = 0; r < 4; r++) a[r] = words[(4 * s + r) % CodeBits<CODE>::value];
}
