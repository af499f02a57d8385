// Products of codes on tensor cores, scales applied to the sums of a segment: kernels/src/cpu/exact.rs. Integers are
// exact in 32 bits, so that the outputs have the bits of the CPU backend; products of fp8 are exact in f16 operands and
// summed in f32, 16 k at a time.
//
// A block makes 128 rows by 128 tokens, a warp 32 by 64. Codes of weights go from the tiles to registers, those of
// activations through shared memory. Each output is one chain of steps over k: it depends on its row and its token
// alone. Segments are whole steps, or all of k.
#include "code_sums.cuh"

#define CODES_THREADS 256
#define CODES_ROWS 128
#define CODES_TOKENS 128
#define CODES_STAGES 4
// A warp: two atoms of rows, eight tiles of 8 tokens.
#define WARP_ATOMS 2
#define WARP_TILES 8
#define WARP_TOKENS 64
// Half of the outputs, a token's rows side by side, after the stages.
#define OUTPUT_STRIDE (CODES_ROWS + 5)
#define OUTPUT_BYTES (WARP_TOKENS * OUTPUT_STRIDE * 4)

// Bytes that a tile of 64 k takes of one token, and of a stage.
template <u32 ARITHMETIC> struct CodesStage {
    static constexpr u32 ROW = MATRIX_TILE * CodesKind<ARITHMETIC>::BYTES, BYTES = CODES_TOKENS * ROW;
    static constexpr u32 SHARED = CODES_STAGES * BYTES > OUTPUT_BYTES ? CODES_STAGES * BYTES : OUTPUT_BYTES;
};

// Where 16 bytes of a token's row lie in a stage: eight tokens' chunks of one column are on banks of their own.
template <u32 ARITHMETIC> DEV u32 chunk_place(u32 token, u32 chunk) {
    u32 turned = CodesStage<ARITHMETIC>::ROW == 128 ? chunk ^ token % 8 : chunk ^ token / 2 % 4;
    return token * CodesStage<ARITHMETIC>::ROW + turned * 16;
}

// What a thread copies of every tile of 64 k of 128 tokens.
template <u32 ARITHMETIC> struct CodesCopier {
    static constexpr u32 CHUNKS = CodesStage<ARITHMETIC>::ROW / 16, TOKENS = CODES_THREADS / CHUNKS;
    static constexpr u32 COPIES = CODES_TOKENS / TOKENS;
    const u8* from[COPIES];
    bool there[COPIES];
    u32 to;
};

template <u32 ARITHMETIC> DEV CodesCopier<ARITHMETIC> codes_copier(const CodesArgs& args, u32 first_token) {
    typedef CodesCopier<ARITHMETIC> Own;
    u32 own = thread() / Own::CHUNKS, chunk = thread() % Own::CHUNKS;
    Own made;
    UNROLL
    for (u32 i = 0; i < Own::COPIES; i++) {
        u32 token = first_token + own + i * Own::TOKENS;
        made.there[i] = token < args.m;
        u64 row = (u64)least(token, args.m - 1) * args.matrix.k_tiles * CodesStage<ARITHMETIC>::ROW;
        made.from[i] = args.x + row + chunk * 16;
    }
    made.to = shared_address(shared()) + chunk_place<ARITHMETIC>(own, chunk);
    return made;
}

// Begins to copy a tile; tokens beyond `m` are zero.
template <u32 ARITHMETIC> DEV void copy_codes(const CodesCopier<ARITHMETIC>& copier, u32 k_tile, u32 k_tiles) {
    typedef CodesCopier<ARITHMETIC> Own;
    if (k_tile < k_tiles) {
        u32 to = copier.to + k_tile % CODES_STAGES * CodesStage<ARITHMETIC>::BYTES;
        UNROLL
        for (u32 i = 0; i < Own::COPIES; i++)
            copy_async16(to + i * Own::TOKENS * CodesStage<ARITHMETIC>::ROW, copier.from[i] + (u64)k_tile * CodesStage<ARITHMETIC>::ROW,
                         copier.there[i]);
    }
    copy_commit();
}

