// The two linears of a gated feed-forward part on Hopper's warpgroups: one consumer has 64 rows of the gate, the other one
// the same rows of what it is multiplied with, and the product goes out as the bf16 operand of the next linear.
#include "hopper_product.cuh"

// Tokens staged at a time, of both consumers; a token's rows are whole runs of 16 bytes, on banks of their own.
#define GATED_TOKENS 64
#define GATED_STRIDE (MATRIX_TILE + 4)
#define GATED_PLACE (GATED_TOKENS * GATED_STRIDE * 4)
#define GATED_BYTES (HOPPER_CONSUMERS * GATED_PLACE)
// Rows that a thread stores at a time: 16 bytes.
#define GATED_ROWS 8

// `GateHopperArgs` in linear/gated.rs.
struct GateHopperArgs {
    HopperProduct product;  // the gate's matrix, then the other one
    u16* out;               // bf16 [tokens, row tiles * 64], zero beyond the last row
    const float* bias[2];   // one a row, or null
    u32 padding[10];
};
static_assert(sizeof(GateHopperArgs) == 448, "as GateHopperArgs in linear/gated.rs");

#if HOPPER

DEV void meet_consumers() { sync_named(1, HOPPER_CONSUMERS * WARPGROUP); }

// silu(gate) * up of one place; zero beyond the last row.
DEV float gated(const GateHopperArgs& args, float gate, float up, u32 row) {
    if (row >= args.product.matrix[0].n) return 0.0f;
    if (args.bias[0]) gate = gate + args.bias[0][row];
    if (args.bias[1]) up = up + args.bias[1][row];
    return silu(gate) * up;
}

// Stores 64 tokens of 64 rows. All threads of both consumers.
DEV void store_gated(const GateHopperArgs& args, const float* staged, u32 first_row, u32 first_token) {
    u32 me = thread() - WARPGROUP, column = me % (MATRIX_TILE / GATED_ROWS) * GATED_ROWS;
    u32 width = args.product.matrix[0].row_tiles * MATRIX_TILE;
    ROLL
    for (u32 i = me / (MATRIX_TILE / GATED_ROWS); i < GATED_TOKENS;
         i += HOPPER_CONSUMERS * WARPGROUP / (MATRIX_TILE / GATED_ROWS)) {
        u32 token = first_token + i;
        if (token >= args.product.tokens) continue;
        const float* gates = staged + i * GATED_STRIDE + column;
        const float* ups = gates + GATED_PLACE / 4;
        u32 pairs[GATED_ROWS / 2];
        UNROLL
        for (u32 j = 0; j < GATED_ROWS; j += 2) {
            u32 row = first_row + column + j;
            pairs[j / 2] = pack_bf16(gated(args, gates[j], ups[j], row), gated(args, gates[j + 1], ups[j + 1], row + 1));
        }
        store16(args.out + (u64)token * width + first_row + column, Quad{pairs[0], pairs[1], pairs[2], pairs[3]});
    }
}

template <class F> DEV void gate_hopper(const GateHopperArgs& args) {
    typedef Room<F, 4, GATED_BYTES> R;
    begin_product<F, R>(args.product);
    if (warp() < 4) {
        registers_less<40>();
        if (thread() == 0) produce<F, R>(args.product);
        return;
    }
    registers_more<232>();
    Rows rows = consumer_rows();
    float* staged = (float*)(shared() + R::TILE);
    Turn turn = {0, 0};
    for (u32 tile = block_x(); tile < tile_count(args.product); tile += args.product.blocks) {
        TilePlace place = tile_place(args.product, tile);
        float sums[HOPPER_SUMS];
        consume_tile<F, R>(args.product, rows, turn, sums);
        UNROLL
        for (u32 part = 0; part < HOPPER_TOKENS / GATED_TOKENS; part++) {
            meet_consumers();
            stage_tile<GATED_TOKENS, GATED_STRIDE>(sums, part, staged + rows.consumer * (GATED_PLACE / 4), rows);
            meet_consumers();
            store_gated(args, staged, place.row_block * MATRIX_TILE, place.token_block * HOPPER_TOKENS + part * GATED_TOKENS);
        }
    }
}

#define HOPPER_GATE(name, CODE, ARITHMETIC)                                                                            \
    KERNEL_HOPPER(gate_hopper_##name, GateHopperArgs, HOPPER_THREADS,                                                  \
                  (Room<Format<CODE, ARITHMETIC>, 4, GATED_BYTES>::BYTES)) {                                           \
        gate_hopper<Format<CODE, ARITHMETIC>>(args);                                                                   \
    }

HOPPER_GATE(int4, CODE_INT4, BY_BF16)
HOPPER_GATE(int4_f32, CODE_INT4, BY_F32)
HOPPER_GATE(e2m1, CODE_E2M1, BY_TABLE)
HOPPER_GATE(int8, CODE_INT8, BY_BF16)
HOPPER_GATE(int8_f32, CODE_INT8, BY_F32)
HOPPER_GATE(e4m3, CODE_E4M3, BY_BF16)
HOPPER_GATE(e4m3_f32, CODE_E4M3, BY_F32)
HOPPER_GATE(bf16, CODE_BF16, AS_STORED)

#endif
