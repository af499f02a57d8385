// Staged logits of 128 rows of the vocabulary folded into a partial log-sum-exp of each token, in the CPU backend's order
// (kernels/src/cpu/head.rs), by 256 threads. Knows no products.
#pragma once
#include "numbers.cuh"

#define FOLD_THREADS 256
#define FOLD_ROWS 128
// From one token to the next: keeps the accesses of tokens and of rows on banks of their own.
#define FOLD_STRIDE (FOLD_ROWS + 5)
// What threads tell one another beside the logits.
#define FOLD_BYTES (FOLD_THREADS * 4)

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

// `max` would drop a NaN; one in the logits must reach the score. Of equals the first.
DEV float larger(float a, float b) { return b > a || b != b ? b : a; }

// Folds vocabulary tile `tile` of those here for TOKENS tokens, staged [TOKENS][FOLD_STRIDE] before they are divided by
// `divisor`. Thread `me` of 256; `meeting.all()` is their meeting. `largest` has FOLD_BYTES.
template <u32 TOKENS, class Meeting>
DEV void fold_staged(const Fold& fold, float* staged, float* largest, u32 me, Meeting meeting, u32 tile, u32 first_token,
                     float divisor) {
    constexpr u32 PARTS = FOLD_THREADS / TOKENS, PART_ROWS = FOLD_ROWS / PARTS;
    u32 width = least(fold.columns - tile * FOLD_ROWS, (u32)FOLD_ROWS);
    u32 token = me % TOKENS, part = me / TOKENS;
    float* logits = staged + token * FOLD_STRIDE;
    float part_largest = float_of(0xff800000);
    for (u32 row = part * PART_ROWS; row < least((part + 1) * PART_ROWS, width); row++) {
        if (divisor != 1.0f) logits[row] = logits[row] / divisor;
        part_largest = larger(part_largest, logits[row]);
    }
    largest[part * TOKENS + token] = part_largest;
    meeting.all();
    bool mine = part == 0 && first_token + token < fold.m;
    if (mine) {
        u32 target = fold.targets[first_token + token];
        if (target != ~0u && target / FOLD_ROWS == fold.first_tile + tile)
            fold.target_logits[first_token + token] = logits[target % FOLD_ROWS];
    }
    if (part == 0) {
        UNROLL
        for (u32 i = 1; i < PARTS; i++) part_largest = larger(part_largest, largest[i * TOKENS + token]);
        largest[token] = part_largest;
    }
    meeting.all();
    u32 row = me % FOLD_ROWS;
    for (u32 i = me / FOLD_ROWS; i < TOKENS; i += FOLD_THREADS / FOLD_ROWS) {
        float* logit = staged + i * FOLD_STRIDE + row;
        if (row < width) *logit = exp_rounded(*logit - largest[i]);
    }
    meeting.all();
    if (mine) {
        double sum = 0.0;
        for (u32 i = 0; i < width; i++) sum += (double)logits[i];
        u64 at = (u64)(first_token + token) * fold.tiles + fold.first_tile + tile;
        fold.largest[at] = part_largest;
        fold.sums[at] = sum;
    }
    meeting.all();
}
