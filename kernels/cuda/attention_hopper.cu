// Causal attention of bf16 operands on Hopper's warpgroups: the sums and tiles of attention_bf16.cu, so its bits where a
// product of 16 k sums alike.
//
// A block stays for many pieces of work, each 128 queries of one head of one window. One thread has the copy engine
// bring tiles of 64 keys and values into two rings. Two warpgroups take 64 queries each and use the tiles at their own
// pace: while the tensor cores are at a warpgroup's next scores and its sums over values, it computes exponentials.
// Windows begin at multiples of a tile in memory, zeros behind their last row, so that nothing else is ever in a tile.
#include "attention_softmax.cuh"
#include "hopper.cuh"

#if HOPPER

struct AttendWindowsArgs {
    // f32 [rows, heads * head_dim], of keys and of values.
    const float* keys;
    const float* values;
    // bf16 [heads from first_head on][tiles * KEYS][padded_dim].
    u16* packed_keys;
    u16* packed_values;
    // Of each tile its first row, and how many there are.
    const u32* tiles;
    u32 tile_count;
    u32 heads, first_head, head_dim, padded_dim;
    u32 padding;
};

// Threads of attend_windows, each of which writes 16 bytes at a time.
#define ATTEND_WINDOWS_THREADS 256

// Rounds heads to bf16, one after the other, each window from a multiple of a tile on and with zeros to its last tile's
// end. Grid: (tile, head, keys or values).
KERNEL(attend_windows, AttendWindowsArgs, ATTEND_WINDOWS_THREADS, 0) {
    u32 runs = args.padded_dim / 8, head = block_y();
    u32 first = args.tiles[2 * block_x()], there = args.tiles[2 * block_x() + 1];
    const float* from = (block_z() == 0 ? args.keys : args.values) + (args.first_head + head) * args.head_dim;
    u16* to = (block_z() == 0 ? args.packed_keys : args.packed_values) +
              ((u64)head * args.tile_count + block_x()) * attention::KEYS * args.padded_dim;
    UNROLL
    for (u32 i = thread(); i < attention::KEYS * runs; i += ATTEND_WINDOWS_THREADS) {
        u32 row = i / runs, column = i % runs * 8;
        Quad packed{0, 0, 0, 0};
        if (row < there && column < args.head_dim) {
            const float* run = from + (u64)(first + row) * args.heads * args.head_dim + column;
            Quad low = load16(run), high = load16(run + 4);
            packed = Quad{pack_bf16(float_of(low.x), float_of(low.y)), pack_bf16(float_of(low.z), float_of(low.w)),
                          pack_bf16(float_of(high.x), float_of(high.y)), pack_bf16(float_of(high.z), float_of(high.w))};
        }
        store16(to + i * 8, packed);
    }
}

struct AttendHopperArgs {
    // bf16 [heads from first_kv_head on][padded_rows] by dimensions, boxes of KEYS rows.
    TensorMap keys, values;
    // f32 [rows of queries, heads * head_dim], from first_head on.
    const float* queries;
    float* output;
    // `start` is a row of keys and values.
    const attention::Item* items;
    // One logit a head from first_head on that takes part in the softmax without a value; null for none.
    const float* sinks;
    // Rows of keys of one head.
    u32 padded_rows;
    // Pieces of work: each item for each head. And blocks that share them.
    u32 work, blocks;
    // Query heads that are computed, and the first of them.
    u32 heads, first_head;
    // Query heads that share a key head.
    u32 group, first_kv_head;
    u32 head_dim;
    attention::Scoring scoring;
    u32 padding[13];
};