// A lane's codes of two atoms of one tile; `codes`: those of its first word.
template <u32 CODE> DEV void load_atoms(const u8* codes, u32 (&words)[WARP_ATOMS][CodeBits<CODE>::value]) {
    UNROLL
    for (u32 i = 0; i < WARP_ATOMS * CodeBits<CODE>::value / 4; i++) {
        Quad quad = load16(codes + i * WARP * 16);
        u32* to = &words[0][0] + 4 * i;
        to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
    }
}

// Rows of a lane: row a is 16 (a / 2) + 8 (a % 2) behind its first.
#define LANE_ROWS (2 * WARP_ATOMS)
DEV u32 lane_row(u32 first, u32 a) { return first + a / 2 * ATOM + a % 2 * 8; }

template <u32 ARITHMETIC> struct CodesTile {
    // Of the segment under way: [atom][tile of tokens][row of the atom (high bit) and token].
    typename CodesKind<ARITHMETIC>::Sum sums[WARP_ATOMS][WARP_TILES][4];
    // Sums of the codes of each row, where they are wanted.
    i32 columns[WARP_ATOMS][4];
    float out[WARP_ATOMS][WARP_TILES][4];
    // Of the segment under way, where weights are decoded to floats.
    float zeros[ARITHMETIC == HALVES ? LANE_ROWS : 1];
    // Of each row in the segment under way, loaded before it is needed.
    u32 scales[LANE_ROWS];
    u32 row;
};

// Sets out on the segment that begins at `start`.
template <u32 ARITHMETIC> DEV void begin_segment(const Matrix& m, CodesTile<ARITHMETIC>& tile, u32 start) {
    UNROLL
    for (u32 a = 0; a < WARP_ATOMS; a++) {
        UNROLL
        for (u32 i = 0; i < 4; i++) {
            tile.columns[a][i] = 0;
            UNROLL
            for (u32 j = 0; j < WARP_TILES; j++) tile.sums[a][j][i] = 0;
        }
    }
    u32 group = start / m.group;
    UNROLL
    for (u32 a = 0; a < LANE_ROWS; a++) {
        ScalePlace place = scale_place(m, lane_row(tile.row, a));
        tile.scales[a] = stored_scale(m, place.base + (u64)group * place.step);
        if constexpr (ARITHMETIC == HALVES) tile.zeros[a] = zero_at(m, place, group);
    }
}

template <u32 ARITHMETIC> DEV float& output(CodesTile<ARITHMETIC>& tile, u32 a, u32 j) {
    return tile.out[a / 2][j / 2][a % 2 * 2 + j % 2];
}

// Adds sums times the scales of both sides to the outputs: of tokens that have factors of their own in this segment.
template <u32 ARITHMETIC>
DEV void fold_tokens(const CodesArgs& args, CodesTile<ARITHMETIC>& tile, const SegmentPlace& place,
                     const float (&scales)[LANE_ROWS], u32 token) {
    const Matrix& m = args.matrix;
    float zeros[LANE_ROWS];
    UNROLL
    for (u32 a = 0; a < LANE_ROWS; a++) {
        bool known = ARITHMETIC == SHIFTED_INTEGERS && m.zeros;
        zeros[a] = known ? zero_at(m, scale_place(m, lane_row(tile.row, a)), place.start / m.group) : 0.0f;
    }
    UNROLL
    for (u32 j = 0; j < 2 * WARP_TILES; j++) {
        // Factors of all tokens at once would be more than there are registers for.
        if (ARITHMETIC == SHIFTED_INTEGERS) sync_warp();
        TokenFactors factors = token_factors<ARITHMETIC == SHIFTED_INTEGERS>(args, place, token + j / 2 * 8 + lane() % 4 * 2 + j % 2);
        UNROLL
        for (u32 a = 0; a < LANE_ROWS; a++) {
            auto sum = tile.sums[a / 2][j / 2][a % 2 * 2 + j % 2];
            float value = (float)sum;
            if constexpr (ARITHMETIC == SHIFTED_INTEGERS)
                value = shift_back(sum, factors, tile.columns[a / 2][a % 2 * 2], (i32)zeros[a], place.length);
            output(tile, a, j) = output(tile, a, j) + value * (scales[a] * factors.scale);
        }
    }
}

