// Logits on Hopper's warpgroups, folded into partial log-sum-exps where they are made.
#include "head_fold.cuh"
#include "hopper_product.cuh"

// Tokens of a tile that are folded at a time, so that as many sums of exponentials as can be run side by side.
#define HEAD_TOKENS 128
#define HEAD_LOGITS (HEAD_TOKENS * FOLD_STRIDE * 4)
#define HEAD_STAGES 3

// `HeadHopperArgs` in head.rs.
struct HeadHopperArgs {
    HopperProduct product;
    Fold fold;
    float divisor;
    u32 padding[3];
};
static_assert(sizeof(HeadHopperArgs) == 448, "as HeadHopperArgs in head.rs");

#if HOPPER

// Both consumers, as threads 0 to 255.
struct ConsumerMeeting {
    DEV void all() { sync_named(1, HOPPER_CONSUMERS * WARPGROUP); }
};

template <class F> DEV void head_hopper(const HeadHopperArgs& args) {
    typedef Room<F, HEAD_STAGES, HEAD_LOGITS + FOLD_BYTES> R;
    static_assert(HOPPER_CONSUMERS * WARPGROUP == FOLD_THREADS, "consumers fold");
    begin_product<F, R>(args.product);
    if (warp() < 4) {
        registers_less<40>();
        if (thread() == 0) produce<F, R>(args.product);
        return;
    }
    registers_more<232>();
    Rows rows = consumer_rows();
    float *staged = (float*)(shared() + R::TILE), *largest = (float*)(shared() + R::TILE + HEAD_LOGITS);
    float* mine = staged + rows.consumer * MATRIX_TILE;
    u32 me = thread() - WARPGROUP;
    ConsumerMeeting meeting;
    Turn turn = {0, 0};
    for (u32 tile = block_x(); tile < tile_count(args.product); tile += args.product.blocks) {
        TilePlace place = tile_place(args.product, tile);
        u32 first_token = place.token_block * HOPPER_TOKENS;
        float sums[HOPPER_SUMS];
        consume_tile<F, R>(args.product, rows, turn, sums);
        stage_tile<HEAD_TOKENS, FOLD_STRIDE>(sums, 0, mine, rows);
        meeting.all();
        fold_staged<HEAD_TOKENS>(args.fold, staged, largest, me, meeting, place.row_block, first_token, args.divisor);
        stage_tile<HEAD_TOKENS, FOLD_STRIDE>(sums, 1, mine, rows);
        meeting.all();
        fold_staged<HEAD_TOKENS>(args.fold, staged, largest, me, meeting, place.row_block, first_token + HEAD_TOKENS,
                                 args.divisor);
    }
}

#define HOPPER_HEAD(name, CODE, ARITHMETIC)                                                                            \
    KERNEL_HOPPER(head_hopper_##name, HeadHopperArgs, HOPPER_THREADS,                                                  \
                  (Room<Format<CODE, ARITHMETIC>, HEAD_STAGES, HEAD_LOGITS + FOLD_BYTES>::BYTES)) {                    \
        head_hopper<Format<CODE, ARITHMETIC>>(args);                                                                   \
    }

HOPPER_HEAD(int4, CODE_INT4, BY_BF16)
HOPPER_HEAD(int4_f32, CODE_INT4, BY_F32)
HOPPER_HEAD(e2m1, CODE_E2M1, BY_TABLE)
HOPPER_HEAD(int8, CODE_INT8, BY_BF16)
HOPPER_HEAD(int8_f32, CODE_INT8, BY_F32)
HOPPER_HEAD(e4m3, CODE_E4M3, BY_BF16)
HOPPER_HEAD(e4m3_f32, CODE_E4M3, BY_F32)
HOPPER_HEAD(bf16, CODE_BF16, AS_STORED)

#endif
