// Linears on tensor cores straight from packed tiles: one product, or several of the same shape in one launch.
#include "tensor_product.cuh"

// What becomes of what is in the place of a result: `Store` of device.rs.
#define STORE_OVER 0
#define STORE_ADDED 1

// One product; `ProblemArgs` in linear/fused.rs.
struct Problem {
    Matrix matrix;
    const u16* x;     // bf16 [m, k_tiles * 64], zero beyond k
    float* y;         // [m, y_stride]
    const float* bias;   // one a row, or null
    const float* added;  // [m, added_stride], or null; may be `y`
    u32 m;
    u32 first_block;  // blocks of tokens before it
    u32 y_stride;
    float divisor;    // of all sums
    u32 added_stride;
    u32 padding;
};
static_assert(sizeof(Problem) == 144, "as ProblemArgs in linear/fused.rs");

struct FusedArgs {
    Problem single;
    const Problem* problems;  // or null: `single`
    u32 count;
};

// The last problem that begins at or before this block of tokens.
DEV const Problem& problem(const FusedArgs& args) {
    if (!args.problems) return args.single;
    u32 low = 0, high = args.count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (args.problems[middle].first_block <= block_y()) low = middle;
        else high = middle;
    }
    return args.problems[low];
}

template <u32 HALF> DEV void store_half(const Problem& p, const float (&sums)[16][4], u32 first_token) {
    sync_block();
    stage_sums<HALF>(sums, p.divisor);
    sync_block();
    u32 row = thread() % PRODUCT_ROWS, held = block_x() * PRODUCT_ROWS + row;
    bool wanted = held >= p.matrix.first && held - p.matrix.first < p.matrix.n;
    // A sum that is not biased must stay as it is: -0 + 0 is another number.
    bool biased = p.bias && wanted;
    float bias = biased ? p.bias[held - p.matrix.first] : 0.0f;
    for (u32 i = thread() / PRODUCT_ROWS; i < STAGED_TOKENS; i += PRODUCT_THREADS / PRODUCT_ROWS) {
        u32 token = first_token + HALF * STAGED_TOKENS + i;
        if (wanted && token < p.m) {
            u32 column = held - p.matrix.first;
            float sum = staged()[i * STAGED_STRIDE + row];
            if (biased) sum += bias;
            if (p.added) sum = p.added[(u64)token * p.added_stride + column] + sum;
            p.y[(u64)token * p.y_stride + column] = sum;
        }
    }
}

template <u32 CODE, u32 ARITHMETIC> DEV void linear_fused(const FusedArgs& args) {
    // By value: a reference that may lead to either place would be followed at every use.
    const Problem p = problem(args);
    u32 first_token = (block_y() - p.first_block) * PRODUCT_TOKENS;
    float sums[16][4];
    product_tile<CODE, ARITHMETIC>(p.matrix, p.x, p.m, block_x(), first_token, sums);
    store_half<0>(p, sums, first_token);
    store_half<1>(p, sums, first_token);
}

#define FUSED_KERNEL(name, CODE, ARITHMETIC)                                                                           \
    KERNEL(fused_##name, FusedArgs, PRODUCT_THREADS, PRODUCT_SHARED) { linear_fused<CODE, ARITHMETIC>(args); }

FUSED_KERNEL(int4, CODE_INT4, BY_ANY)
FUSED_KERNEL(int4_bf16, CODE_INT4, BY_BF16)
FUSED_KERNEL(e2m1, CODE_E2M1, BY_ANY)
FUSED_KERNEL(e2m1_table, CODE_E2M1, BY_TABLE)
FUSED_KERNEL(int8, CODE_INT8, BY_ANY)
FUSED_KERNEL(int8_bf16, CODE_INT8, BY_BF16)
FUSED_KERNEL(e4m3, CODE_E4M3, BY_ANY)
FUSED_KERNEL(e4m3_bf16, CODE_E4M3, BY_BF16)
FUSED_KERNEL(bf16, CODE_BF16, BY_ANY)
FUSED_KERNEL(f16, CODE_F16, BY_ANY)
FUSED_KERNEL(f32, CODE_F32, BY_ANY)

#define COPY_THREADS 256

struct CopyColumnsArgs {
    const float* from;  // [rows, from_stride]
    float* to;          // [rows, to_stride]
    u32 columns;
    u32 from_stride;
    u32 to_stride;
    u32 store;
};

// The first columns of a row each block, or added to what is there.
KERNEL(copy_columns, CopyColumnsArgs, COPY_THREADS, 0) {
    const float* from = args.from + (u64)block_x() * args.from_stride;
    float* to = args.to + (u64)block_x() * args.to_stride;
    for (u32 i = thread(); i < args.columns; i += COPY_THREADS)
        to[i] = args.store == STORE_ADDED ? to[i] + from[i] : from[i];
}

struct PadRowsArgs {
    const u8* from;  // rows * row_bytes
    u8* to;          // the same, then zeros
    u32 rows;
    u32 row_bytes;   // a multiple of 16
};

// One row a block; rows beyond `rows` become zero.
KERNEL(pad_rows, PadRowsArgs, COPY_THREADS, 0) {
    bool there = block_x() < args.rows;
    const u8* from = args.from + (u64)(there ? block_x() : 0) * args.row_bytes;
    u8* to = args.to + (u64)block_x() * args.row_bytes;
    for (u32 at = thread() * 16; at < args.row_bytes; at += COPY_THREADS * 16)
        store16(to + at, there ? load16(from + at) : Quad{0, 0, 0, 0});
}
