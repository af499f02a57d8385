// RMS norm in f32, results in f32.
#include "norm.cuh"

#define NORM_THREADS 256

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
    return fold_chains(chain, x, lines, length);
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
