// Operations without a product of matrices that touch every element once: sums, gates, copies of rows, rotation.
#include "numbers.cuh"

#define ELEMENTWISE_THREADS 256
// Columns that one block of a kernel over rows covers.
#define ELEMENTWISE_COLUMNS 1024

struct PairArgs {
    float* x;
    const float* y;
    u64 count;
};

DEV u64 element() { return (u64)block_x() * ELEMENTWISE_THREADS + thread(); }

struct ZeroArgs {
    float* x;
    u64 count;
};

// x = 0.
KERNEL(zero, ZeroArgs, ELEMENTWISE_THREADS, 0) {
    u64 i = element();
    if (i < args.count) args.x[i] = 0.0f;
}

// x += y.
KERNEL(add, PairArgs, ELEMENTWISE_THREADS, 0) {
    u64 i = element();
    if (i < args.count) args.x[i] += args.y[i];
}

struct GateArgs {
    float* out;
    const float* gate;
    const float* up;
    u64 count;
};

// out = silu(gate) * up; out may be gate.
KERNEL(gate, GateArgs, ELEMENTWISE_THREADS, 0) {
    u64 i = element();
    if (i < args.count) args.out[i] = silu(args.gate[i]) * args.up[i];
}

// Calls `body` with each column of this block: block y of ELEMENTWISE_COLUMNS columns.
template <class Body> DEV void for_columns(u32 width, Body body) {
    UNROLL for (u32 step = 0; step < ELEMENTWISE_COLUMNS / ELEMENTWISE_THREADS; step++) {
        u32 column = block_y() * ELEMENTWISE_COLUMNS + step * ELEMENTWISE_THREADS + thread();
        if (column < width) body(column);
    }
}

struct BiasArgs {
    float* y;
    const float* bias;
    u32 width;
};

// y += bias in every row; block x is a row.
KERNEL(add_bias, BiasArgs, ELEMENTWISE_THREADS, 0) {
    float* y = args.y + (u64)block_x() * args.width;
    for_columns(args.width, [&](u32 column) { y[column] += args.bias[column]; });
}

struct GatherArgs {
    const float* x;
    float* out;
    const u32* rows;
    u32 width;
};

// Row i of `out` is row `rows[i]` of `x`; block x is i.
KERNEL(gather, GatherArgs, ELEMENTWISE_THREADS, 0) {
    const float* x = args.x + (u64)args.rows[block_x()] * args.width;
    float* out = args.out + (u64)block_x() * args.width;
    for_columns(args.width, [&](u32 column) { out[column] = x[column]; });
}

struct ScatterArgs {
    float* x;
    const float* y;
    const u32* rows;
    const float* weights;
    u32 width;
};

// x[rows[i]] += weights[i] * y[i], rounded twice. Rows are distinct, so no two blocks meet.
KERNEL(scatter_add, ScatterArgs, ELEMENTWISE_THREADS, 0) {
    float* x = args.x + (u64)args.rows[block_x()] * args.width;
    const float* y = args.y + (u64)block_x() * args.width;
    float weight = args.weights[block_x()];
    for_columns(args.width, [&](u32 column) { x[column] += weight * y[column]; });
}

struct PlaceArgs {
    const float* part;
    float* out;
    u32 width;
    u32 stride;
};

// Columns of one part among the `stride` columns of `out`; block x is a row.
KERNEL(place_columns, PlaceArgs, ELEMENTWISE_THREADS, 0) {
    const float* part = args.part + (u64)block_x() * args.width;
    float* out = args.out + (u64)block_x() * args.stride;
    for_columns(args.width, [&](u32 column) { out[column] = part[column]; });
}

struct FiniteArgs {
    const float* x;
    u64 count;
    u32 width;
    u32 blocks;
    u32* first;
};

// Groups of four elements that a thread has under way.
#define FINITE_QUADS 4

// The row of the first element of a group that is not finite; the largest number where all are.
DEV u32 bad_row(const FiniteArgs& args, u64 quad, Quad q) {
    if (is_finite(q.x) && is_finite(q.y) && is_finite(q.z) && is_finite(q.w)) return 0xffffffffu;
    u32 before = !is_finite(q.x) ? 0 : !is_finite(q.y) ? 1 : !is_finite(q.z) ? 2 : 3;
    return (u32)((quad * 4 + before) / args.width);
}

// first[block]: the first of the rows seen by the block that holds a NaN or an infinity, else the largest number.
KERNEL(first_non_finite, FiniteArgs, ELEMENTWISE_THREADS, 4 * (ELEMENTWISE_THREADS / WARP)) {
    u32 first = 0xffffffffu;
    const u64 step = (u64)args.blocks * ELEMENTWISE_THREADS, quads = args.count / 4;
    for (u64 begin = element(); begin < quads; begin += step * FINITE_QUADS) {
        Quad found[FINITE_QUADS];
        // The last one again rather than none: nothing then stands between the loads.
        UNROLL for (u32 i = 0; i < FINITE_QUADS; i++) found[i] = load16(args.x + least(begin + i * step, quads - 1) * 4);
        UNROLL for (u32 i = 0; i < FINITE_QUADS; i++)
            first = least(first, bad_row(args, least(begin + i * step, quads - 1), found[i]));
    }
    // Less than a group is left.
    u64 rest = quads * 4 + thread();
    if (block_x() == 0 && rest < args.count && !is_finite(bits_of(args.x[rest]))) first = least(first, (u32)(rest / args.width));
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) first = least(first, shuffle_xor(first, mask));
    u32* warps = (u32*)shared();
    if (lane() == 0) warps[warp()] = first;
    sync_block();
    if (thread() == 0) {
        for (u32 i = 1; i < ELEMENTWISE_THREADS / WARP; i++) first = least(first, warps[i]);
        args.first[block_x()] = first;
    }
}

struct RotateArgs {
    float* x;
    const float* cos;
    const float* sin;
    // Position of every row inside its window; the largest number for a row of no window.
    const u32* positions;
    u32 width;
    u32 half;
};

// (a, b) at (i, i + half) of each head become (a cos - b sin, b cos + a sin), products rounded first; block x is a row.
KERNEL(rotate, RotateArgs, ELEMENTWISE_THREADS, 0) {
    u32 position = args.positions[block_x()];
    if (position == 0xffffffffu) return;
    const float* cosines = args.cos + (u64)position * args.half;
    const float* sines = args.sin + (u64)position * args.half;
    float* row = args.x + (u64)block_x() * args.width;
    u32 pairs = args.width / (2 * args.half) * args.half;
    for_columns(pairs, [&](u32 pair) {
        u32 i = pair % args.half;
        float* first = row + (pair - i) * 2 + i;
        float* second = first + args.half;
        float a = *first, b = *second, cosine = cosines[i], sine = sines[i];
        *first = a * cosine - b * sine;
        *second = b * cosine + a * sine;
    });
}
