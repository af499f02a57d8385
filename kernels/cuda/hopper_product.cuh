// `w * x^T` on warpgroups: 128 rows of packed weights by 256 tokens a tile, blocks that stay for many tiles. A producer
// warp brings activations, codes and scales into stages of 64 k; two warpgroups of 64 rows each decode the weights of the
// next stage in registers while the tensor cores multiply those of this one. Knows what a tile's sums are; not what
// becomes of them.
//
// Each output is one chain over k in steps of 16, from the first to the last: it depends on its row and its token
// alone. Tiles have one width, however few the tokens are, so that a batch cannot choose another instruction.
#pragma once
#include "hopper.cuh"
#include "operands.cuh"

#define HOPPER_TOKENS 256
#define HOPPER_CONSUMERS 2
#define HOPPER_THREADS (WARPGROUP * (1 + HOPPER_CONSUMERS))
#define HOPPER_SUMS (HOPPER_TOKENS / 2)
// Blocks of tokens whose tiles run side by side: their activations and one wave's weights are what the L2 has to hold.
#define HOPPER_BAND 4

// What is multiplied; `ProductArgs` in linear/hopper.rs.
struct HopperProduct {
    TensorMap x;        // bf16 [tokens, k_tiles * 64], zero beyond k
    Matrix matrix[2];   // of each consumer: the same matrix, or two of one shape
    u32 tokens;
    u32 token_blocks;
    u32 row_blocks;
    u32 row_tiles_apart;  // row tiles of one matrix in a block: 2, or 1 where each consumer has a matrix of its own
    u32 blocks;           // that this launch has
    u32 padding[15];
};
static_assert(sizeof(HopperProduct) == 384, "as ProductArgs in linear/hopper.rs");

#if HOPPER

// How codes become operands, and what a stage holds of them.
template <u32 CODE_, u32 ARITHMETIC_> struct Format {
    static constexpr u32 CODE = CODE_, ARITHMETIC = ARITHMETIC_, BITS = CodeBits<CODE_>::value;
    static constexpr u32 SCALE_BYTES = ScaleBytes<ARITHMETIC_>::value;
    static constexpr bool ZEROS = CODE == CODE_INT4 || CODE == CODE_INT8;
    // Scales of 64 rows change at most four times.
    static constexpr u32 CODES_ROOM = 512 * BITS, SCALES_ROOM = 4 * MATRIX_TILE * SCALE_BYTES;
    static constexpr u32 ZEROS_ROOM = ZEROS ? 4 * MATRIX_TILE : 0;
    static constexpr u32 TABLE_ROOM = ARITHMETIC == BY_TABLE ? MAGNITUDES_BYTES : 0;
};

// Shared memory: stages, tables, what tiles are staged in afterwards, barriers.
template <class F, u32 STAGES_, u32 STAGED> struct Room {
    static constexpr u32 STAGES = STAGES_;
    static constexpr u32 CODES = HOPPER_TOKENS * 128, SCALES = CODES + HOPPER_CONSUMERS * F::CODES_ROOM;
    static constexpr u32 ZEROS = SCALES + HOPPER_CONSUMERS * F::SCALES_ROOM;
    static constexpr u32 STAGE = (ZEROS + HOPPER_CONSUMERS * F::ZEROS_ROOM + 1023) / 1024 * 1024;
    static constexpr u32 TABLES = STAGES * STAGE, TILE = TABLES + HOPPER_CONSUMERS * F::TABLE_ROOM;
    static constexpr u32 FULL = TILE + STAGED, EMPTY = FULL + 8 * STAGES, BYTES = EMPTY + 8 * STAGES;
};

// A stage, and the parity of its phase.
struct Turn { u32 stage, parity; };
template <class R> DEV void take_turn(Turn& turn) {
    turn.stage++;
    if (turn.stage == R::STAGES) turn.stage = 0, turn.parity ^= 1;
}
template <class R> DEV u8* stage_place(Turn turn) { return shared() + turn.stage * R::STAGE; }
template <class R> DEV u32 full(Turn turn) { return shared_address(shared()) + R::FULL + 8 * turn.stage; }
template <class R> DEV u32 empty(Turn turn) { return shared_address(shared()) + R::EMPTY + 8 * turn.stage; }

// Tile `index` of all, in an order in which neighbours share what they read.
struct TilePlace { u32 row_block, token_block; };
DEV TilePlace tile_place(const HopperProduct& p, u32 index) {
    u32 band = index / (HOPPER_BAND * p.row_blocks), within = index % (HOPPER_BAND * p.row_blocks);
    u32 width = least(p.token_blocks - band * HOPPER_BAND, (u32)HOPPER_BAND);
    return TilePlace{within / width, band * HOPPER_BAND + within % width};
}
DEV u32 tile_count(const HopperProduct& p) { return p.row_blocks * p.token_blocks; }

