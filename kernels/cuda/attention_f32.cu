// Causal attention of f32 operands over whole rows of scores, bit for bit that of the CPU backend
// (kernels/src/cpu/attend/whole.rs): every sum is a chain in the order that is written there.
//
// A block takes as many queries as a block of the CPU backend, because zeros for keys that only others of those queries
// see are part of a chain there. Rows of scores lie in device memory, a place for each block, so that any length works;
// blocks go over the work in turns.
#include "attention.cuh"

struct AttendF32Args {
    // f32 [rows of queries, heads * head_dim], from first_head on.
    const float* queries;
    // f32 [rows, kv_heads * head_dim].
    const float* keys;
    const float* values;
    // f32 [rows of queries, heads * head_dim], from first_head on.
    float* output;
    const attention::Item* items;
    // f32 [blocks][24][pitch].
    float* scores;
    u64 pitch;
    // Items times heads, and the blocks that share them.
    u64 work, blocks;
    // Query heads that are computed, all key heads, and the first of those query heads.
    u32 heads, kv_heads, first_head;
    // Query heads that share a key head.
    u32 group;
    u32 head_dim;
    // Positions seen.
    u32 window;
    // 1 / sqrt(head_dim).
    float scale;
};

namespace attention {
namespace exact {

const u32 QUERIES = 24;
const u32 THREADS = 192;
// Queries of one thread, all with the same key or dimension.
const u32 EACH = 8;
// Dimensions that are staged together.
const u32 RUN = 64;
// Floats from one dimension or key to the next where queries are innermost, and from one key to the next.
const u32 PITCH = QUERIES + 4;
const u32 KEY_PITCH = RUN + 1;

struct Shared {
    alignas(16) float columns[RUN * PITCH];
    float keys[KEYS * KEY_PITCH];
    float reciprocals[QUERIES];
};

struct alignas(16) Four {
    float at[4];
};

// One head of a window: all rows of queries and of output, keys and values from the window's first row on.
struct Head {
    const float* queries;
    float* output;
    const float* keys;
    const float* values;
    u32 query_stride, key_stride;
    // Scores of the block's queries, from key `start` on.
    float* scores;
    u32 start, end;
};

// sums[i] = fused(column[i], factor, sums[i]) for a thread's queries.
DEV void step(float (&sums)[EACH], const float* column, float factor) {
    UNROLL
    for (u32 half = 0; half < EACH / 4; half++) {
        Four four = ((const Four*)column)[half];
        UNROLL
        for (u32 i = 0; i < 4; i++) sums[4 * half + i] = fused(four.at[i], factor, sums[4 * half + i]);
    }
}

// Scores of one tile of keys: chains that ascend over the head's dimensions, then scaled. Waits for the block before it
// writes to shared memory.
DEV void score(Shared& staged, const Head& head, const AttendF32Args& args, const Item& item, u32 tile) {
    u32 key = thread() % KEYS, dim = thread() % RUN, first = thread() / KEYS * EACH;
    float sums[EACH] = {0};
    for (u32 run = 0; run < args.head_dim; run += RUN) {
        u32 dims = least(RUN, args.head_dim - run);
        sync_block();
        bool inside = dim < dims;
        for (u32 row = thread() / RUN; row < KEYS; row += THREADS / RUN) {
            bool there = inside && tile * KEYS + row < item.length;
            const float* from = head.keys + (u64)(tile * KEYS + row) * head.key_stride + run;
            staged.keys[row * KEY_PITCH + dim] = there ? from[dim] : 0.0f;
        }
        ROLL
        for (u32 row = thread() / RUN; row < QUERIES; row += THREADS / RUN) {
            bool there = inside && is_there(item, item.first + row);
            const float* from = head.queries + (there ? row_of(item, item.first + row) : 0) * head.query_stride + run;
            staged.columns[dim * PITCH + row] = there ? from[dim] : 0.0f;
        }
        sync_block();
        // Zeros beyond the last dimension change no bit but the sign of a zero, which no exponential shows.
        for (u32 d = 0; d < dims; d += 4)
            UNROLL
            for (u32 i = d; i < d + 4; i++)
                step(sums, staged.columns + i * PITCH + first, staged.keys[key * KEY_PITCH + i]);
    }
    UNROLL
    for (u32 i = 0; i < EACH; i++)
        head.scores[(first + i) * args.pitch + (tile * KEYS - head.start) + key] = sums[i] * args.scale;
}

// Turns a row of scores into exponentials, 0 where the query does not see the key, and returns the reciprocal of their
// sum. For one warp: the sum is sixteen chains by position, each kept by two lanes, folded in halves.
DEV float exponentials(float* row, const Head& head, u32 query, u32 window, u32 tiles_end) {
    u32 from = first_seen(query, window);
    float largest = -float_of(0x7f800000);
    for (u32 key = head.start + lane(); key <= query; key += WARP)
        if (key >= from) largest = most(largest, row[key - head.start]);
    UNROLL
    for (u32 mask = 16; mask > 0; mask /= 2) largest = most(largest, shuffle_xor(largest, mask));
    float chain = 0.0f;
    for (u32 base = head.start; base < tiles_end; base += WARP) {
        u32 key = base + lane();
        bool seen = key >= from && key <= query;
        // An unseen key adds 0 to a sum that is not negative: no bit changes.
        float value = seen ? exp_rounded(row[key - head.start] - largest) : 0.0f;
        row[key - head.start] = value;
        float other = shuffle_xor(value, 16);
        chain += lane() < 16 ? value : other;
        chain += lane() < 16 ? other : value;
    }
    UNROLL
    for (u32 mask = 8; mask > 0; mask /= 2) chain += shuffle_xor(chain, mask);
    return 1.0f / chain;
}

// Writes the probabilities of a tile to shared memory, [key][query].
DEV void stage_probabilities(Shared& staged, const Head& head, u32 tile, u64 pitch) {
    u32 key = thread() % KEYS;
    const float* from = head.scores + (tile * KEYS - head.start) + key;
    ROLL
    for (u32 query = thread() / KEYS; query < QUERIES; query += THREADS / KEYS)
        staged.columns[key * PITCH + query] = from[query * pitch] * staged.reciprocals[query];
}

// Keys of one chain of a sum over values: kernels/src/cpu/row_tiles.rs.
DEV u32 block_length(u32 keys) {
    const u32 LONGEST = 192;
    return keys > LONGEST && keys <= 2 * LONGEST ? (keys + 1) / 2 : least(LONGEST, most(keys, 1u));
}

// Sums over values for the dimensions `run..run + RUN`: chains that start again with each block of keys.
DEV void mix(Shared& staged, const Head& head, const AttendF32Args& args, const Item& item, u32 run) {
    u32 column = run + thread() % RUN, first = thread() / RUN * EACH;
    bool there = column < args.head_dim;
    u32 length = block_length(item.length);
    float sums[EACH] = {0}, outputs[EACH] = {0};
    u32 key = head.start, next = least(head.end, (key / length + 1) * length);
    for (u32 tile = head.start / KEYS; tile * KEYS < head.end; tile++) {
        sync_block();
        stage_probabilities(staged, head, tile, args.pitch);
        sync_block();
        u32 stop = least(head.end, (tile + 1) * KEYS);
        for (; key < stop; key++) {
            float value = there ? head.values[(u64)key * head.key_stride + column] : 0.0f;
            step(sums, staged.columns + key % KEYS * PITCH + first, value);
            if (key + 1 < next) continue;
            next = least(head.end, next + length);
            UNROLL
            for (u32 i = 0; i < EACH; i++) {
                outputs[i] += sums[i];
                sums[i] = 0.0f;
            }
        }
    }
    UNROLL
    for (u32 i = 0; i < EACH; i++) {
        u32 query = item.first + first + i;
        if (there && is_there(item, query)) head.output[row_of(item, query) * head.query_stride + column] = outputs[i];
    }
}

// One item for one head, counted from first_head on.
DEV void attend(Shared& staged, const AttendF32Args& args, const Item& item, u32 head_index) {
    u32 last = least(item.first + QUERIES, item.length) - 1;
    Tiles tiles = tiles_seen(item.first, last, args.window);
    Head head;
    head.query_stride = args.heads * args.head_dim;
    head.key_stride = args.kv_heads * args.head_dim;
    head.queries = args.queries + (u64)head_index * args.head_dim;
    head.output = args.output + (u64)head_index * args.head_dim;
    u32 group = (args.first_head + head_index) / args.group;
    u64 key_head = (u64)item.start * head.key_stride + (u64)group * args.head_dim;
    head.keys = args.keys + key_head;
    head.values = args.values + key_head;
    head.scores = args.scores + block_x() * QUERIES * args.pitch;
    head.start = tiles.begin * KEYS;
    head.end = least(item.length, tiles.end * KEYS);

    for (u32 tile = tiles.begin; tile < tiles.end; tile++) score(staged, head, args, item, tile);
    sync_block();
    for (u32 i = warp(); i < QUERIES; i += THREADS / WARP) {
        u32 query = item.first + i;
        if (!is_there(item, query)) continue;
        float* row = head.scores + i * args.pitch;
        float reciprocal = exponentials(row, head, query, args.window, tiles.end * KEYS);
        if (lane() == 0) staged.reciprocals[i] = reciprocal;
    }
    for (u32 run = 0; run < args.head_dim; run += RUN) mix(staged, head, args, item, run);
}

}  // namespace exact
}  // namespace attention

// Grid: blocks.
KERNEL(attend_f32, AttendF32Args, attention::exact::THREADS, sizeof(attention::exact::Shared)) {
    attention::exact::Shared& staged = *(attention::exact::Shared*)shared();
    for (u64 work = block_x(); work < args.work; work += args.blocks) {
        attention::Item item = args.items[work / args.heads];
        attention::exact::attend(staged, args, item, (u32)(work % args.heads));
    }
}
