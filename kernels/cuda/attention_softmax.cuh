// The softmax of tiles of scores, one after the other, in the registers of a warp: what both kernels of bf16 attention
// share. A warp has 16 queries; a thread has scores[i][2 * row + e] of its queries lane / 4 and lane / 4 + 8 and of keys
// 8 * i + 2 * (lane % 4) + e. Knows neither how scores come about nor what their exponentials are for.
#pragma once
#include "attention.cuh"

namespace attention {

// What becomes of a product of a query and a key.
struct Scoring {
    // Positions seen.
    u32 window;
    // 1 / sqrt(head_dim).
    float scale;
    // Scores become softcap * tanh(score / softcap); 0 for none.
    float softcap;
};

// Of a thread's two rows: largest score so far, and this thread's part of the denominator.
struct Running {
    float largest[2], total[2];
};

// No score yet. A sink is a score whose value is 0; one thread of the four that share a row counts it.
DEV void begin_softmax(Running& running, const float* sink) {
    UNROLL
    for (u32 row = 0; row < 2; row++) {
        running.largest[row] = sink ? *sink : -float_of(0x7f800000);
        running.total[row] = sink && lane() % 4 == 0 ? 1.0f : 0.0f;
    }
}

// Scales and caps scores, and takes out what a query does not see. `position`: of the warp's first query.
DEV void restrict_scores(float (&scores)[KEYS / 8][4], u32 tile, u32 position, const Scoring& scoring) {
    UNROLL
    for (u32 i = 0; i < KEYS / 8; i++)
        UNROLL
        for (u32 e = 0; e < 4; e++) scores[i][e] *= scoring.scale;
    if (scoring.softcap > 0.0f) {
        float inverse = 1.0f / scoring.softcap;
        UNROLL
        for (u32 i = 0; i < KEYS / 8; i++)
            UNROLL
            for (u32 e = 0; e < 4; e++) scores[i][e] = scoring.softcap * tanh_fast(scores[i][e] * inverse);
    }
    // Every query of the warp sees all of the tile.
    u32 first = tile * KEYS;
    if (first + KEYS - 1 <= position && first_seen(position + 15, scoring.window) <= first) return;
    UNROLL
    for (u32 i = 0; i < KEYS / 8; i++)
        UNROLL
        for (u32 e = 0; e < 4; e++) {
            u32 key = first + 8 * i + 2 * (lane() % 4) + e % 2;
            u32 query = position + lane() / 4 + 8 * (e / 2);
            bool seen = key <= query && key >= first_seen(query, scoring.window);
            scores[i][e] = seen ? scores[i][e] : -float_of(0x7f800000);
        }
}

// By how much what was summed so far has to shrink. `moved`, the same for all lanes: whether there is anything to do.
struct Shrink {
    bool moved;
    float factor[2];
};

// Largest score of a row so far.
DEV float largest_of(const float (&scores)[KEYS / 8][4], u32 row, float before) {
    float even = before, odd = -float_of(0x7f800000);
    UNROLL
    for (u32 i = 0; i < KEYS / 8; i++) {
        even = maximum(even, scores[i][2 * row]);
        odd = maximum(odd, scores[i][2 * row + 1]);
    }
    float largest = maximum(even, odd);
    largest = maximum(largest, shuffle_xor(largest, 1));
    return maximum(largest, shuffle_xor(largest, 2));
}

// Turns scores into exponentials under the running maximum.
DEV Shrink exponentials(float (&scores)[KEYS / 8][4], Running& running) {
    Shrink shrink;
    float largest[2], origin[2];
    UNROLL
    for (u32 row = 0; row < 2; row++) {
        largest[row] = largest_of(scores, row, running.largest[row]);
        // A query that has seen no key yet: its exponentials must be 0.
        origin[row] = largest[row] == -float_of(0x7f800000) ? 0.0f : largest[row];
    }
    // Mostly no query of the warp has a new largest score. Factors would be 1, and a product with 1 changes no bit.
    shrink.moved = !every_lane(largest[0] == running.largest[0] && largest[1] == running.largest[1]);
    if (shrink.moved) {
        UNROLL
        for (u32 row = 0; row < 2; row++) {
            // A score that is infinite or NaN makes all of the row NaN: the exponentials below are those of numbers.
            shrink.factor[row] = exp_fast(running.largest[row] - origin[row]) + (origin[row] - origin[row]);
            running.total[row] *= shrink.factor[row];
            running.largest[row] = largest[row];
        }
    }
    UNROLL
    for (u32 row = 0; row < 2; row++) {
        float sum = 0.0f;
        UNROLL
        for (u32 i = 0; i < KEYS / 8; i++)
            UNROLL
            for (u32 e = 0; e < 2; e++) {
                scores[i][2 * row + e] = exp_fast_number(scores[i][2 * row + e] - origin[row]);
                sum += scores[i][2 * row + e];
            }
        running.total[row] += sum;
    }
    return shrink;
}

// Shrinks sums over values: [8 dimensions][row, dimension].
template <u32 COUNT> DEV void rescale(float (&sums)[COUNT][4], const Shrink& shrink) {
    if (!shrink.moved) return;
    UNROLL
    for (u32 d = 0; d < COUNT; d++)
        UNROLL
        for (u32 e = 0; e < 4; e++) sums[d][e] *= shrink.factor[e / 2];
}

// Exponentials of 16 keys from 16 * k on as a left operand: what a thread has of them is what it must have of it.
DEV void as_operand(u32 (&left)[4], const float (&scores)[KEYS / 8][4], u32 k) {
    const float(&low)[4] = scores[2 * k];
    const float(&high)[4] = scores[2 * k + 1];
    left[0] = pack_bf16(low[0], low[1]);
    left[1] = pack_bf16(low[2], low[3]);
    left[2] = pack_bf16(high[0], high[1]);
    left[3] = pack_bf16(high[2], high[3]);
}

// A row's denominator, of the four threads that share it.
DEV float denominator(const Running& running, u32 row) {
    float total = running.total[row];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    return total;
}

// The quotient, rounded once, by a denominator whose reciprocal, rounded once, is known (Markstein): the second
// remainder is exact where nothing leaves the range of normal numbers.
DEV float quotient(float sum, float total, float reciprocal) {
    float near = sum * reciprocal;
    near = fused(fused(-total, near, sum), reciprocal, near);
    return fused(fused(-total, near, sum), reciprocal, near);
}

// Divides a row's sums of the first `width` dimensions by its denominator. A division by itself is a dozen
// instructions that wait for one another.
template <u32 COUNT> DEV void divide(float (&sums)[COUNT][4], u32 row, u32 width, float total) {
    const float HIGH = float_of(0x6c800000u), LOW = float_of(0x12800000u);  // 2^90, 2^-90
    float largest = 0.0f, least_negative = -HIGH;
    UNROLL
    for (u32 d = 0; d < COUNT; d++)
        UNROLL
        for (u32 e = 0; e < 2; e++) {
            if (8 * d >= width) continue;
            float size = magnitude(sums[d][2 * row + e]);
            largest = maximum(largest, size);
            least_negative = maximum(least_negative, -size);
        }
    float reciprocal = 1.0f / total;
    // A NaN is not plain.
    bool plain = largest < HIGH && least_negative < -LOW && total >= 1.0f && total < HIGH;
    if (plain) {
        UNROLL
        for (u32 d = 0; d < COUNT; d++)
            UNROLL
            for (u32 e = 0; e < 2; e++) sums[d][2 * row + e] = quotient(sums[d][2 * row + e], total, reciprocal);
        return;
    }
    UNROLL
    for (u32 d = 0; d < COUNT; d++)
        UNROLL
        for (u32 e = 0; e < 2; e++) sums[d][2 * row + e] /= total;
}

}  // namespace attention
