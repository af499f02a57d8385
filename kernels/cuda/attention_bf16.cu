// Causal attention of bf16 operands on tensor cores, with a running maximum over tiles of keys (FlashAttention-2).
//
// First keys and values are rounded and laid out head by head. Then a block takes 64 queries of one head of one window,
// 16 a warp: a warp's scores, probabilities and sums over values stay in its registers. Which tiles there are depends
// on the position in the window alone, and a tile that a query does not see leaves its bits as they are: so neither
// other windows, nor heads, nor the block's other queries show in a result.
#include "attention_softmax.cuh"

namespace attention {

const u32 QUERIES = 64;
const u32 THREADS = 128;

// The nearest bf16 numbers of row[first..first + 8], zero from `width` on.
DEV Quad load_bf16(const float* row, u32 first, u32 width) {
    float x[8];
    // Rows are multiples of the width apart.
    if (first + 8 <= width && width % 4 == 0) {
        Quad low = load16(row + first), high = load16(row + first + 4);
        return Quad{pack_bf16(float_of(low.x), float_of(low.y)), pack_bf16(float_of(low.z), float_of(low.w)),
                    pack_bf16(float_of(high.x), float_of(high.y)), pack_bf16(float_of(high.z), float_of(high.w))};
    }
    UNROLL
    for (u32 i = 0; i < 8; i++) x[i] = first + i < width ? row[first + i] : 0.0f;
    return Quad{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
}

}  // namespace attention

struct AttendPackArgs {
    // f32 [rows, heads * head_dim].
    const float* from;
    // bf16 [heads from first_head on][rows][padded_dim].
    u16* to;
    u64 rows;
    u32 heads, first_head, head_dim, padded_dim;
};

// Threads of attend_pack, each of which writes 16 bytes.
#define ATTEND_PACK_THREADS 256

// Rounds heads to bf16, one after the other, padded with zeros. Grid: (row and run of 8 dimensions, head).
KERNEL(attend_pack, AttendPackArgs, ATTEND_PACK_THREADS, 0) {
    u32 runs = args.padded_dim / 8;
    u64 index = (u64)block_x() * ATTEND_PACK_THREADS + thread();
    u64 row = index / runs;
    u32 first = (u32)(index % runs) * 8;
    u32 head = args.first_head + block_y();
    if (row >= args.rows) return;
    const float* from = args.from + (row * args.heads + head) * args.head_dim;
    Quad packed = attention::load_bf16(from, first, args.head_dim);
    store16(args.to + (block_y() * args.rows + row) * args.padded_dim + first, packed);
}

struct AttendBf16Args {
    // f32 [rows of queries, heads * head_dim], from first_head on.
    const float* queries;
    // bf16 [heads from first_kv_head on][rows][padded_dim].
    const u16* keys;
    const u16* values;
    // f32 [rows of queries, heads * head_dim], from first_head on.
    float* output;
    const attention::Item* items;
    // One logit a head from first_head on that takes part in the softmax without a value; null for none.
    const float* sinks;
    // Rows of keys and values.
    u64 rows;
    // Query heads that are computed, and the first of them.
    u32 heads, first_head;
    // Query heads that share a key head.
    u32 group, first_kv_head;
    u32 head_dim;
    attention::Scoring scoring;
};

namespace attention {

// How a head of at most D dimensions lies in shared memory and registers.
template <u32 D> struct Tile {
    static_assert(D % 16 == 0, "a step of a product takes 16 dimensions");
    // 16 bytes more than a row: the pitch is an odd multiple of 16 bytes, so that eight rows lie in different banks.
    static const u32 PITCH = 2 * D + 16;
    static const u32 BYTES = KEYS * PITCH;
    // Queries stay in registers where there is room for them, and lend their place in shared memory to the values.
    static const bool KEEP_QUERIES = D <= 128;
    static const u32 SHARED = (KEEP_QUERIES ? 2 : 3) * BYTES;
};

// A warp's 16 queries. This thread has rows lane / 4 and lane / 4 + 8 of them.
template <u32 D> struct Queries {
    u32 operands[Tile<D>::KEEP_QUERIES ? D / 16 : 1][4];
    // Sums over values, [8 dimensions][row, dimension]: of both rows dimensions 2 * (lane % 4) and the next.
    float sums[D / 8][4];
    Running running;
    // Position of the first row.
    u32 position;
};

// Address of this lane's row of four 8x8 matrices that make 16 rows by 16 columns: the left two are the first and the
// second half of the rows.
template <u32 D> DEV u32 rows_first(u32 tile, u32 row, u32 column) {
    return tile + (row + lane() % 16) * Tile<D>::PITCH + (column + lane() / 16 * 8) * 2;
}
// The same where the first two are the first and the second half of the columns.
template <u32 D> DEV u32 columns_first(u32 tile, u32 row, u32 column) {
    return tile + (row + lane() % 8 + lane() / 16 * 8) * Tile<D>::PITCH + (column + lane() / 8 % 2 * 8) * 2;
}

// Begins to copy a tile of a window's keys or values, zeros beyond its last. Neighbouring threads take the runs of 16
// bytes of a row as far as powers of two go, so that a thread's places are constants apart.
template <u32 D> DEV void copy_tile(u32 to, const u16* window, u32 tile, u32 length) {
    const u32 RUNS = D / 8, ACROSS = RUNS & (~RUNS + 1), DOWN = THREADS / ACROSS;
    u32 row = thread() / ACROSS, run = thread() % ACROSS;
    u32 key = tile * KEYS + row;
    const u16* from = window + (u64)key * D + run * 8;
    to += row * Tile<D>::PITCH + run * 16;
    UNROLL
    for (u32 i = 0; i < KEYS / DOWN; i++)
        UNROLL
        for (u32 j = 0; j < RUNS / ACROSS; j++)
            copy_async16(to + i * DOWN * Tile<D>::PITCH + j * ACROSS * 16, from + i * DOWN * D + j * ACROSS * 8,
                         key + i * DOWN < length);
}

// Writes the block's queries to shared memory as bf16, zeros for those that are not there.
template <u32 D> DEV void stage_queries(u8* to, const AttendBf16Args& args, const Item& item) {
    const u32 RUNS = D / 8;
    for (u32 i = thread(); i < QUERIES * RUNS; i += THREADS) {
        u32 row = i / RUNS, run = i % RUNS;
        u32 query = item.first + row;
        Quad packed{0, 0, 0, 0};
        if (is_there(item, query)) {
            const float* from = args.queries + (row_of(item, query) * args.heads + block_y()) * args.head_dim;
            packed = load_bf16(from, run * 8, args.head_dim);
        }
        store16(to + row * Tile<D>::PITCH + run * 16, packed);
    }
}

// Products of the warp's queries with the keys of a tile: [8 keys][row, key].
template <u32 D> DEV void score(float (&scores)[KEYS / 8][4], const Queries<D>& queries, u32 staged, u32 keys) {
    UNROLL
    for (u32 i = 0; i < KEYS / 8; i++)
        UNROLL
        for (u32 e = 0; e < 4; e++) scores[i][e] = 0.0f;
    UNROLL
    for (u32 k = 0; k < D / 16; k++) {
        u32 left[4];
        if constexpr (Tile<D>::KEEP_QUERIES) {
            UNROLL
            for (u32 i = 0; i < 4; i++) left[i] = queries.operands[k][i];
        } else {
            load_matrices(left, rows_first<D>(staged, 16 * warp(), 16 * k));
        }
        UNROLL
        for (u32 n = 0; n < KEYS / 16; n++) {
            u32 right[4];
            load_matrices(right, columns_first<D>(keys, 16 * n, 16 * k));
            mma_bf16(scores[2 * n], left, right[0], right[1]);
            mma_bf16(scores[2 * n + 1], left, right[2], right[3]);
        }
    }
}

// Adds the products of a tile's exponentials, rounded, with its values.
template <u32 D> DEV void mix(Queries<D>& queries, const float (&scores)[KEYS / 8][4], u32 values) {
    UNROLL
    for (u32 k = 0; k < KEYS / 16; k++) {
        u32 left[4];
        as_operand(left, scores, k);
        UNROLL
        for (u32 n = 0; n < D / 16; n++) {
            u32 right[4];
            load_matrices_transposed(right, rows_first<D>(values, 16 * k, 16 * n));
            mma_bf16(queries.sums[2 * n], left, right[0], right[1]);
            mma_bf16(queries.sums[2 * n + 1], left, right[2], right[3]);
        }
    }
}

// Divides by the denominator and writes the rows that there are.
template <u32 D> DEV void finish(Queries<D>& queries, const AttendBf16Args& args, const Item& item) {
    UNROLL
    for (u32 row = 0; row < 2; row++) {
        divide(queries.sums, row, args.head_dim, denominator(queries.running, row));
        u32 query = queries.position + lane() / 4 + 8 * row;
        if (!is_there(item, query)) continue;
        float* to = args.output + (row_of(item, query) * args.heads + block_y()) * args.head_dim;
        UNROLL
        for (u32 d = 0; d < D / 8; d++)
            UNROLL
            for (u32 e = 0; e < 2; e++) {
                u32 column = 8 * d + 2 * (lane() % 4) + e;
                if (column < args.head_dim) to[column] = queries.sums[d][2 * row + e];
            }
    }
}

// No sums yet.
template <u32 D> DEV void begin(Queries<D>& queries, const AttendBf16Args& args, const Item& item) {
    queries.position = item.first + 16 * warp();
    UNROLL
    for (u32 d = 0; d < D / 8; d++)
        UNROLL
        for (u32 e = 0; e < 4; e++) queries.sums[d][e] = 0.0f;
    begin_softmax(queries.running, args.sinks ? args.sinks + block_y() : nullptr);
}

// One block. Grid: (item, head from first_head on).
template <u32 D> DEV void attend_block(const AttendBf16Args& args) {
    Item item = args.items[block_x()];
    u32 head = args.first_head + block_y();
    u64 window = ((head / args.group - args.first_kv_head) * args.rows + item.start) * D;
    const u16* keys = args.keys + window;
    const u16* values = args.values + window;
    u32 key_tile = shared_address(shared()), value_tile = key_tile + Tile<D>::BYTES;
    u32 query_tile = key_tile + Tile<D>::SHARED - Tile<D>::BYTES;
    Tiles tiles = tiles_seen(item.first, least(item.first + QUERIES, item.length) - 1, args.scoring.window);

    copy_tile<D>(key_tile, keys, tiles.begin, item.length);
    copy_commit();
    stage_queries<D>(shared() + (query_tile - key_tile), args, item);
    sync_block();
    Queries<D> queries;
    begin(queries, args, item);
    if constexpr (Tile<D>::KEEP_QUERIES) {
        UNROLL
        for (u32 k = 0; k < D / 16; k++)
            load_matrices(queries.operands[k], rows_first<D>(query_tile, 16 * warp(), 16 * k));
        sync_block();
    }
    for (u32 tile = tiles.begin; tile < tiles.end; tile++) {
        copy_tile<D>(value_tile, values, tile, item.length);
        copy_commit();
        copy_wait<1>();
        sync_block();
        float scores[KEYS / 8][4];
        score(scores, queries, query_tile, key_tile);
        sync_block();
        if (tile + 1 < tiles.end) copy_tile<D>(key_tile, keys, tile + 1, item.length);
        copy_commit();
        restrict_scores(scores, tile, queries.position, args.scoring);
        rescale(queries.sums, exponentials(scores, queries.running));
        copy_wait<1>();
        sync_block();
        mix(queries, scores, value_tile);
        sync_block();
    }
    finish(queries, args, item);
}

}  // namespace attention

// Heads of at most so many dimensions.
KERNEL(attend_bf16_32, AttendBf16Args, attention::THREADS, attention::Tile<32>::SHARED) {
    attention::attend_block<32>(args);
}
KERNEL(attend_bf16_64, AttendBf16Args, attention::THREADS, attention::Tile<64>::SHARED) {
    attention::attend_block<64>(args);
}
KERNEL(attend_bf16_80, AttendBf16Args, attention::THREADS, attention::Tile<80>::SHARED) {
    attention::attend_block<80>(args);
}
KERNEL(attend_bf16_96, AttendBf16Args, attention::THREADS, attention::Tile<96>::SHARED) {
    attention::attend_block<96>(args);
}
KERNEL(attend_bf16_128, AttendBf16Args, attention::THREADS, attention::Tile<128>::SHARED) {
    attention::attend_block<128>(args);
}
KERNEL(attend_bf16_192, AttendBf16Args, attention::THREADS, attention::Tile<192>::SHARED) {
    attention::attend_block<192>(args);
}
KERNEL(attend_bf16_256, AttendBf16Args, attention::THREADS, attention::Tile<256>::SHARED) {
    attention::attend_block<256>(args);
}
