// A tile of `w * x^T` on tensor cores: 128 rows of a packed matrix by 128 tokens, weights decoded in registers. A
// lane's 16 bytes of codes are its part of whole fragments of operand A, so codes never pass through shared memory.
//
// Each output is one chain over k in steps of 16, from the first to the last: it depends on its row and its token
// alone.
#pragma once
#include "operands.cuh"

#define PRODUCT_THREADS 256
#define PRODUCT_ROWS 128
#define PRODUCT_TOKENS 128
// Two stages of 128 tokens x 64 k of bf16; afterwards half of the tile, a token's rows side by side. The stride keeps
// both the fragments' and the tokens' accesses on banks of their own.
#define STAGE_BYTES (PRODUCT_TOKENS * 128)
#define STAGED_TOKENS 64
#define STAGED_STRIDE (PRODUCT_ROWS + 5)
#define STAGED_BYTES (STAGED_TOKENS * STAGED_STRIDE * 4)
#define PRODUCT_SHARED (STAGED_BYTES + MAGNITUDES_BYTES)
static_assert(SCALE_TABLE_BYTES <= MAGNITUDES_BYTES, "one table or the other");
static_assert(2 * STAGE_BYTES <= STAGED_BYTES, "stages and staged sums share their place");

// Codes and scales of one tile, loaded before they are needed.
template <u32 CODE> struct Ahead {
    u32 words[CodeBits<CODE>::value];
    u32 scales[4][2];
    i32 zeros[4][2];
};

// Which scale comes next: groups are walked, not divided.
struct ScaleWalk {
    ScalePlace place[2];
    u32 group, left, slices;
};

DEV float* scale_table() { return (float*)(shared() + STAGED_BYTES); }

template <u32 ARITHMETIC> DEV u32 scale_ahead(const Matrix& m, u64 index) {
    if constexpr (ARITHMETIC == BY_ANY) return stored_scale(m, index);
    else return scale_of<ScaleBytes<ARITHMETIC>::value>(m.scales, index);
}

template <u32 CODE, u32 ARITHMETIC>
DEV void load_ahead(const Matrix& m, u32 row_tile, u32 k_tile, u32 atom, ScaleWalk& walk, Ahead<CODE>& ahead) {
    load_codes<CODE>(m, row_tile, k_tile, atom, ahead.words);
    if constexpr (CODE < CODE_BF16) {
        if (k_tile > 0 && m.groups <= 1) return;
        UNROLL
        for (u32 s = 0; s < 4; s++) {
            UNROLL
            for (u32 high = 0; high < 2; high++) {
                u64 at = walk.place[high].base + (u64)walk.group * walk.place[high].step;
                ahead.scales[s][high] = scale_ahead<ARITHMETIC>(m, at);
                ahead.zeros[s][high] = m.zeros ? m.zeros[at] : 0;
            }
            if (--walk.left == 0) {
                walk.group = least(walk.group + 1, m.groups - 1);
                walk.left = walk.slices;
            }
        }
    }
}

// One pair of neighbouring k of operand A.
template <u32 CODE>
DEV u32 operand_pair(const Matrix& m, const Ahead<CODE>& ahead, u32 s, u32 r, float scale, float zero) {
    if constexpr (CODE == CODE_BF16) {
        return ahead.words[4 * s + r];
    } else {
        float pair[2];
        UNROLL
        for (u32 half = 0; half < 2; half++) {
            float value = code_value<CODE>(m, code_of<CODE>(ahead.words, s, r, half), zero);
            if (CODE < CODE_BF16) value = value * scale;
            if (CODE < CODE_BF16 && m.rounding == ROUND_F16) value = f16_to_f32(f32_to_f16(value));
            pair[half] = value;
        }
        return pack_bf16(pair[0], pair[1]);
    }
}

// Operand A of one slice, any scheme.
template <u32 CODE> DEV void any_fragment(const Matrix& m, const Ahead<CODE>& ahead, u32 s, u32 (&a)[4]) {
    float scale[2] = {1.0f, 1.0f}, zero[2] = {0.0f, 0.0f};
    if constexpr (CODE < CODE_BF16) {
        UNROLL
        for (u32 high = 0; high < 2; high++) {
            u32 stored = ahead.scales[s][high];
            scale[high] = looked_up(m, scale_table(), stored);
            zero[high] = (float)ahead.zeros[s][high];
        }
    }
    UNROLL
    for (u32 r = 0; r < 4; r++) a[r] = operand_pair<CODE>(m, ahead, s, r, scale[r & 1], zero[r & 1]);
}

// The same in few instructions where the scheme allows.
template <u32 CODE, u32 ARITHMETIC> DEV void fragment(const Matrix& m, const Ahead<CODE>& ahead, u32 s, u32 (&a)[4]) {
    if constexpr (ARITHMETIC == BY_ANY) {
        any_fragment<CODE>(m, ahead, s, a);
    } else {
        Scaling<CODE, ARITHMETIC> rows[2];
        UNROLL
        for (u32 high = 0; high < 2; high++)
            prepare<CODE>(m, (const u8*)scale_table(), ahead.scales[s][high], (float)ahead.zeros[s][high], rows[high]);
        operand<CODE>(m, ahead.words, s, rows, a);
    }
}

