// Products in f32 in the order of the CPU backend, whatever the tiling: kernels/src/cpu/row_tiles.rs (chains and their
// blocks), panel.rs (pairs) and exact.rs (sums of codes and their scales). Also puts the columns of operands in the
// order of act-ordered tiles.
#include "codes.cuh"
#include "matrix.cuh"

#define ORDERED_THREADS 256
// A block: 64 rows of the matrix by 128 tokens; a thread 4 rows by 8 tokens.
#define ORDERED_TOKENS 128
#define THREAD_ROWS 4
#define THREAD_TOKENS 8
// Floats from one k to the next in shared memory: a multiple of 4, and not of 32.
#define W_STRIDE (MATRIX_TILE + 4)
#define X_STRIDE (ORDERED_TOKENS + 4)
#define ORDERED_SHARED ((W_STRIDE + X_STRIDE) * MATRIX_TILE * 4)

enum ProductMode : u32 {
    // An ascending chain for each run of `step`, runs added in order.
    PRODUCT_BLOCKS,
    // One chain in pairs over all of k, divided by `divisor`.
    PRODUCT_SCALED,
    // A chain in pairs for each run of `step`, times the scales of both sides.
    PRODUCT_FLOATS,
    // The same with exact sums of integers, in f64.
    PRODUCT_INTEGERS
};

struct OrderedArgs {
    Matrix matrix;
    Matrix stored;        // the same rows with their stored scales, where sums are multiplied with them
    const void* x;        // f32 [m, k]; codes of floats f16, of integers bytes, [m, k_tiles * 64]
    const float* scales;  // of activations, [m, k / segment]
    const float* offsets; // zero points of integers, as the scales, or null
    float* y;             // [m, y_stride]
    u32 m;
    u32 y_stride;
    u32 step;             // k of one run
    u32 segment;          // k that share an activation scale
    float divisor;
};

struct alignas(16) Four { float v[4]; };

// One k of a thread's operands.
struct Step {
    float w[THREAD_ROWS];
    float x[THREAD_TOKENS];
};

DEV const float* w_panel() { return (const float*)shared(); }
DEV const float* x_panel() { return (const float*)shared() + W_STRIDE * MATRIX_TILE; }

DEV Step load_step(u32 k) {
    Step step;
    Four w = *(const Four*)(w_panel() + k * W_STRIDE + thread() % 16 * THREAD_ROWS);
    Four low = *(const Four*)(x_panel() + k * X_STRIDE + thread() / 16 * THREAD_TOKENS);
    Four high = *(const Four*)(x_panel() + k * X_STRIDE + thread() / 16 * THREAD_TOKENS + 4);
    UNROLL
    for (u32 i = 0; i < 4; i++) step.w[i] = w.v[i], step.x[i] = low.v[i], step.x[i + 4] = high.v[i];
    return step;
}

template <class T> DEV void take(const Step& step, T (&sums)[THREAD_ROWS][THREAD_TOKENS]) {
    UNROLL
    for (u32 i = 0; i < THREAD_ROWS; i++) {
        UNROLL
        for (u32 j = 0; j < THREAD_TOKENS; j++) sums[i][j] = fused((T)step.x[j], (T)step.w[i], sums[i][j]);
    }
}

// Codes of one tile as numbers, without zero points, [k][64 rows]: a warp takes half of an atom's k.
template <u32 CODE> DEV void code_panel(const Matrix& m, u32 row_tile, u32 k_tile) {
    u32 words[CodeBits<CODE>::value], atom = warp() % 4;
    load_codes<CODE>(m, row_tile, k_tile, atom, words);
    float* panel = (float*)shared();
    UNROLL
    for (u32 s = 0; s < 4; s++) {
        if (s / 2 != warp() / 4) continue;
        UNROLL
        for (u32 i = 0; i < 8; i++) {
            u32 r = i / 2, k = 16 * s + 2 * (lane() % 4) + i % 2 + 8 * (r >> 1);
            float value = code_value<CODE>(m, code_of<CODE>(words, s, r, i % 2), 0.0f);
            panel[k * W_STRIDE + atom * ATOM + lane() / 4 + 8 * (r & 1)] = value;
        }
    }
}

