// Linears on Hopper's warpgroups straight from packed tiles. What becomes of the sums: divided, a bias and another
// matrix added, and stored in runs of 16 bytes.
#include "hopper_product.cuh"

// Of a consumer's 64 rows: tokens staged at a time, and floats from one token to the next, which keeps both sides on
// banks of their own and runs of 16 bytes aligned.
#define EPILOGUE_TOKENS 64
#define EPILOGUE_STRIDE (MATRIX_TILE + 4)
#define EPILOGUE_PLACE (EPILOGUE_TOKENS * EPILOGUE_STRIDE * 4)
#define EPILOGUE_BYTES (HOPPER_CONSUMERS * EPILOGUE_PLACE)

// `HopperArgs` in linear/hopper.rs.
struct HopperArgs {
    HopperProduct product;
    float* y;            // [tokens, y_stride]
    const float* bias;   // one a row of the matrix, or null
    const float* added;  // [tokens, added_stride], or null; may be `y`
    u32 y_stride;
    u32 added_stride;
    u32 runs;            // whether rows of `y` and of `added` are made of whole aligned runs of 16 bytes
    float divisor;       // of all sums
    u32 padding[6];
};
static_assert(sizeof(HopperArgs) == 448, "as HopperArgs in linear/hopper.rs");

#if HOPPER

struct alignas(16) Run { float of[4]; };

// Row and token of the result, both inside.
DEV float finished(const HopperArgs& args, float sum, u32 token, u32 row) {
    if (args.divisor != 1.0f) sum = sum / args.divisor;
    if (args.bias) sum = sum + args.bias[row];
    if (args.added) sum = args.added[(u64)token * args.added_stride + row] + sum;
    return sum;
}

// Stores 64 tokens; `held` is the first of the consumer's rows, from the first row tile.
DEV void store_tokens(const HopperArgs& args, const Matrix& m, const float* staged, u32 held, u32 first_token) {
    u32 me = thread() % WARPGROUP;
    if (args.runs) {
        u32 row = held + me % 16 * 4 - m.first;
        ROLL
        for (u32 i = me / 16; i < EPILOGUE_TOKENS; i += WARPGROUP / 16) {
            u32 token = first_token + i;
            // Below the first row this wraps around.
            if (row >= m.n || token >= args.product.tokens) continue;
            Run run = *(const Run*)(staged + i * EPILOGUE_STRIDE + me % 16 * 4);
            float* to = args.y + (u64)token * args.y_stride + row;
            UNROLL
            for (u32 j = 0; j < 4; j++) run.of[j] = finished(args, run.of[j], token, row + j);
            *(Run*)to = run;
        }
        return;
    }
    u32 row = held + me % MATRIX_TILE - m.first;
    ROLL
    for (u32 i = me / MATRIX_TILE; i < EPILOGUE_TOKENS; i += WARPGROUP / MATRIX_TILE) {
        u32 token = first_token + i;
        if (row >= m.n || token >= args.product.tokens) continue;
        float sum = staged[i * EPILOGUE_STRIDE + me % MATRIX_TILE];
        args.y[(u64)token * args.y_stride + row] = finished(args, sum, token, row);
    }
}

template <class R> DEV void store_tile(const HopperArgs& args, TilePlace place, const float (&sums)[HOPPER_SUMS], const Rows& rows) {
    const Matrix& m = args.product.matrix[rows.consumer];
    u32 held = (place.row_block * args.product.row_tiles_apart + rows.consumer) * MATRIX_TILE;
    float* staged = (float*)(shared() + R::TILE + rows.consumer * EPILOGUE_PLACE);
    UNROLL
    for (u32 part = 0; part < HOPPER_TOKENS / EPILOGUE_TOKENS; part++) {
        u32 first_token = place.token_block * HOPPER_TOKENS + part * EPILOGUE_TOKENS;
        // Each consumer meets by itself: the other one may still be multiplying.
        sync_named(1 + rows.consumer, WARPGROUP);
        stage_tile<EPILOGUE_TOKENS, EPILOGUE_STRIDE>(sums, part, staged, rows);
        sync_named(1 + rows.consumer, WARPGROUP);
        store_tokens(args, m, staged, held, first_token);
    }
}

template <class F> DEV void linear_hopper(const HopperArgs& args) {
    typedef Room<F, 4, EPILOGUE_BYTES> R;
    begin_product<F, R>(args.product);
    if (warp() < 4) {
        registers_less<40>();
        if (thread() == 0) produce<F, R>(args.product);
        return;
    }
    registers_more<232>();
    Rows rows = consumer_rows();
    Turn turn = {0, 0};
    for (u32 tile = block_x(); tile < tile_count(args.product); tile += args.product.blocks) {
        TilePlace place = tile_place(args.product, tile);
        float sums[HOPPER_SUMS];
        consume_tile<F, R>(args.product, rows, turn, sums);
        store_tile<R>(args, place, sums, rows);
    }
}

#define HOPPER_LINEAR(name, CODE, ARITHMETIC)                                                                          \
    KERNEL_HOPPER(hopper_##name, HopperArgs, HOPPER_THREADS,                                                           \
                  (Room<Format<CODE, ARITHMETIC>, 4, EPILOGUE_BYTES>::BYTES)) {                                        \
        linear_hopper<Format<CODE, ARITHMETIC>>(args);                                                                 \
    }

// `SpreadArgs` in linear/hopper.rs.
struct SpreadArgs {
    Matrix matrix;
    u8* scales;  // [row tiles][groups][64]
    i8* zeros;   // the same, where the matrix has zero points
    u32 as_f32;  // whether scales become what codes are multiplied with, in f32; else they stay as they are stored
    u32 padding;
};

// Scales of any sharing as stages take them: one of each row and group. Those of a group and a row tile each block.
KERNEL_HOPPER(spread_scales, SpreadArgs, MATRIX_TILE, 0) {
    const Matrix& m = args.matrix;
    ScalePlace place = scale_place(m, block_y() * MATRIX_TILE + thread());
    u64 from = place.base + (u64)block_x() * place.step, to = ((u64)block_y() * m.groups + block_x()) * MATRIX_TILE + thread();
    u32 stored = stored_scale(m, from);
    if (args.as_f32) ((float*)args.scales)[to] = scale_value(m, stored);
    else if (m.scale_type <= SCALE_F16) ((u16*)args.scales)[to] = (u16)stored;
    else args.scales[to] = (u8)stored;
    if (m.zeros) args.zeros[to] = m.zeros[from];
}

HOPPER_LINEAR(int4, CODE_INT4, BY_BF16)
HOPPER_LINEAR(int4_f32, CODE_INT4, BY_F32)
HOPPER_LINEAR(e2m1, CODE_E2M1, BY_TABLE)
HOPPER_LINEAR(int8, CODE_INT8, BY_BF16)
HOPPER_LINEAR(int8_f32, CODE_INT8, BY_F32)
HOPPER_LINEAR(e4m3, CODE_E4M3, BY_BF16)
HOPPER_LINEAR(e4m3_f32, CODE_E4M3, BY_F32)
HOPPER_LINEAR(bf16, CODE_BF16, AS_STORED)

#endif
