// A part of a row that a block has in shared memory on its way to an operand: how much there is room for, how it comes
// there, and the sum of squares of a whole row by all warps.
#pragma once
#include "norm.cuh"

#define ROW_THREADS 256
#define ROW_WARPS (ROW_THREADS / WARP)
// Elements of one step of a norm's sum.
#define ROW_STEP (NORM_STEP * WARP)

// Shared memory of at most CAPACITY elements: they, the lanes' sums of each step, three numbers a warp.
#define ROW_SHARED(CAPACITY) (4 * (CAPACITY) + 4 * (CAPACITY) / NORM_STEP + 12 * ROW_WARPS)

DEV float* row_values() { return (float*)shared(); }
template <u32 CAPACITY> DEV float* row_sums() { return row_values() + CAPACITY; }
template <u32 CAPACITY> DEV float* row_warps() { return row_sums<CAPACITY>() + CAPACITY / NORM_STEP; }

// Four elements that are loaded and stored at once.
struct alignas(16) RowFour {
    float values[4];
};

// Copies `width` elements, a multiple of four, to the beginning of shared memory.
DEV void load_row(const float* x, u32 width) {
    u32 to = shared_address(row_values());
    for (u32 i = thread() * 4; i < width; i += ROW_THREADS * 4) copy_async16(to + i * 4, x + i, true);
    copy_commit();
    copy_wait<0>();
    sync_block();
}

// The sum of squares of the row, the same in every thread. Rows are shorter than the third level of the sum.
template <u32 CAPACITY> DEV float row_square_sum(u32 width) {
    static_assert(CAPACITY < ROW_STEP * NORM_STEP * NORM_STEP, "a row that reaches the third level");
    const float* row = row_values();
    float* sums = row_sums<CAPACITY>();
    u32 lines = width / WARP, steps = lines / NORM_STEP;
    for (u32 step = warp(); step < steps; step += ROW_WARPS) {
        float sum = 0.0f;
        UNROLL for (u32 i = 0; i < NORM_STEP; i++) {
            float value = row[(step * NORM_STEP + i) * WARP + lane()];
            sum += value * value;
        }
        sums[step * WARP + lane()] = sum;
    }
    // Every warp has the rest of the row and folds all steps: that is sooner done than handed on.
    float rest = 0.0f;
    for (u32 line = steps * NORM_STEP; line < lines; line++) rest += row[line * WARP + lane()] * row[line * WARP + lane()];
    sync_block();
    float first = 0.0f, second = 0.0f;
    for (u32 step = 0; step < steps; step++) {
        first += sums[step * WARP + lane()];
        if ((step + 1) % NORM_STEP == 0) {
            second += first;
            first = 0.0f;
        }
    }
    return fold_chains(rest + first + second, row, lines, width);
}
