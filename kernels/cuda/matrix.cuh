// A packed matrix and what its codes are worth: bit for bit the weights of the CPU backend (kernels/src/cpu/decode.rs
// and matrix.rs). Knows the tile layout of container/src/tiling.rs; knows no products.
//
// What is wanted (decompressed weights, codes, codes times stored scales) is settled by the descriptor alone: codes
// have no scale and no rounding, stored scales are divided by no global scale.
#pragma once
#include "numbers.cuh"

// Rows, and k, of one tile; rows of one atom of it.
#define MATRIX_TILE 64
#define ATOM 16

// What a code is, and the bits that it takes in a tile.
enum CodeClass : u32 { CODE_INT4, CODE_E2M1, CODE_INT8, CODE_E4M3, CODE_BF16, CODE_F16, CODE_F32 };
enum ScaleType : u32 { SCALE_NONE, SCALE_BF16, SCALE_F16, SCALE_F32, SCALE_E4M3, SCALE_E8M0 };
// Which codes share a scale: all of them, those of a row (in runs of `group`), or those of a rectangle.
enum ScaleSharing : u32 { SHARED_BY_ALL, SHARED_BY_ROW, SHARED_BY_BLOCK };
// Type that a weight is rounded to after the product with its scale.
enum Rounding : u32 { ROUND_NONE, ROUND_BF16, ROUND_F16 };

// Rows of a packed matrix; `MatrixArgs` in matrix.rs.
struct Matrix {
    const u8* codes;   // tiles of the row tiles that hold the rows
    const u8* scales;  // of the same row tiles; of the whole matrix where not shared by row
    const i8* zeros;   // zero points in the order of the scales, or null
    u32 first;         // first row, counted from the first row tile
    u32 n;             // rows
    u32 k;             // the reduction axis
    u32 k_tiles;
    u32 row_tiles;     // that the rows touch
    u32 top;           // row of the whole matrix that is row 0 of the first row tile
    u32 whole_n;       // rows of the whole matrix
    u32 groups;        // runs of k that share a scale
    u32 group;         // k of one run
    u32 sharing;
    u32 block_rows;
    u32 scale_type;
    u32 code;
    u32 rounding;
    float code_offset;  // 2^23 plus what is subtracted from an integer code
    float global;       // divides the scales
};
static_assert(sizeof(Matrix) == 88, "as MatrixArgs in matrix.rs");

// Bits of a code in a tile; also the 32-bit words that a lane holds of one atom's 64 k.
template <u32 CODE> struct CodeBits {
    static constexpr u32 value = CODE <= CODE_E2M1 ? 4 : CODE <= CODE_E4M3 ? 8 : CODE <= CODE_F16 ? 16 : 32;
};

// Whether scales change only at multiples of 16 k, so that one k16 slice of a row has one scale.
DEV bool whole_slices(const Matrix& m) { return m.groups <= 1 || m.group % 16 == 0; }

// Where the scales of a row lie: that of group j is element `base + j * step`.
struct ScalePlace {
    u64 base;
    u32 step;
};

// `row` counts from the first row tile.
DEV ScalePlace scale_place(const Matrix& m, u32 row) {
    if (m.sharing == SHARED_BY_ROW)
        return ScalePlace{(u64)(row / MATRIX_TILE) * m.groups * MATRIX_TILE + row % MATRIX_TILE, MATRIX_TILE};
    // Padding rows have no scale of their own.
    if (m.sharing == SHARED_BY_BLOCK)
        return ScalePlace{(u64)(least(m.top + row, m.whole_n - 1) / m.block_rows) * m.groups, 1};
    return ScalePlace{0, 0};
}

// Bits of a stored scale.
DEV u32 stored_scale(const Matrix& m, u64 index) {
    if (m.scale_type == SCALE_NONE) return 0;
    if (m.scale_type == SCALE_F32) return ((const u32*)m.scales)[index];
    if (m.scale_type <= SCALE_F16) return ((const u16*)m.scales)[index];
    return m.scales[index];
}

