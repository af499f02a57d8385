// Logits folded into partial log-sum-exps of 128 rows of the vocabulary, in the CPU backend's order
// (kernels/src/cpu/head.rs): straight from a product on tensor cores, or from logits that lie in memory.
#include "head_fold.cuh"
#include "tensor_product.cuh"

struct HeadArgs {
    Matrix matrix;
    const u16* x;  // bf16 [m, k_tiles * 64], zero beyond k
    Fold fold;
    float divisor;
};

struct FoldLogitsArgs {
    const float* logits;  // [m, fold.columns]
    Fold fold;
};

#define HEAD_SHARED (PRODUCT_SHARED + FOLD_BYTES)
static_assert(STAGED_STRIDE == FOLD_STRIDE && PRODUCT_THREADS == FOLD_THREADS, "what is staged is folded");

struct BlockMeeting {
    DEV void all() { sync_block(); }
};

// Of 64 tokens. All threads of the block.
DEV void fold_staged(const Fold& fold, u32 tile, u32 first_token, float divisor) {
    float* largest = (float*)(shared() + PRODUCT_SHARED);
    fold_staged<STAGED_TOKENS>(fold, staged(), largest, thread(), BlockMeeting(), tile, first_token, divisor);
}

template <u32 CODE, u32 ARITHMETIC> DEV void head_product(const HeadArgs& args) {
    u32 first_token = block_y() * PRODUCT_TOKENS;
    float sums[16][4];
    product_tile<CODE, ARITHMETIC>(args.matrix, args.x, args.fold.m, block_x(), first_token, sums);
    sync_block();
    stage_sums<0>(sums, 1.0f);
    sync_block();
    fold_staged(args.fold, block_x(), first_token, args.divisor);
    stage_sums<1>(sums, 1.0f);
    sync_block();
    fold_staged(args.fold, block_x(), first_token + STAGED_TOKENS, args.divisor);
}

#define HEAD_KERNEL(name, CODE, ARITHMETIC)                                                                            \
    KERNEL(head_##name, HeadArgs, PRODUCT_THREADS, HEAD_SHARED) { head_product<CODE, ARITHMETIC>(args); }

HEAD_KERNEL(int4, CODE_INT4, BY_ANY)
HEAD_KERNEL(int4_bf16, CODE_INT4, BY_BF16)
HEAD_KERNEL(e2m1, CODE_E2M1, BY_ANY)
HEAD_KERNEL(e2m1_table, CODE_E2M1, BY_TABLE)
HEAD_KERNEL(int8, CODE_INT8, BY_ANY)
HEAD_KERNEL(int8_bf16, CODE_INT8, BY_BF16)
HEAD_KERNEL(e4m3, CODE_E4M3, BY_ANY)
HEAD_KERNEL(e4m3_bf16, CODE_E4M3, BY_BF16)
HEAD_KERNEL(bf16, CODE_BF16, BY_ANY)
HEAD_KERNEL(f16, CODE_F16, BY_ANY)
HEAD_KERNEL(f32, CODE_F32, BY_ANY)

// One vocabulary tile of 64 tokens a block.
KERNEL(fold_logits, FoldLogitsArgs, PRODUCT_THREADS, HEAD_SHARED) {
    u32 first_token = block_y() * STAGED_TOKENS, row = thread() % PRODUCT_ROWS;
    u64 column = (u64)block_x() * PRODUCT_ROWS + row;
    for (u32 i = thread() / PRODUCT_ROWS; i < STAGED_TOKENS; i += PRODUCT_THREADS / PRODUCT_ROWS) {
        bool there = first_token + i < args.fold.m && column < args.fold.columns;
        staged()[i * STAGED_STRIDE + row] = there ? args.logits[(u64)(first_token + i) * args.fold.columns + column] : 0.0f;
    }
    sync_block();
    fold_staged(args.fold, block_x(), first_token, 1.0f);
}