// The same where tokens have none.
template <u32 ARITHMETIC> DEV void fold_plain(CodesTile<ARITHMETIC>& tile, const float (&scales)[LANE_ROWS]) {
    UNROLL
    for (u32 j = 0; j < 2 * WARP_TILES; j++) {
        UNROLL
        for (u32 a = 0; a < LANE_ROWS; a++)
            output(tile, a, j) = output(tile, a, j) + (float)tile.sums[a / 2][j / 2][a % 2 * 2 + j % 2] * scales[a];
    }
}

// Adds the segment that begins at `start` to the outputs of the warp's tokens from `token` on.
template <u32 ARITHMETIC, u32 CODE>
DEV void close_segment(const CodesArgs& args, CodesTile<ARITHMETIC>& tile, u32 start, u32 token) {
    float scales[LANE_ROWS];
    UNROLL
    for (u32 a = 0; a < LANE_ROWS; a++) {
        scales[a] = undivided_scale(args.matrix, tile.scales[a]);
        // Fp8 weights came as 2^-8 of themselves.
        if (CODE == CODE_E4M3) scales[a] = scales[a] * 256.0f;
    }
    if (ARITHMETIC == SHIFTED_INTEGERS || args.segment < args.matrix.k) {
        SegmentPlace place = segment_place(args, start);
        fold_tokens<ARITHMETIC>(args, tile, place, scales, token);
    } else {
        fold_plain<ARITHMETIC>(tile, scales);
    }
}

// One step of a tile of 64 k. `place`: where the lane's row of operand B begins in the stage.
template <u32 ARITHMETIC, u32 CODE>
DEV void multiply_step(const Matrix& m, CodesTile<ARITHMETIC>& tile, const u32 (&words)[WARP_ATOMS][CodeBits<CODE>::value],
                       u32 k_tile, u32 s, u32 place) {
    u32 a[WARP_ATOMS][4];
    UNROLL
    for (u32 i = 0; i < WARP_ATOMS; i++) {
        if constexpr (ARITHMETIC == HALVES) {
            float zero[2] = {tile.zeros[2 * i], tile.zeros[2 * i + 1]};
            half_operand<CODE>(m, words[i], s, zero, a[i]);
        } else {
            integer_operand<CODE>(words[i], s, (u32)(m.code_offset - 8388608.0f), a[i]);
        }
    }
    UNROLL
    for (u32 pair = 0; pair < WARP_TILES / 2; pair++) {
        u32 b[4];
        load_matrices(b, (place ^ 32 * s) + pair * 16 * CodesStage<ARITHMETIC>::ROW);
        UNROLL
        for (u32 i = 0; i < WARP_ATOMS; i++) {
            if constexpr (ARITHMETIC == HALVES) {
                mma_f16(tile.sums[i][2 * pair], a[i], b[0], b[1]);
                mma_f16(tile.sums[i][2 * pair + 1], a[i], b[2], b[3]);
            } else {
                mma_s8(tile.sums[i][2 * pair], a[i], b[0], b[1]);
                mma_s8(tile.sums[i][2 * pair + 1], a[i], b[2], b[3]);
            }
        }
    }
    if constexpr (ARITHMETIC == SHIFTED_INTEGERS) {
        u32 first = k_tile * MATRIX_TILE + 32 * s;
        UNROLL
        for (u32 i = 0; i < WARP_ATOMS; i++) mma_s8(tile.columns[i], a[i], ones(first, m.k), ones(first + 16, m.k));
    }
}

