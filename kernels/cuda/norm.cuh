// The order of a norm's sum of squares, that of the CPU backend (kernels/src/cpu/elementwise.rs): its four chains of
// eight lanes are the 32 lanes of a warp, and every 16 lines of 32 elements a lane's sum moves up a level.
#pragma once
#include "arch.cuh"

// Lanes of one chain.
#define NORM_LANES 8
// Additions before a chain's sum moves up a level.
#define NORM_STEP 16

// The sum of squares of all of `x`, the same in every lane: `chain` is this lane's sum of the first `lines` whole lines.
DEV float fold_chains(float chain, const float* x, u32 lines, u32 length) {
    // Whole lines of eight that are left go to the first chain.
    u32 at = lines * WARP;
    for (; at + NORM_LANES <= length; at += NORM_LANES) {
        float value = x[at + lane() % NORM_LANES];
        if (lane() < NORM_LANES) chain += value * value;
    }
    float folded = shuffle(chain, lane() % NORM_LANES);
    UNROLL for (u32 from = NORM_LANES; from < WARP; from += NORM_LANES)
        folded += shuffle(chain, from + lane() % NORM_LANES);
    float sum = 0.0f;
    for (; at < length; at++) sum += x[at] * x[at];
    UNROLL for (u32 from = 0; from < NORM_LANES; from++) sum += shuffle(folded, from);
    return sum;
}