DEV float e4m3_to_f32(u32 code) {
    // The exponent's bias is 120 less than that of an f32; subnormal codes are subnormal numbers of f32.
    float value = float_of((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
    return (code & 0x7f) == 0x7f ? float_of(0x7fc00000) : value;
}

// 2^(code - 127) rounded to bf16.
DEV float e8m0_to_f32(u32 code) {
    return float_of(code == 0 ? 0x00400000u : code << 23);
}

// A scale as it is stored. Those of 16 and 32 bits first: those of 8 are looked up where speed counts.
DEV float undivided_scale(const Matrix& m, u32 stored) {
    if (m.scale_type == SCALE_BF16) return bf16_to_f32((u16)stored);
    if (m.scale_type == SCALE_F16) return f16_to_f32((u16)stored);
    if (m.scale_type == SCALE_F32) return float_of(stored);
    if (m.scale_type == SCALE_E4M3) return e4m3_to_f32(stored);
    if (m.scale_type == SCALE_E8M0) return e8m0_to_f32(stored);
    return 1.0f;
}

// What codes are multiplied with.
DEV float scale_value(const Matrix& m, u32 stored) {
    float scale = undivided_scale(m, stored);
    return m.global == 1.0f ? scale : scale / m.global;
}

DEV float scale_at(const Matrix& m, ScalePlace place, u32 group) {
    return scale_value(m, stored_scale(m, place.base + (u64)group * place.step));
}

// Scales of 8 bits have a table of all their values in shared memory, so that the division of NVFP4 is done 256 times a
// block and not for every code.
#define SCALE_TABLE_BYTES 1024
DEV bool small_scales(const Matrix& m) { return m.scale_type >= SCALE_E4M3; }
// Called by 256 threads, who meet before anybody looks a scale up.
DEV void fill_scale_table(const Matrix& m, float* table) {
    if (small_scales(m)) table[thread()] = scale_value(m, thread());
}
DEV float looked_up(const Matrix& m, const float* table, u32 stored) {
    return small_scales(m) ? table[stored & 255] : scale_value(m, stored);
}
DEV float scale_at(const Matrix& m, ScalePlace place, u32 group, const float* table) {
    return looked_up(m, table, stored_scale(m, place.base + (u64)group * place.step));
}
DEV float zero_at(const Matrix& m, ScalePlace place, u32 group) {
    return m.zeros ? (float)m.zeros[place.base + (u64)group * place.step] : 0.0f;
}

// Value of a code less its zero point. Integers are put into the mantissa of 2^23: no conversion, and exact.
template <u32 CODE> DEV float code_value(const Matrix& m, u32 code, float zero) {
    if (CODE == CODE_INT4 || CODE == CODE_INT8) return float_of(0x4b000000u | code) - (m.code_offset + zero);
    // The product with a power of two is exact: a fused multiply-add rounds the difference only.
    if (CODE == CODE_E2M1) return fused(float_of((code & 8) << 28 | (code & 7) << 22), 0x1p126f, -zero);
    if (CODE == CODE_E4M3) return e4m3_to_f32(code) - zero;
    if (CODE == CODE_BF16) return bf16_to_f32((u16)code);
    if (CODE == CODE_F16) return f16_to_f32((u16)code);
    return float_of(code);
}

// The product with the scale, rounded as the formula says.
template <u32 CODE> DEV float scaled_weight(const Matrix& m, float value, float scale) {
    if (CODE >= CODE_BF16) return value;
    float weight = value * scale;
    if (m.rounding == ROUND_BF16) return round_bf16(weight);
    if (m.rounding == ROUND_F16) return f16_to_f32(f32_to_f16(weight));
    return weight;
}

// The codes that a lane holds of one atom's 64 k, 16 bytes at a time.
template <u32 CODE>
DEV void load_codes(const Matrix& m, u32 row_tile, u32 k_tile, u32 atom, u32 (&words)[CodeBits<CODE>::value]) {
    constexpr u32 BITS = CodeBits<CODE>::value;
    const u8* tile = m.codes + ((u64)row_tile * m.k_tiles + k_tile) * (512 * BITS);
    UNROLL
    for (u32 j = 0; j < BITS / 4; j++) {
        u32 at = BITS == 32 ? (atom * 4 + j / 2) * 1024 + lane() * 32 + j % 2 * 16
                            : (atom * (BITS / 4) + j) * 512 + lane() * 16;
        Quad quad = load16(tile + at);
        words[4 * j] = quad.x;
        words[4 * j + 1] = quad.y;
        words[4 * j + 2] = quad.z;
        words[4 * j + 3] = quad.w;
    }
}

// Element `half` of register `r` of the fragment of k16 slice `s`: row lane / 4 + 8 * (r & 1) of the atom, k
// 16 s + 2 (lane % 4) + half + 8 * (r >> 1).
template <u32 CODE> DEV u32 code_of(const u32 (&words)[CodeBits<CODE>::value], u32 s, u32 r, u32 half) {
    constexpr u32 BITS = CodeBits<CODE>::value;
    if (BITS == 4) return words[s] >> (4 * (r + 4 * half)) & 15;
    if (BITS == 8) return words[(2 * s + (r >> 1)) % BITS] >> (8 * ((r & 1) + 2 * half)) & 255;
    if (BITS == 16) return words[(4 * s + r) % BITS] >> (16 * half) & 0xffff;
    return words[(8 * s + 2 * r + half) % BITS];
}

// Weights of a lane's fragment of one slice, [register][half]; zero beyond the last k. `row` is the first row of the
// atom, from the first row tile; `column` the first k of the tile.
template <u32 CODE>
DEV void slice_weights(const Matrix& m, const float* table, const u32 (&words)[CodeBits<CODE>::value], u32 s, u32 row,
                       u32 column, float (&weights)[8]) {
    bool whole = whole_slices(m);
    u32 first = column + 16 * s;
    ScalePlace place[2];
    float scale[2], zero[2];
    if (CODE < CODE_BF16) {
        UNROLL
        for (u32 high = 0; high < 2; high++) {
            place[high] = scale_place(m, row + lane() / 4 + 8 * high);
            u32 group = least(first, m.k - 1) / m.group;
            scale[high] = scale_at(m, place[high], group, table);
            zero[high] = zero_at(m, place[high], group);
        }
    }
    UNROLL
    for (u32 r = 0; r < 4; r++) {
        UNROLL
        for (u32 half = 0; half < 2; half++) {
            u32 k = first + 2 * (lane() % 4) + half + 8 * (r >> 1);
            float s_here = 1.0f, z_here = 0.0f;
            if (CODE < CODE_BF16) {
                s_here = scale[r & 1], z_here = zero[r & 1];
                if (!whole) {
                    u32 group = least(k, m.k - 1) / m.group;
                    s_here = scale_at(m, place[r & 1], group, table);
                    z_here = zero_at(m, place[r & 1], group);
                }
            }
            float value = code_value<CODE>(m, code_of<CODE>(words, s, r, half), z_here);
            weights[2 * r + half] = k < m.k ? scaled_weight<CODE>(m, value, s_here) : 0.0f;
        }
    }
}

// Code of (row, k), `row` from the first row tile: tiling.rs, one code at a time.
DEV u32 code_at(const Matrix& m, u32 bits, u32 row, u32 k) {
    const u8* tile = m.codes + ((u64)(row / MATRIX_TILE) * m.k_tiles + k / MATRIX_TILE) * (512 * bits);
    u32 atom = row % MATRIX_TILE / ATOM, column = k % MATRIX_TILE;
    u32 holder = row % 8 * 4 + column % 8 / 2, high = row % 16 / 8, upper = column % 16 / 8, odd = column & 1;
    if (bits == 4) {
        u32 slot = atom * 1024 + holder * 32 + column / 16 * 8 + high + 2 * upper + 4 * odd;
        return tile[slot / 2] >> (4 * (slot & 1)) & 15;
    }
    if (bits == 8)
        return tile[(atom * 2 + column / 32) * 512 + holder * 16 + (column % 32 / 16 * 2 + upper) * 4 + high + 2 * odd];
    u32 slot = (atom * 4 + column / 16) * 256 + holder * 8 + (high + 2 * upper) * 2 + odd;
    return bits == 16 ? ((const u16*)tile)[slot] : ((const u32*)tile)[slot];
}

template <u32 CODE> DEV float weight_of(const Matrix& m, u32 row, u32 k) {
    u32 code = code_at(m, CodeBits<CODE>::value, row, k);
    if (CODE >= CODE_BF16) return code_value<CODE>(m, code, 0.0f);
    ScalePlace place = scale_place(m, row);
    u32 group = k / m.group;
    float value = code_value<CODE>(m, code, zero_at(m, place, group));
    return scaled_weight<CODE>(m, value, scale_at(m, place, group));
}

// Weight of (row, k), `row` from the first row tile.
DEV float weight_at(const Matrix& m, u32 row, u32 k) {
    switch (m.code) {
    case CODE_INT4: return weight_of<CODE_INT4>(m, row, k);
    case CODE_E2M1: return weight_of<CODE_E2M1>(m, row, k);
    case CODE_INT8: return weight_of<CODE_INT8>(m, row, k);
    case CODE_E4M3: return weight_of<CODE_E4M3>(m, row, k);
    case CODE_BF16: return weight_of<CODE_BF16>(m, row, k);
    case CODE_F16: return weight_of<CODE_F16>(m, row, k);
    default: return weight_of<CODE_F32>(m, row, k);
    }
}