// Makes weights of the numbers of codes. Apart from them, so that it is there once and not once a code: a code less
// its zero point is exact, or rounded once, either way.
DEV void weigh_panel(const Matrix& m, u32 row_tile, u32 k_tile) {
    u32 row = thread() % MATRIX_TILE, known = ~0u;
    ScalePlace place = scale_place(m, row_tile * MATRIX_TILE + row);
    float scale = 1.0f, zero = 0.0f;
    for (u32 k = thread() / MATRIX_TILE; k < MATRIX_TILE; k += ORDERED_THREADS / MATRIX_TILE) {
        u32 group = least(k_tile * MATRIX_TILE + k, m.k - 1) / m.group;
        if (group != known) scale = scale_at(m, place, group), zero = zero_at(m, place, group), known = group;
        float* value = (float*)shared() + k * W_STRIDE + row;
        *value = scaled_weight<CODE_INT4>(m, *value - zero, scale);
    }
}

template <u32 MODE> DEV float input(const OrderedArgs& args, u32 token, u32 column) {
    const Matrix& m = args.matrix;
    u64 padded = (u64)token * m.k_tiles * MATRIX_TILE;
    if (MODE == PRODUCT_FLOATS) return f16_to_f32(((const u16*)args.x)[padded + column]);
    if (MODE != PRODUCT_INTEGERS) return ((const float*)args.x)[(u64)token * m.k + column];
    float code = (float)((const i8*)args.x)[padded + code_slot(column)];
    if (!args.offsets) return code;
    return code - args.offsets[(u64)token * (m.k / args.segment) + column / args.segment];
}

template <u32 MODE> DEV void fill_panels(const OrderedArgs& args, u32 row_tile, u32 k_tile, u32 first_token) {
    const Matrix& m = args.matrix;
    switch (m.code) {
    case CODE_INT4: code_panel<CODE_INT4>(m, row_tile, k_tile); break;
    case CODE_E2M1: code_panel<CODE_E2M1>(m, row_tile, k_tile); break;
    case CODE_INT8: code_panel<CODE_INT8>(m, row_tile, k_tile); break;
    case CODE_E4M3: code_panel<CODE_E4M3>(m, row_tile, k_tile); break;
    case CODE_BF16: code_panel<CODE_BF16>(m, row_tile, k_tile); break;
    case CODE_F16: code_panel<CODE_F16>(m, row_tile, k_tile); break;
    default: code_panel<CODE_F32>(m, row_tile, k_tile); break;
    }
    float* panel = (float*)shared() + W_STRIDE * MATRIX_TILE;
    u32 k = thread() % MATRIX_TILE, column = k_tile * MATRIX_TILE + k;
    for (u32 i = thread() / MATRIX_TILE; i < ORDERED_TOKENS; i += ORDERED_THREADS / MATRIX_TILE) {
        u32 token = first_token + i;
        bool there = token < args.m && column < m.k;
        panel[k * X_STRIDE + i] = there ? input<MODE>(args, token, column) : 0.0f;
    }
    sync_block();
    if (m.code < CODE_BF16) weigh_panel(m, row_tile, k_tile);
    sync_block();
}

// What a thread carries from one tile of k to the next.
template <u32 MODE> struct Sums {
    static constexpr bool PAIRS = MODE == PRODUCT_SCALED || MODE == PRODUCT_FLOATS;
    static constexpr bool INTEGERS = MODE == PRODUCT_INTEGERS;
    float out[THREAD_ROWS][THREAD_TOKENS] = {};
    float run[THREAD_ROWS][THREAD_TOKENS] = {};
    double exact[INTEGERS ? THREAD_ROWS : 1][THREAD_TOKENS] = {};
    // The even half of a pair whose odd half is in the next tile.
    Step even;
    bool waiting = false;
};

template <u32 MODE> DEV void chain(Sums<MODE>& sums, u32 from, u32 to, bool last) {
    if constexpr (MODE == PRODUCT_INTEGERS) {
        for (u32 k = from; k < to; k++) take<double>(load_step(k), sums.exact);
    } else if constexpr (Sums<MODE>::PAIRS) {
        if (sums.waiting && from < to) {
            take<float>(load_step(from++), sums.run);
            take<float>(sums.even, sums.run);
            sums.waiting = false;
        }
        for (; from + 1 < to; from += 2) {
            Step even = load_step(from);
            take<float>(load_step(from + 1), sums.run);
            take<float>(even, sums.run);
        }
        if (from < to) {
            sums.even = load_step(from);
            sums.waiting = !last;
            if (last) take<float>(sums.even, sums.run);
        }
    } else {
        for (u32 k = from; k < to; k++) take<float>(load_step(k), sums.run);
    }
}

