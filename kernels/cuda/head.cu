// Logits folded into partial log-sum-exps of 128 rows of the vocabulary, in the CPU backend's order
// (kernels/src/cpu/head.rs): straight from a product on tensor cores, or from logits that lie in memory.
#include "tensor_product.cuh"

// Where partial log-sum-exps go; `Fold` in head.rs.
struct Fold {
    const u32* targets;     // one a token, counted from the first logit of tile 0; ~0: none
    float* target_logits;   // written where the target lies here
    float* largest;         // [m, tiles]
    double* sums;           // [m, tiles]
    u32 m;
    u32 tiles;
    u32 first_tile;         // tile of the first logit here
    u32 columns;            // logits here
};

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

#define FOLD_PARTS (PRODUCT_THREADS / STAGED_TOKENS)
#define PART_ROWS (PRODUCT_ROWS / FOLD_PARTS)
#define HEAD_SHARED (PRODUCT_SHARED + PRODUCT_THREADS * 4)

// `max` would drop a NaN; one in the logits must reach the score. Of equals the first.
DEV float larger(float a, float b) { return b > a || b != b ? b : a; }

// Folds the staged logits of 64 tokens and vocabulary tile `tile` of those here. All threads of the block.
DEV void fold_staged(const Fold& fold, u32 tile, u32 first_token) {
    float* largest = (float*)(shared() + PRODUCT_SHARED);
    u32 width = least(fold.columns - tile * PRODUCT_ROWS, (u32)PRODUCT_ROWS);
    u32 token = thread() % STAGED_TOKENS, part = thread() / STAGED_TOKENS;
    const float* logits = staged() + token * STAGED_STRIDE;
    float part_largest = float_of(0xff800000);
    for (u32 row = part * PART_ROWS; row < least((part + 1) * PART_ROWS, width); row++)
        part_largest = larger(part_largest, logits[row]);
    largest[part * STAGED_TOKENS + token] = part_largest;
    sync_block();
    bool mine = part == 0 && first_token + token < fold.m;
    if (mine) {
        u32 target = fold.targets[first_token + token];
        if (target != ~0u && target / PRODUCT_ROWS == fold.first_tile + tile)
            fold.target_logits[first_token + token] = logits[target % PRODUCT_ROWS];
    }
    if (part == 0) {
        UNROLL
        for (u32 i = 1; i < FOLD_PARTS; i++) part_largest = larger(part_largest, largest[i * STAGED_TOKENS + token]);
        largest[token] = part_largest;
    }
    sync_block();
    u32 row = thread() % PRODUCT_ROWS;
    for (u32 i = thread() / PRODUCT_ROWS; i < STAGED_TOKENS; i += PRODUCT_THREADS / PRODUCT_ROWS) {
        float* logit = staged() + i * STAGED_STRIDE + row;
        if (row < width) *logit = exp_rounded(*logit - largest[i]);
    }
    sync_block();
    if (mine) {
        double sum = 0.0;
        for (u32 i = 0; i < width; i++) sum += (double)logits[i];
        u64 at = (u64)(first_token + token) * fold.tiles + fold.first_tile + tile;
        fold.largest[at] = part_largest;
        fold.sums[at] = sum;
    }
    sync_block();
}

template <u32 CODE> DEV void head_product(const HeadArgs& args) {
    u32 first_token = block_y() * PRODUCT_TOKENS;
    float sums[16][4];
    product_tile<CODE>(args.matrix, args.x, args.fold.m, block_x(), first_token, sums);
    sync_block();
    stage_sums<0>(sums, args.divisor);
    sync_block();
    fold_staged(args.fold, block_x(), first_token);
    stage_sums<1>(sums, args.divisor);
    sync_block();
    fold_staged(args.fold, block_x(), first_token + STAGED_TOKENS);
}

#define HEAD_KERNEL(name, CODE)                                                                                        \
    KERNEL(head_##name, HeadArgs, PRODUCT_THREADS, HEAD_SHARED) { head_product<CODE>(args); }

HEAD_KERNEL(int4, CODE_INT4)
HEAD_KERNEL(e2m1, CODE_E2M1)
HEAD_KERNEL(int8, CODE_INT8)
HEAD_KERNEL(e4m3, CODE_E4M3)
HEAD_KERNEL(bf16, CODE_BF16)
HEAD_KERNEL(f16, CODE_F16)
HEAD_KERNEL(f32, CODE_F32)

// One vocabulary tile of 64 tokens a block.
KERNEL(fold_logits, FoldLogitsArgs, PRODUCT_THREADS, HEAD_SHARED) {
    u32 first_token = block_y() * STAGED_TOKENS, row = thread() % PRODUCT_ROWS;
    u64 column = (u64)block_x() * PRODUCT_ROWS + row;
    for (u32 i = thread() / PRODUCT_ROWS; i < STAGED_TOKENS; i += PRODUCT_THREADS / PRODUCT_ROWS) {
        bool there = first_token + i < args.fold.m && column < args.fold.columns;
        staged()[i * STAGED_STRIDE + row] = there ? args.logits[(u64)(first_token + i) * args.fold.columns + column] : 0.0f;
    }
    sync_block();
    fold_staged(args.fold, block_x(), first_token);
}
