// RMS norm in f32. The sum of squares follows the CPU backend's order (kernels/src/cpu/elementwise.rs): its four chains
// of eight lanes are the 32 lanes of a warp.
#include "arch.cuh"

#define NORM_THREADS 256
// Lanes of one chain.
#define NORM_LANES 8
// Additions before a chain's sum moves up a level.
#define NORM_STEP 16

struct NormArgs {
    const float* x;
    float* out;
    const float* weight;
    // Runs of `length` elements.
    u64 runs;
    u32 length;
    float epsilon;
};

// This lane's sum of squares of `lines` whole lines of 32, over four levels.
DEV float square_levels(const float* x, u32 lines) {
    float levels[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    u32 line = 0;
    for (; line + NORM_STEP <= lines; line += NORM_STEP) {
        // Read ahead of the chain.
        float values[NORM_STEP];
        UNROLL for (u32 i = 0; i < NORM_STEP; i++) values[i] = x[(line + i) * WARP + lane()];
        UNROLL for (u32 i = 0; i < NORM_STEP; i++) levels[0] += values[i] * values[i];
        levels[1] += levels[0];
        levels[0] = 0.0f;
        u32 done = line / NORM_STEP + 1;
        if (done % NORM_STEP == 0) {
            levels[2] += levels[1];
            levels[1] = 0.0f;
            if (done % (NORM_STEP * NORM_STEP) == 0) {
                levels[3] += levels[2];
                levels[2] = 0.0f;
            }
        }
    }
    for (; line < lines; line++) {
        float value = x[line * WARP + lane()];
        levels[0] += value * value;
    }
    return levels[0] + levels[1] + levels[2] + levels[3];
}

// Sum of squares of one run, the same in every lane.
DEV float square_sum(const float* x, u32 length) {
    u32 lines = length / WARP;
    float chain = square_levels(x, lines);
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

// out = (x * (1 / sqrt(mean of squares + epsilon))) * weight; a warp a run.
KERNEL(rms_norm, NormArgs, NORM_THREADS, 0) {
    u64 run = (u64)block_x() * (NORM_THREADS / WARP) + warp();
    if (run >= args.runs) return;
    const float* x = args.x + run * args.length;
    float* out = args.out + run * args.length;
    float mean = square_sum(x, args.length) / (float)args.length;
    float inverse = 1.0f / root(mean + args.epsilon);
    for (u32 i = lane(); i < args.length; i += WARP) out[i] = (x[i] * inverse) * args.weight[i];
}