// A run of k is complete: its sums go to the outputs.
template <u32 MODE> DEV void close_run(const OrderedArgs& args, Sums<MODE>& sums, u32 start, u32 row, u32 token) {
    const Matrix& w = args.stored;
    UNROLL
    for (u32 i = 0; i < THREAD_ROWS; i++) {
        float weight_scale = 1.0f;
        if (MODE >= PRODUCT_FLOATS) weight_scale = scale_at(w, scale_place(w, row + i), start / w.group);
        UNROLL
        for (u32 j = 0; j < THREAD_TOKENS; j++) {
            float sum = sums.run[i][j];
            if constexpr (Sums<MODE>::INTEGERS) sum = (float)sums.exact[i][j], sums.exact[i][j] = 0.0;
            sums.run[i][j] = 0.0f;
            if (MODE >= PRODUCT_FLOATS) {
                // A scale that does not change along k is applied once, at the end.
                float scale = 1.0f;
                if (args.segment < w.k && token + j < args.m)
                    scale = args.scales[(u64)(token + j) * (w.k / args.segment) + start / args.segment];
                sum = sum * (weight_scale * scale);
            }
            sums.out[i][j] = MODE == PRODUCT_SCALED ? sum / args.divisor : sums.out[i][j] + sum;
        }
    }
}

template <u32 MODE> DEV void store(const OrderedArgs& args, const Sums<MODE>& sums, u32 row, u32 token) {
    const Matrix& m = args.matrix;
    UNROLL
    for (u32 j = 0; j < THREAD_TOKENS; j++) {
        if (token + j >= args.m) continue;
        bool once = MODE >= PRODUCT_FLOATS && args.segment >= m.k;
        float scale = once ? args.scales[token + j] : 1.0f;
        UNROLL
        for (u32 i = 0; i < THREAD_ROWS; i++) {
            bool held = row + i >= m.first && row + i < m.first + m.n;
            float value = once ? sums.out[i][j] * scale : sums.out[i][j];
            if (held) args.y[(u64)(token + j) * args.y_stride + (row + i - m.first)] = value;
        }
    }
}

template <u32 MODE> DEV void ordered(const OrderedArgs& args) {
    const Matrix& m = args.matrix;
    u32 first_token = block_y() * ORDERED_TOKENS;
    u32 row = block_x() * MATRIX_TILE + thread() % 16 * THREAD_ROWS;
    u32 token = first_token + thread() / 16 * THREAD_TOKENS;
    Sums<MODE> sums;
    u32 start = 0;
    for (u32 k_tile = 0; k_tile < m.k_tiles; k_tile++) {
        fill_panels<MODE>(args, block_x(), k_tile, first_token);
        u32 first = k_tile * MATRIX_TILE, end = least(first + MATRIX_TILE, m.k);
        for (u32 at = first; at < end;) {
            u32 run_end = least(start + args.step, m.k), to = least(end, run_end);
            chain<MODE>(sums, at - first, to - first, to == run_end);
            if (to == run_end) {
                close_run<MODE>(args, sums, start, row, token);
                start = run_end;
            }
            at = to;
        }
        sync_block();
    }
    store<MODE>(args, sums, row, token);
}

KERNEL(linear_blocks, OrderedArgs, ORDERED_THREADS, ORDERED_SHARED) { ordered<PRODUCT_BLOCKS>(args); }
KERNEL(linear_scaled, OrderedArgs, ORDERED_THREADS, ORDERED_SHARED) { ordered<PRODUCT_SCALED>(args); }
KERNEL(linear_floats, OrderedArgs, ORDERED_THREADS, ORDERED_SHARED) { ordered<PRODUCT_FLOATS>(args); }
KERNEL(linear_integers, OrderedArgs, ORDERED_THREADS, ORDERED_SHARED) { ordered<PRODUCT_INTEGERS>(args); }

struct PermuteArgs {
    const u8* x;             // [rows, stride] of elements of 8, 16 or 32 bits; bytes lie by code_slot()
    u8* out;                 // the same
    const u32* permutation;  // column j becomes input permutation[j]
    u32 k;
    u32 stride;              // columns from k on are zero
};

template <class T> DEV u32 place(u32 column) { return sizeof(T) == 1 ? code_slot(column) : column; }

template <class T> DEV void permute(const PermuteArgs& args) {
    const T* x = (const T*)args.x + (u64)block_x() * args.stride;
    T* out = (T*)args.out + (u64)block_x() * args.stride;
    for (u32 column = thread(); column < args.stride; column += ORDERED_THREADS)
        out[place<T>(column)] = column < args.k ? x[place<T>(args.permutation[column])] : (T)0;
}

// One row of an operand a block.
KERNEL(permute_8, PermuteArgs, ORDERED_THREADS, 0) { permute<u8>(args); }
KERNEL(permute_16, PermuteArgs, ORDERED_THREADS, 0) { permute<u16>(args); }
KERNEL(permute_32, PermuteArgs, ORDERED_THREADS, 0) { permute<u32>(args); }