// All of k, into tile.out.
template <u32 ARITHMETIC, u32 CODE>
DEV void multiply_codes(const CodesArgs& args, CodesTile<ARITHMETIC>& tile, u32 first_token) {
    const Matrix& m = args.matrix;
    constexpr u32 STEPS = MATRIX_TILE / CodesKind<ARITHMETIC>::STEP, TILE_BYTES = 512 * CodeBits<CODE>::value;
    // The last block may have one row tile only; the second half then repeats it, and nobody stores that.
    u32 row_tile = least(block_x() * 2 + warp() % 4 / 2, m.row_tiles - 1), atom = warp() % 2 * WARP_ATOMS;
    u32 warp_token = warp() / 4 * WARP_TOKENS;
    bool busy = first_token + warp_token < args.m;
    tile.row = row_tile * MATRIX_TILE + atom * ATOM + lane() / 4;
    UNROLL
    for (u32 i = 0; i < LANE_ROWS * 2 * WARP_TILES; i++) output(tile, i % LANE_ROWS, i / LANE_ROWS) = 0.0f;
    u32 start = 0, steps = args.step < m.k ? args.step / CodesKind<ARITHMETIC>::STEP : ~0u, left = steps;
    begin_segment<ARITHMETIC>(m, tile, start);
    const u8* codes = m.codes + (u64)row_tile * m.k_tiles * TILE_BYTES + atom * TILE_BYTES / 4 + lane() * 16;
    u32 ahead[WARP_ATOMS][CodeBits<CODE>::value];
    load_atoms<CODE>(codes, ahead);
    CodesCopier<ARITHMETIC> copies = codes_copier<ARITHMETIC>(args, first_token);
    UNROLL
    for (u32 k_tile = 0; k_tile + 1 < CODES_STAGES; k_tile++) copy_codes<ARITHMETIC>(copies, k_tile, m.k_tiles);
    // The first chunk of a step is even, so that it is turned by exclusive or.
    u32 place = chunk_place<ARITHMETIC>(warp_token + lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
    for (u32 k_tile = 0; k_tile < m.k_tiles; k_tile++) {
        u32 words[WARP_ATOMS][CodeBits<CODE>::value];
        UNROLL
        for (u32 i = 0; i < WARP_ATOMS * CodeBits<CODE>::value; i++) (&words[0][0])[i] = (&ahead[0][0])[i];
        if (k_tile + 1 < m.k_tiles) load_atoms<CODE>(codes += TILE_BYTES, ahead);
        copy_wait<CODES_STAGES - 2>();
        sync_block();
        // Into the stage of the tile before this one, which everybody has left.
        copy_codes<ARITHMETIC>(copies, k_tile + CODES_STAGES - 1, m.k_tiles);
        if (!busy) continue;
        u32 stage = shared_address(shared()) + k_tile % CODES_STAGES * CodesStage<ARITHMETIC>::BYTES;
        UNROLL
        for (u32 s = 0; s < STEPS; s++) {
            multiply_step<ARITHMETIC, CODE>(m, tile, words, k_tile, s, stage + place);
            if (--left > 0) continue;
            left = steps;
            // Steps behind the last k are no segment.
            if (start < m.k) close_segment<ARITHMETIC, CODE>(args, tile, start, first_token + warp_token);
            start += args.step;
            if (start < m.k) begin_segment<ARITHMETIC>(m, tile, start);
        }
    }
    if (busy && start < m.k) close_segment<ARITHMETIC, CODE>(args, tile, start, first_token + warp_token);
}

// Tokens `64 half..` of the block, through shared memory: rows of y are written in runs.
template <u32 ARITHMETIC>
DEV void store_codes(const CodesArgs& args, CodesTile<ARITHMETIC>& tile, u32 first_token, u32 half) {
    const Matrix& m = args.matrix;
    float* staged = (float*)shared();
    sync_block();
    if (warp() / 4 == half) {
        UNROLL
        for (u32 j = 0; j < 2 * WARP_TILES; j++) {
            u32 token = j / 2 * 8 + lane() % 4 * 2 + j % 2;
            // A scale that does not change along k is applied once, at the end.
            u32 known = least(first_token + half * WARP_TOKENS + token, args.m - 1);
            float scale = args.segment >= m.k ? args.scales[known] : 1.0f;
            UNROLL
            for (u32 a = 0; a < LANE_ROWS; a++) {
                u32 row = lane_row(warp() % 4 * 32 + lane() / 4, a);
                staged[token * OUTPUT_STRIDE + row] = args.segment >= m.k ? output(tile, a, j) * scale : output(tile, a, j);
            }
        }
    }
    sync_block();
    u32 row = thread() % CODES_ROWS, held = block_x() * CODES_ROWS + row;
    bool wanted = held >= m.first && held - m.first < m.n;
    for (u32 i = thread() / CODES_ROWS; i < WARP_TOKENS; i += CODES_THREADS / CODES_ROWS) {
        u32 token = first_token + half * WARP_TOKENS + i;
        if (wanted && token < args.m)
            args.y[(u64)token * args.y_stride + (held - m.first)] = staged[i * OUTPUT_STRIDE + row];
    }
}

template <u32 ARITHMETIC, u32 CODE> DEV void linear_codes(const CodesArgs& args) {
    u32 first_token = block_y() * CODES_TOKENS;
    CodesTile<ARITHMETIC> tile;
    multiply_codes<ARITHMETIC, CODE>(args, tile, first_token);
    store_codes<ARITHMETIC>(args, tile, first_token, 0);
    store_codes<ARITHMETIC>(args, tile, first_token, 1);
}

#define CODES_KERNEL(name, ARITHMETIC, CODE)                                                                           \
    KERNEL(codes_##name, CodesArgs, CODES_THREADS, CodesStage<ARITHMETIC>::SHARED) { linear_codes<ARITHMETIC, CODE>(args); }

CODES_KERNEL(int4, INTEGERS, CODE_INT4)
CODES_KERNEL(int8, INTEGERS, CODE_INT8)
CODES_KERNEL(int4_shifted, SHIFTED_INTEGERS, CODE_INT4)
CODES_KERNEL(int8_shifted, SHIFTED_INTEGERS, CODE_INT8)
CODES_KERNEL(half_int4, HALVES, CODE_INT4)
CODES_KERNEL(half_int8, HALVES, CODE_INT8)
CODES_KERNEL(half_e4m3, HALVES, CODE_E4M3)

#define WIDEN_THREADS 256

struct WidenArgs {
    const u8* x;  // codes of fp8 numbers by code_slot(): `words` times 16
    u16* out;     // the numbers as f16, k ascending
    u64 words;
};

// For products that have no use for bytes; a thread 16 codes.
KERNEL(widen_e4m3, WidenArgs, WIDEN_THREADS, 0) {
    u64 index = (u64)block_x() * WIDEN_THREADS + thread();
    if (index >= args.words) return;
    Quad quad = load16(args.x + index * 16);
    u32 words[4] = {quad.x, quad.y, quad.z, quad.w}, pairs[8];
    UNROLL
    for (u32 i = 0; i < 8; i++) {
        u32 low = code_slot(2 * i), high = code_slot(2 * i + 1);
        pairs[i] = pack_f16(e4m3_to_f32(words[low / 4] >> (8 * (low % 4)) & 255), e4m3_to_f32(words[high / 4] >> (8 * (high % 4)) & 255));
    }
    store16(args.out + index * 16, Quad{pairs[0], pairs[1], pairs[2], pairs[3]});
    store16(args.out + index * 16 + 8, Quad{pairs[4], pairs[5], pairs[6], pairs[7]});
}

#define SUM_THREADS 256

struct CodeSumArgs {
    const u8* x;   // bytes [m, row_bytes]
    i32* sums;     // [m, segments]
    u32 m;
    u32 row_bytes; // zero beyond the last k
    u32 step;
    u32 segments;
};

// Sums of the integers of each segment, a warp each: whole chunks of 16, or all of a row.
KERNEL(sum_codes, CodeSumArgs, SUM_THREADS, 0) {
    u64 index = (u64)block_x() * (SUM_THREADS / WARP) + warp();
    if (index >= (u64)args.m * args.segments) return;
    u64 token = index / args.segments;
    u32 start = (u32)(index - token * args.segments) * args.step, end = least(start + args.step, args.row_bytes);
    u32 sum = 0;
    for (u32 at = start + lane() * 16; at < end; at += WARP * 16) {
        Quad quad = load16(args.x + token * args.row_bytes + at);
        u32 words[4] = {quad.x, quad.y, quad.z, quad.w};
        UNROLL
        for (u32 i = 0; i < 16; i++) sum += (u32)(i32)(i8)(words[i / 4] >> (8 * (i % 4)));
    }
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane() == 0) args.sums[index] = (i32)sum;
}