// Begins to copy 128 tokens x 64 k; tokens beyond `tokens` are zero.
DEV void copy_tokens(const u16* x, u32 stride, u32 first_token, u32 tokens, u32 k_tile, u32 stage) {
    UNROLL
    for (u32 i = 0; i < PRODUCT_TOKENS * 8 / PRODUCT_THREADS; i++) {
        u32 chunk = thread() + i * PRODUCT_THREADS, row = chunk / 8, column = chunk % 8;
        bool there = first_token + row < tokens;
        const u16* from = x + (u64)(there ? first_token + row : 0) * stride + k_tile * MATRIX_TILE + column * 8;
        copy_async16(shared_address(shared()) + stage * STAGE_BYTES + row * 128 + (column ^ row % 8) * 16, from, there);
    }
    copy_commit();
}

// Rows `128 row_block..` of the row tiles times tokens `first_token..`: sums[i][j] is row
// 16 warp + lane / 4 + 8 (j >> 1), token 8 i + 2 (lane % 4) + (j & 1).
template <u32 CODE, u32 ARITHMETIC>
DEV void product_tile(const Matrix& m, const u16* x, u32 tokens, u32 row_block, u32 first_token, float (&sums)[16][4]) {
    u32 stride = m.k_tiles * MATRIX_TILE, atom = warp() % 4;
    // The last block may have one row tile only; the second half then repeats it, and nobody stores that.
    u32 row_tile = least(row_block * 2 + warp() / 4, m.row_tiles - 1);
    u32 pairs = least((tokens - first_token + 15) / 16, (u32)(PRODUCT_TOKENS / 16));
    ScaleWalk walk;
    UNROLL
    for (u32 high = 0; high < 2; high++)
        walk.place[high] = scale_place(m, row_tile * MATRIX_TILE + atom * ATOM + lane() / 4 + 8 * high);
    walk.group = 0;
    walk.left = walk.slices = m.groups <= 1 ? ~0u : m.group / 16;
    if (ARITHMETIC == BY_TABLE) fill_magnitudes(m, (u8*)scale_table(), thread());
    else if (CODE < CODE_BF16 && ARITHMETIC == BY_ANY) fill_scale_table(m, scale_table());
    UNROLL
    for (u32 i = 0; i < 16; i++) {
        UNROLL
        for (u32 j = 0; j < 4; j++) sums[i][j] = 0.0f;
    }
    Ahead<CODE> ahead;
    load_ahead<CODE, ARITHMETIC>(m, row_tile, 0, atom, walk, ahead);
    copy_tokens(x, stride, first_token, tokens, 0, 0);
    for (u32 k_tile = 0; k_tile < m.k_tiles; k_tile++) {
        Ahead<CODE> now = ahead;
        if (k_tile + 1 < m.k_tiles) {
            load_ahead<CODE, ARITHMETIC>(m, row_tile, k_tile + 1, atom, walk, ahead);
            copy_tokens(x, stride, first_token, tokens, k_tile + 1, (k_tile + 1) % 2);
        } else {
            copy_commit();
        }
        copy_wait<1>();
        sync_block();
        u32 stage = shared_address(shared()) + k_tile % 2 * STAGE_BYTES;
        UNROLL
        for (u32 s = 0; s < 4; s++) {
            u32 a[4];
            fragment<CODE, ARITHMETIC>(m, now, s, a);
            UNROLL
            for (u32 pair = 0; pair < PRODUCT_TOKENS / 16; pair++) {
                // Left out by halves: three questions, not eight, a slice.
                if (pair > 0 && pairs <= (pair < 2 ? 1u : pair < 4 ? 2u : 4u)) continue;
                u32 b[4], row = pair * 16 + lane() / 16 * 8 + lane() % 8, chunk = 2 * s + lane() / 8 % 2;
                load_matrices(b, stage + row * 128 + (chunk ^ row % 8) * 16);
                mma_bf16(sums[2 * pair], a, b[0], b[1]);
                mma_bf16(sums[2 * pair + 1], a, b[2], b[3]);
            }
        }
        sync_block();
    }
}

DEV float* staged() { return (float*)shared(); }

// Puts tokens `64 half..` of a tile into shared memory, [64 tokens][STAGED_STRIDE], divided by `divisor`.
template <u32 HALF> DEV void stage_sums(const float (&sums)[16][4], float divisor) {
    UNROLL
    for (u32 i = 0; i < 8; i++) {
        UNROLL
        for (u32 j = 0; j < 4; j++) {
            u32 row = 16 * warp() + lane() / 4 + 8 * (j >> 1), token = 8 * i + 2 * (lane() % 4) + (j & 1);
            float sum = sums[8 * HALF + i][j];
            staged()[token * STAGED_STRIDE + row] = divisor == 1.0f ? sum : sum / divisor;
        }
    }
}