// Row tile of a consumer. The last block may have one row tile only; the second consumer then repeats it, and nobody
// stores that.
DEV u32 consumer_row_tile(const HopperProduct& p, u32 row_block, u32 consumer) {
    u32 row_tile = row_block * p.row_tiles_apart + (p.row_tiles_apart == 2 ? consumer : 0);
    return least(row_tile, p.matrix[consumer].row_tiles - 1);
}

// Groups begin at multiples of 64 k, or divide 64: the launcher sees to that. Asked of the first matrix, whose scheme is
// that of the second: the compiler sees that all threads go the same way.
DEV u32 groups_of_stage(const Matrix& m) { return m.group < MATRIX_TILE ? MATRIX_TILE / m.group : 1; }
DEV u32 first_group(const Matrix& m, u32 k_tile) {
    return m.group < MATRIX_TILE ? k_tile * (MATRIX_TILE / m.group) : k_tile / (m.group / MATRIX_TILE);
}
// Slices that share a scale, as a power of two.
DEV u32 slice_shift(const Matrix& m) { return m.group >= MATRIX_TILE ? 2 : m.group / 32; }

// Copies of one kind of scales: as many groups as a stage has, the last of all again where k has ended.
DEV void copy_groups(u32 to, const u8* from, u32 row_tile, const Matrix& m, u32 k_tile, u32 bytes, u32 barrier) {
    const u8* row = from + (u64)row_tile * m.groups * bytes;
    u32 count = groups_of_stage(m), first = first_group(m, k_tile);
    if (first + count <= m.groups) {
        copy_bulk(to, row + (u64)first * bytes, count * bytes, barrier);
        return;
    }
    for (u32 i = 0; i < count; i++)
        copy_bulk(to + i * bytes, row + (u64)least(first + i, m.groups - 1) * bytes, bytes, barrier);
}

// One thread: all stages of all tiles of this block.
template <class F, class R> DEV void produce(const HopperProduct& p) {
    const Matrix& shape = p.matrix[0];
    constexpr u32 SCALE_RUN = MATRIX_TILE * F::SCALE_BYTES;
    bool zeros = F::ZEROS && shape.zeros;
    u32 bytes = HOPPER_TOKENS * 128 + HOPPER_CONSUMERS * F::CODES_ROOM;
    bytes += HOPPER_CONSUMERS * groups_of_stage(shape) * (SCALE_RUN + (zeros ? MATRIX_TILE : 0));
    Turn turn = {0, 0};
    for (u32 tile = block_x(); tile < tile_count(p); tile += p.blocks) {
        TilePlace place = tile_place(p, tile);
        for (u32 k_tile = 0; k_tile < shape.k_tiles; k_tile++) {
            u32 to = shared_address(stage_place<R>(turn)), arrived = full<R>(turn);
            barrier_wait(empty<R>(turn), turn.parity ^ 1);
            barrier_expect(arrived, bytes);
            copy_tensor(to, p.x, k_tile * MATRIX_TILE, place.token_block * HOPPER_TOKENS, arrived);
            UNROLL
            for (u32 consumer = 0; consumer < HOPPER_CONSUMERS; consumer++) {
                const Matrix& m = p.matrix[consumer];
                u32 row_tile = consumer_row_tile(p, place.row_block, consumer);
                const u8* codes = m.codes + ((u64)row_tile * m.k_tiles + k_tile) * F::CODES_ROOM;
                copy_bulk(to + R::CODES + consumer * F::CODES_ROOM, codes, F::CODES_ROOM, arrived);
                if (F::SCALE_BYTES > 0)
                    copy_groups(to + R::SCALES + consumer * F::SCALES_ROOM, m.scales, row_tile, shape, k_tile, SCALE_RUN, arrived);
                if (zeros)
                    copy_groups(to + R::ZEROS + consumer * F::ZEROS_ROOM, (const u8*)m.zeros, row_tile, shape, k_tile,
                                MATRIX_TILE, arrived);
            }
            take_turn<R>(turn);
        }
    }
}

// What a lane of a consumer decodes: two rows of an atom of its row tile.
struct Rows { u32 consumer, atom, row[2]; };

// Operand A of a stage.
template <class F, class R>
DEV void decode_stage(const HopperProduct& p, const u8* stage, const Rows& rows, u32 (&a)[4][4]) {
    constexpr u32 QUADS = F::BITS / 4;
    const Matrix& shape = p.matrix[0];
    const u8* codes = stage + R::CODES + rows.consumer * F::CODES_ROOM + rows.atom * QUADS * 512 + lane() * 16;
    const u8* scales = stage + R::SCALES + rows.consumer * F::SCALES_ROOM;
    const i8* zeros = (const i8*)(stage + R::ZEROS + rows.consumer * F::ZEROS_ROOM);
    const u8* table = shared() + R::TABLES + rows.consumer * F::TABLE_ROOM;
    u32 shift = slice_shift(shape), words[F::BITS];
    UNROLL
    for (u32 j = 0; j < QUADS; j++) {
        Entry entry = *(const Entry*)(codes + j * 512);
        UNROLL
        for (u32 i = 0; i < 4; i++) words[4 * j + i] = entry.words[i];
    }
    Scaling<F::CODE, F::ARITHMETIC> scaling[2];
    UNROLL
    for (u32 s = 0; s < 4; s++) {
        u32 group = s >> shift;
        // The table's scales change with every slice, or every second: asking would not pay.
        if (F::ARITHMETIC == BY_TABLE || (F::SCALE_BYTES > 0 && group << shift == s)) {
            UNROLL
            for (u32 high = 0; high < 2; high++) {
                u32 at = group * MATRIX_TILE + rows.row[high];
                float zero = F::ZEROS && shape.zeros ? (float)zeros[at] : 0.0f;
                prepare<F::CODE>(shape, table, scale_of<F::SCALE_BYTES>(scales, at), zero, scaling[high]);
            }
        }
        operand<F::CODE>(shape, words, s, scaling, a[s]);
    }
}