namespace attention {

// Warpgroups that compute; one more has tiles brought and lends them its registers.
const u32 GROUPS = 2;
const u32 QUERIES_OF_GROUP = 64;
const u32 ATTEND_HOPPER_THREADS = (GROUPS + 1) * WARPGROUP;
// Tiles that a ring holds.
const u32 STAGES = 4;

// Two rings in shared memory, each a place for tiles and two barriers for each: that the tile is there, and that all
// warps are done with it. A head has at most D dimensions.
template <u32 D> struct Rings {
    static const u32 BOX_BYTES = KEYS * 128;
    static const u32 BOXES = (D + 63) / 64;
    static const u32 TILE_BYTES = BOXES * BOX_BYTES;
    static const u32 BARRIERS = 2 * STAGES * TILE_BYTES;
    static const u32 SHARED = BARRIERS + 2 * STAGES * 16;
};
enum class Ring : u32 { Keys = 0, Values = 1 };

template <u32 D> DEV u32 tile_at(Ring ring, u32 stage) {
    return shared_address(shared()) + ((u32)ring * STAGES + stage) * Rings<D>::TILE_BYTES;
}
template <u32 D> DEV u32 barrier_there(Ring ring, u32 stage) {
    return shared_address(shared()) + Rings<D>::BARRIERS + ((u32)ring * STAGES + stage) * 16;
}
template <u32 D> DEV u32 barrier_free(Ring ring, u32 stage) { return barrier_there<D>(ring, stage) + 8; }

// How far a ring has been gone through.
struct Place {
    u32 stage, parity;
};
DEV void step(Place& place) {
    place.stage++;
    if (place.stage < STAGES) return;
    place.stage = 0;
    place.parity ^= 1;
}

// One head of one item.
struct Piece {
    Item item;
    // From first_head on.
    u32 head;
};

// Piece of this block's turn, if it has one; else an empty one. Pieces are sorted by size; every other turn is in
// reverse, which evens out blocks.
DEV bool piece_of(const AttendHopperArgs& args, u32 turn, Piece& piece) {
    u32 index = turn * args.blocks + (turn % 2 == 0 ? block_x() : args.blocks - 1 - block_x());
    bool more = index < args.work;
    piece = more ? Piece{args.items[index / args.heads], index % args.heads} : Piece{Item{0, 0, 0, 0, 0, 0}, 0};
    return more;
}

// Tiles that a warpgroup's queries see: none where none of them is there.
DEV Tiles tiles_of_group(const Item& item, u32 group, u32 window) {
    u32 first = item.first + group * QUERIES_OF_GROUP, last = first + QUERIES_OF_GROUP - 1;
    if (last < item.begin || first >= item.end) return Tiles{0, 0};
    return tiles_seen(first, least(last, item.length - 1), window);
}
// Tiles that any warpgroup sees.
DEV Tiles tiles_of_item(const Item& item, u32 window) {
    Tiles all = tiles_of_group(item, 0, window);
    UNROLL
    for (u32 group = 1; group < GROUPS; group++) {
        Tiles more = tiles_of_group(item, group, window);
        bool none = all.begin == all.end;
        if (more.begin == more.end) continue;
        all = Tiles{none ? more.begin : all.begin, more.end};
    }
    return all;
}

// Has one tile brought to a ring's next place, once that is free.
template <u32 D> DEV void bring(Ring ring, const TensorMap& map, u32 row, Place place) {
    barrier_wait(barrier_free<D>(ring, place.stage), place.parity ^ 1);
    u32 there = barrier_there<D>(ring, place.stage);
    barrier_expect(there, Rings<D>::TILE_BYTES);
    UNROLL
    for (u32 box = 0; box < Rings<D>::BOXES; box++)
        copy_tensor(tile_at<D>(ring, place.stage) + box * Rings<D>::BOX_BYTES, map, 64 * box, row, there);
}

// All that the copying thread does.
template <u32 D> DEV void bring_tiles(const AttendHopperArgs& args) {
    Place place{0, 0};
    Piece piece;
    ROLL
    for (u32 turn = 0; piece_of(args, turn, piece); turn++) {
        u32 kv_head = (args.first_head + piece.head) / args.group - args.first_kv_head;
        u32 row = kv_head * args.padded_rows + piece.item.start;
        Tiles tiles = tiles_of_item(piece.item, args.scoring.window);
        ROLL
        for (u32 tile = tiles.begin; tile < tiles.end; tile++) {
            bring<D>(Ring::Keys, args.keys, row + tile * KEYS, place);
            bring<D>(Ring::Values, args.values, row + tile * KEYS, place);
            step(place);
        }
    }
}

template <u32 D> DEV void await_tile(Ring ring, Place place) {
    barrier_wait(barrier_there<D>(ring, place.stage), place.parity);
}
// This warp is done with a tile. All its lanes must know that it was there: a ring may by then go around.
template <u32 D> DEV void release_tile(Ring ring, Place place) {
    if (lane() == 0) barrier_arrive(barrier_free<D>(ring, place.stage));
}
// Goes past tiles that only other warpgroups see.
template <u32 D> DEV void pass_tiles(Place& place, u32 count) {
    ROLL
    for (u32 i = 0; i < count; i++) {
        await_tile<D>(Ring::Keys, place);
        await_tile<D>(Ring::Values, place);
        sync_warp();
        release_tile<D>(Ring::Keys, place);
        release_tile<D>(Ring::Values, place);
        step(place);
    }
}

// What a warp has of its 16 queries: the left operand, and sums over values by [8 dimensions][row, dimension], of whole
// boxes.
template <u32 D> struct Rows {
    static const u32 COLUMNS = 64 * Rings<D>::BOXES;
    u32 operands[D / 16][4];
    float sums[COLUMNS / 8][4];
    Running running;
    // Position of the first.
    u32 position;
};

// Queries as they are read: [8 dimensions][row, dimension].
template <u32 D> struct Loaded {
    Pair pairs[D / 8][2];
};

// Reads a warp's queries, zeros for those that are not there.
template <u32 D> DEV void load_queries(Loaded<D>& loaded, const AttendHopperArgs& args, const Piece& piece) {
    UNROLL
    for (u32 row = 0; row < 2; row++) {
        u32 query = piece.item.first + 16 * warp() + lane() / 4 + 8 * row;
        bool there = is_there(piece.item, query);
        const float* from = args.queries;
        if (there) from += (row_of(piece.item, query) * args.heads + piece.head) * args.head_dim;
        UNROLL
        for (u32 d = 0; d < D / 8; d++) {
            loaded.pairs[d][row] = Pair{0.0f, 0.0f};
            if (there && 8 * d < args.head_dim) loaded.pairs[d][row] = load8(from + 8 * d + 2 * (lane() % 4));
        }
    }
}

template <u32 D>
DEV void begin_rows(Rows<D>& rows, const Loaded<D>& loaded, const AttendHopperArgs& args, const Piece& piece) {
    rows.position = piece.item.first + 16 * warp();
    UNROLL
    for (u32 d = 0; d < D / 8; d++)
        UNROLL
        for (u32 row = 0; row < 2; row++) {
            Pair pair = loaded.pairs[d][row];
            rows.operands[d / 2][row + 2 * (d % 2)] = pack_bf16(pair.x, pair.y);
        }
    begin_softmax(rows.running, args.sinks ? args.sinks + piece.head : nullptr);
    UNROLL
    for (u32 d = 0; d < Rows<D>::COLUMNS / 8; d++)
        UNROLL
        for (u32 e = 0; e < 4; e++) rows.sums[d][e] = 0.0f;
}

// Begins the products of the queries with a tile of keys.
template <u32 D> DEV void begin_scores(float (&scores)[KEYS / 8][4], const Rows<D>& rows, u32 keys) {
    UNROLL
    for (u32 i = 0; i < KEYS / 8; i++)
        UNROLL
        for (u32 e = 0; e < 4; e++) scores[i][e] = 0.0f;
    u64 right = matrix_rows(keys);
    wgmma_fence();
    UNROLL
    for (u32 k = 0; k < D / 16; k++)
        wgmma_bf16<KEYS>((float(&)[KEYS / 2])scores, rows.operands[k],
                         matrix_after(right, k / 4 * Rings<D>::BOX_BYTES + k % 4 * 32));
    wgmma_commit();
}

// Begins the products of a tile's exponentials with its values.
template <u32 D> DEV void begin_mix(Rows<D>& rows, const u32 (&weights)[KEYS / 16][4], u32 values) {
    const u32 N = Rows<D>::COLUMNS;
    u64 right = matrix_columns(values, Rings<D>::BOX_BYTES);
    wgmma_fence();
    UNROLL
    for (u32 k = 0; k < KEYS / 16; k++)
        wgmma_bf16_columns<N>((float(&)[N / 2])rows.sums, weights[k], matrix_after(right, k * 2048));
    wgmma_commit();
}

// Divides by the denominator and writes the rows that there are.
template <u32 D> DEV void write_rows(Rows<D>& rows, const AttendHopperArgs& args, const Piece& piece) {
    UNROLL
    for (u32 row = 0; row < 2; row++) {
        divide(rows.sums, row, args.head_dim, denominator(rows.running, row));
        u32 query = rows.position + lane() / 4 + 8 * row;
        if (!is_there(piece.item, query)) continue;
        float* to = args.output + (row_of(piece.item, query) * args.heads + piece.head) * args.head_dim;
        UNROLL
        for (u32 d = 0; d < D / 8; d++)
            if (8 * d < args.head_dim)
                store8(to + 8 * d + 2 * (lane() % 4), Pair{rows.sums[d][2 * row], rows.sums[d][2 * row + 1]});
    }
}

// What a warpgroup does with the tiles that its queries see. Scores of a tile are begun before the sums over values of
// the one before it, so that both are under way while exponentials are computed.
template <u32 D> DEV void mix_tiles(Rows<D>& rows, const AttendHopperArgs& args, Tiles tiles, Place& place) {
    float scores[KEYS / 8][4];
    u32 weights[KEYS / 16][4];
    Place keys = place;
    await_tile<D>(Ring::Keys, keys);
    begin_scores(scores, rows, tile_at<D>(Ring::Keys, keys.stage));
    wgmma_wait<0>();
    wgmma_sums((float(&)[KEYS / 2])scores);
    release_tile<D>(Ring::Keys, keys);
    ROLL
    for (u32 tile = tiles.begin;; tile++) {
        restrict_scores(scores, tile, rows.position, args.scoring);
        Shrink shrink = exponentials(scores, rows.running);
        // All of them before the wait.
        wgmma_sums((float(&)[KEYS / 2])scores);
        wgmma_wait<0>();
        wgmma_sums((float(&)[Rows<D>::COLUMNS / 2])rows.sums);
        if (tile > tiles.begin) {
            release_tile<D>(Ring::Values, place);
            step(place);
        }
        rescale(rows.sums, shrink);
        UNROLL
        for (u32 k = 0; k < KEYS / 16; k++) as_operand(weights[k], scores, k);
        if (tile + 1 == tiles.end) break;
        step(keys);
        await_tile<D>(Ring::Keys, keys);
        begin_scores(scores, rows, tile_at<D>(Ring::Keys, keys.stage));
        await_tile<D>(Ring::Values, place);
        begin_mix(rows, weights, tile_at<D>(Ring::Values, place.stage));
        wgmma_wait<1>();
        wgmma_sums((float(&)[KEYS / 2])scores);
        release_tile<D>(Ring::Keys, keys);
    }
    await_tile<D>(Ring::Values, place);
    begin_mix(rows, weights, tile_at<D>(Ring::Values, place.stage));
    wgmma_wait<0>();
    wgmma_sums((float(&)[Rows<D>::COLUMNS / 2])rows.sums);
    release_tile<D>(Ring::Values, place);
    step(place);
}

// All that a warpgroup does which computes. A piece's queries are read before results of the one before it are written.
template <u32 D> DEV void attend_pieces(const AttendHopperArgs& args, u32 group) {
    Place place{0, 0};
    Piece piece;
    Loaded<D> loaded;
    bool more = piece_of(args, 0, piece);
    load_queries(loaded, args, piece);
    ROLL
    for (u32 turn = 1; more; turn++) {
        Tiles all = tiles_of_item(piece.item, args.scoring.window);
        Tiles mine = tiles_of_group(piece.item, group, args.scoring.window);
        Rows<D> rows;
        begin_rows(rows, loaded, args, piece);
        if (mine.begin == mine.end) {
            pass_tiles<D>(place, all.end - all.begin);
        } else {
            pass_tiles<D>(place, mine.begin - all.begin);
            mix_tiles(rows, args, mine, place);
            pass_tiles<D>(place, all.end - mine.end);
        }
        Piece done = piece;
        more = piece_of(args, turn, piece);
        load_queries(loaded, args, piece);
        write_rows(rows, args, done);
    }
}

// One block. Grid: (block).
template <u32 D> DEV void attend_hopper(const AttendHopperArgs& args) {
    if (thread() == 0) {
        for (u32 stage = 0; stage < STAGES; stage++)
            for (u32 ring = 0; ring < 2; ring++) {
                barrier_init(barrier_there<D>((Ring)ring, stage), 1);
                barrier_init(barrier_free<D>((Ring)ring, stage), GROUPS * WARPGROUP / WARP);
            }
        barrier_init_done();
    }
    sync_block();
    u32 group = thread() / WARPGROUP;
    if (group < GROUPS) {
        registers_more<240>();
        attend_pieces<D>(args, group);
    } else {
        registers_less<24>();
        if (thread() == GROUPS * WARPGROUP) bring_tiles<D>(args);
    }
}

}  // namespace attention

// Heads of at most so many dimensions.
KERNEL_HOPPER(attend_hopper_64, AttendHopperArgs, attention::ATTEND_HOPPER_THREADS, attention::Rings<64>::SHARED) {
    attention::attend_hopper<64>(args);
}
KERNEL_HOPPER(attend_hopper_96, AttendHopperArgs, attention::ATTEND_HOPPER_THREADS, attention::Rings<96>::SHARED) {
    attention::attend_hopper<96>(args);
}
KERNEL_HOPPER(attend_hopper_128, AttendHopperArgs, attention::ATTEND_HOPPER_THREADS, attention::Rings<128>::SHARED) {
    attention::attend_hopper<128>(args);
}

#endif