// Begins the product of a stage.
DEV void multiply_stage(float (&sums)[HOPPER_SUMS], const u32 (&a)[4][4], u32 x) {
    u64 tokens = matrix_rows(x);
    wgmma_fence();
    // 16 k are 32 bytes, two units of a descriptor.
    UNROLL
    for (u32 s = 0; s < 4; s++) wgmma_bf16<HOPPER_TOKENS>(sums, a[s], tokens + 2 * s);
    wgmma_commit();
}

// A stage's product begins; the one before it ends, and its stage is free. Each warp says so: it has read its own codes.
template <class R> DEV void step(float (&sums)[HOPPER_SUMS], const u32 (&a)[4][4], Turn turn, u32& before) {
    multiply_stage(sums, a, shared_address(stage_place<R>(turn)));
    wgmma_wait<1>();
    if (before && lane() == 0) barrier_arrive(before);
    before = empty<R>(turn);
}

// A whole tile of a consumer: sums[4 j + 2 h + e] is row 16 * atom + lane / 4 + 8 h, token 8 j + 2 (lane % 4) + e.
template <class F, class R>
DEV void consume_tile(const HopperProduct& p, const Rows& rows, Turn& turn, float (&sums)[HOPPER_SUMS]) {
    u32 a[4][4], b[4][4];
    UNROLL
    for (u32 i = 0; i < HOPPER_SUMS; i++) sums[i] = 0.0f;
    barrier_wait(full<R>(turn), turn.parity);
    decode_stage<F, R>(p, stage_place<R>(turn), rows, a);
    u32 before = 0, k_tile = 0;
    while (true) {
        step<R>(sums, a, turn, before);
        take_turn<R>(turn);
        if (++k_tile == p.matrix[0].k_tiles) break;
        barrier_wait(full<R>(turn), turn.parity);
        decode_stage<F, R>(p, stage_place<R>(turn), rows, b);
        step<R>(sums, b, turn, before);
        take_turn<R>(turn);
        if (++k_tile == p.matrix[0].k_tiles) break;
        barrier_wait(full<R>(turn), turn.parity);
        decode_stage<F, R>(p, stage_place<R>(turn), rows, a);
    }
    wgmma_wait<0>();
    wgmma_sums(sums);
    if (lane() == 0) barrier_arrive(before);
}

// Puts part `part` of a tile's tokens into shared memory, a token's rows of this consumer side by side.
template <u32 TOKENS, u32 STRIDE>
DEV void stage_tile(const float (&sums)[HOPPER_SUMS], u32 part, float* staged, const Rows& rows) {
    UNROLL
    for (u32 j = 0; j < TOKENS / 8; j++) {
        UNROLL
        for (u32 i = 0; i < 4; i++) {
            u32 token = 8 * j + 2 * (lane() % 4) + (i & 1);
            staged[token * STRIDE + rows.row[i >> 1]] = sums[(part * (TOKENS / 8) + j) * 4 + i];
        }
    }
}

// Barriers and tables; all threads of the block.
template <class F, class R> DEV void begin_product(const HopperProduct& p) {
    if (thread() == 0) {
        Turn turn = {0, 0};
        for (u32 i = 0; i < R::STAGES; i++) {
            barrier_init(full<R>(turn), 1);
            barrier_init(empty<R>(turn), HOPPER_CONSUMERS * WARPGROUP / WARP);
            take_turn<R>(turn);
        }
        barrier_init_done();
    }
    if (F::ARITHMETIC == BY_TABLE)
        for (u32 i = thread(); i < HOPPER_CONSUMERS * 256; i += HOPPER_THREADS)
            fill_magnitudes(p.matrix[i / 256], shared() + R::TABLES + i / 256 * F::TABLE_ROOM, i % 256);
    sync_block();
}

// The consumer's matrix and rows.
DEV Rows consumer_rows() {
    Rows rows;
    // The same in all lanes, and seen to be.
    rows.consumer = shuffle(warp() / 4 - 1, 0);
    rows.atom = warp() % 4;
    UNROLL
    for (u32 high = 0; high < 2; high++) rows.row[high] = rows.atom * ATOM + lane() / 4 + 8 * high;
    return rows;
}

#endif
