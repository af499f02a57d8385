// Products of codes by Hopper's warpgroups. Integers have the bits of linear_codes.cu: sums are exact in 32 bits and meet
// the scales of both sides in the same order. Fp8 by fp8 is exact in f16 operands, summed in f32, 16 k at a time; or, where that is asked for, fast: on
// tensor cores for fp8, whose sums are those of a stage, 128 k, and meet f32 with the weights' scales. Codes of weights
// go from the tiles to registers; those of activations come by the copy engine, 128 bytes of all tokens of a block at a
// time.
//
// One warpgroup copies, two multiply: 64 rows each, by 256 tokens where all of k is one sum; by 128 where sums are those of
// whole stages, so that outputs have registers beside the sums. Blocks stay: each makes tile after tile, and the copies run ahead over the
// end of one.
#include "code_sums.cuh"
#include "hopper.cuh"

#define CODES_HOPPER_THREADS 384
#define CODES_HOPPER_ROWS 128
// A stage is 128 bytes of each token: four steps.
#define STAGE_BYTES_OF_TOKEN 128
#define STAGE_STEPS 4
// Row blocks whose tiles come one after another, so that blocks that run together share weights and activations.
#define ROW_BLOCKS_TOGETHER 16

struct CodesHopperArgs {
    TensorMap x;      // codes [m, k_tiles * 64], boxes of 128 bytes of all tokens of a block
    CodesArgs codes;
    u32 row_blocks;
    u32 token_blocks;
    u32 blocks;       // that are launched
};
static_assert(sizeof(CodesHopperArgs) == 320, "as CodesHopperArgs in linear/codes.rs");

#if HOPPER

// Shared memory of a kernel with TOKENS tokens: stages, then a barrier for each that is full and for each that is empty;
// where there are segments, two times scales of all tokens for each warpgroup that multiplies.
template <u32 TOKENS> struct CodesRoom {
    static constexpr u32 BYTES = TOKENS * STAGE_BYTES_OF_TOKEN, STAGES = TOKENS == 256 ? 6 : 8;
    static constexpr u32 FULL = STAGES * BYTES, EMPTY = FULL + 8 * STAGES, SCALES = EMPTY + 8 * STAGES;
    static constexpr u32 OF_SEGMENT = TOKENS == 128 ? 4 * TOKENS : 0, ALL = SCALES + 4 * OF_SEGMENT;
};

// A place in the ring of stages.
template <u32 TOKENS> struct CodesRing {
    u32 stage = 0, round = 0;
    // In which of two places scales of tokens are shown next: by turns over the end of a tile too.
    u32 turn = 0;
};
template <u32 TOKENS> DEV void advance(CodesRing<TOKENS>& ring) {
    if (++ring.stage == CodesRoom<TOKENS>::STAGES) ring.stage = 0, ring.round ^= 1;
}
template <u32 TOKENS> DEV u32 codes_full(u32 stage) { return shared_address(shared()) + CodesRoom<TOKENS>::FULL + 8 * stage; }
template <u32 TOKENS> DEV u32 codes_empty(u32 stage) { return shared_address(shared()) + CodesRoom<TOKENS>::EMPTY + 8 * stage; }

struct BlockPlace {
    u32 row_block, token_block;
};

// Panels of row blocks; inside, rows before tokens.
DEV BlockPlace block_place(const CodesHopperArgs& args, u32 index) {
    u32 panel = index / (ROW_BLOCKS_TOGETHER * args.token_blocks);
    u32 first = panel * ROW_BLOCKS_TOGETHER, width = least((u32)ROW_BLOCKS_TOGETHER, args.row_blocks - first);
    u32 inside = index - first * args.token_blocks;
    return BlockPlace{first + inside % width, inside / width};
}

// k of a stage, tiles of weights in it, and stages of all of k.
template <u32 ARITHMETIC> struct StageK {
    static constexpr u32 K = STAGE_STEPS * CodesKind<ARITHMETIC>::STEP, TILES = K / MATRIX_TILE;
};
template <u32 ARITHMETIC> DEV u32 stages_of(const Matrix& m) {
    return (m.k_tiles + StageK<ARITHMETIC>::TILES - 1) / StageK<ARITHMETIC>::TILES;
}

// One thread copies activations for all tiles of the block.
template <u32 ARITHMETIC, u32 TOKENS> DEV void copy_activations(const CodesHopperArgs& args) {
    CodesRing<TOKENS> ring;
    for (u32 index = block_x(); index < args.row_blocks * args.token_blocks; index += args.blocks) {
        u32 first_token = block_place(args, index).token_block * TOKENS;
        for (u32 i = 0; i < stages_of<ARITHMETIC>(args.codes.matrix); i++) {
            u32 full = codes_full<TOKENS>(ring.stage);
            barrier_wait(codes_empty<TOKENS>(ring.stage), ring.round ^ 1);
            barrier_expect(full, CodesRoom<TOKENS>::BYTES);
            copy_tensor(shared_address(shared()) + ring.stage * CodesRoom<TOKENS>::BYTES, args.x,
                        i * StageK<ARITHMETIC>::K, first_token, full);
            advance(ring);
        }
    }
}

// What a thread has of a tile: rows lane / 4 and 8 more of its warp's atom, of every 8 tokens two.
template <u32 ARITHMETIC, u32 TOKENS> struct CodesSums {
    typename CodesKind<ARITHMETIC>::Sum sums[TOKENS / 2];
    // Sums of the codes of both rows, where they are wanted.
    i32 columns[4];
    // Where there are several segments.
    float out[TOKENS == 128 ? TOKENS / 2 : 1];
    // Of both rows in the segment under way: as they are stored, then as f32.
    u32 scales[2];
    ScalePlace places[2];
    u32 row;
    // Where tokens have scales of their own in a segment: that of one token, then where those of all lie.
    float token_scale;
    const float* token_scales;
};

template <u32 ARITHMETIC, u32 TOKENS> DEV void clear_sums(CodesSums<ARITHMETIC, TOKENS>& sums) {
    UNROLL
    for (u32 i = 0; i < TOKENS / 2; i++) sums.sums[i] = 0;
    UNROLL
    for (u32 i = 0; i < 4; i++) sums.columns[i] = 0;
}

// Of the segment that begins at `start`.
template <u32 ARITHMETIC, u32 TOKENS>
DEV void load_scales(const Matrix& m, CodesSums<ARITHMETIC, TOKENS>& sums, u32 start) {
    u32 group = start / m.group;
    UNROLL
    for (u32 h = 0; h < 2; h++)
        sums.scales[h] = stored_scale(m, sums.places[h].base + (u64)group * sums.places[h].step);
}

// Where segments have scales of tokens, thread t of the warpgroup asks for that of token t in the segment from `start`.
DEV bool own_scales(const CodesArgs& args) { return args.segment < args.matrix.k; }
template <u32 ARITHMETIC>
DEV void load_token_scale(const CodesArgs& args, CodesSums<ARITHMETIC, 128>& sums, u32 start, u32 first_token) {
    if (!own_scales(args)) return;
    // Nobody stores what tokens beyond the last get.
    u32 token = least(first_token + thread() % 128, args.m - 1);
    sums.token_scale = args.scales[(u64)token * (args.matrix.k / args.segment) + start / args.segment];
}

// And shows it to the others: those of segments lie in two places by turns, so that nobody still reads the place that is
// written, as all have met since.
template <u32 ARITHMETIC>
DEV void show_token_scale(const CodesArgs& args, CodesSums<ARITHMETIC, 128>& sums, u32 turn) {
    if (!own_scales(args)) return;
    u32 group = warp() / 4 - 1;
    float* all = (float*)(shared() + CodesRoom<128>::SCALES + (2 * group + turn) * CodesRoom<128>::OF_SEGMENT);
    all[thread() % 128] = sums.token_scale;
    sync_named(1 + group, 128);
    sums.token_scales = all;
}

// Once a segment, long after they were asked for.
template <u32 ARITHMETIC, u32 TOKENS> DEV void decode_scales(const Matrix& m, CodesSums<ARITHMETIC, TOKENS>& sums) {
    UNROLL
    for (u32 h = 0; h < 2; h++) {
        float scale = undivided_scale(m, sums.scales[h]);
        // Fp8 weights came as 2^-8 of themselves.
        if (ARITHMETIC == HALVES) scale = scale * 256.0f;
        sums.scales[h] = bits_of(scale);
    }
}

// Gives sums of the segment that begins at `start`, and their scales of both sides, to `take`.
template <u32 ARITHMETIC, u32 TOKENS, class Take>
DEV void take_sums(const CodesArgs& args, const CodesSums<ARITHMETIC, TOKENS>& sums, u32 start, u32 first_token, Take take) {
    constexpr bool SHIFTED = ARITHMETIC == SHIFTED_INTEGERS;
    const Matrix& m = args.matrix;
    // Whether tokens have anything of their own in a segment.
    bool own = SHIFTED || (TOKENS == 128 && own_scales(args));
    SegmentPlace place = segment_place(args, start);
    float scales[2], zeros[2] = {0.0f, 0.0f};
    UNROLL
    for (u32 h = 0; h < 2; h++) {
        scales[h] = float_of(sums.scales[h]);
        if (SHIFTED && m.zeros) zeros[h] = zero_at(m, scale_place(m, sums.row + 8 * h), start / m.group);
    }
    UNROLL
    for (u32 j = 0; j < TOKENS / 4 && own; j++) {
        u32 token = j / 2 * 8 + lane() % 4 * 2 + j % 2;
        TokenFactors factors{1.0f, 0.0f, 0};
        if constexpr (TOKENS == 128) factors.scale = sums.token_scales[token];
        else factors = token_factors<SHIFTED>(args, place, first_token + token);
        UNROLL
        for (u32 h = 0; h < 2; h++) {
            u32 at = j / 2 * 4 + 2 * h + j % 2;
            float value = (float)sums.sums[at];
            if constexpr (SHIFTED)
                value = shift_back(sums.sums[at], factors, sums.columns[2 * h], (i32)zeros[h], place.length);
            take(at, h, token, value, scales[h] * factors.scale);
        }
    }
    UNROLL
    for (u32 at = 0; at < TOKENS / 2 && !own; at++) {
        u32 h = at / 2 % 2, token = at / 4 * 8 + lane() % 4 * 2 + at % 2;
        take(at, h, token, (float)sums.sums[at], scales[h]);
    }
}

// A lane's codes of a stage's tiles.
template <u32 ARITHMETIC, u32 CODE> struct StageCodes {
    u32 words[StageK<ARITHMETIC>::TILES][CodeBits<CODE>::value];
};

// Behind the last tile activations are zero: it comes again.
template <u32 ARITHMETIC, u32 CODE>
DEV void load_stage(const Matrix& m, const u8* codes, u32 stage, StageCodes<ARITHMETIC, CODE>& to) {
    constexpr u32 SIZE = CodeBits<CODE>::value, TILES = StageK<ARITHMETIC>::TILES;
    UNROLL
    for (u32 i = 0; i < TILES; i++) {
        const u8* tile = codes + (u64)least(stage * TILES + i, m.k_tiles - 1) * (512 * SIZE);
        UNROLL
        for (u32 j = 0; j < SIZE / 4; j++) {
            Quad quad = load16(tile + j * WARP * 16);
            to.words[i][4 * j] = quad.x, to.words[i][4 * j + 1] = quad.y;
            to.words[i][4 * j + 2] = quad.z, to.words[i][4 * j + 3] = quad.w;
        }
    }
}

template <u32 ARITHMETIC, u32 CODE>
DEV void decode_codes(const Matrix& m, const StageCodes<ARITHMETIC, CODE>& codes, u32 (&a)[STAGE_STEPS][4]) {
    UNROLL
    for (u32 s = 0; s < STAGE_STEPS; s++) {
        if constexpr (ARITHMETIC == HALVES) {
            float none[2] = {0.0f, 0.0f};
            half_operand<CODE>(m, codes.words[0], s, none, a[s]);
        } else if constexpr (ARITHMETIC == FP8) {
            UNROLL
            for (u32 r = 0; r < 4; r++) a[s][r] = byte_codes(codes.words[s / 2], s % 2, r);
        } else {
            integer_operand<CODE>(codes.words[s / 2], s % 2, (u32)(m.code_offset - 8388608.0f), a[s]);
        }
    }
}

// A step's product begins.
template <u32 ARITHMETIC, u32 TOKENS>
DEV void step_product(CodesSums<ARITHMETIC, TOKENS>& sums, const u32 (&a)[4], u64 b) {
    if constexpr (ARITHMETIC == FP8) wgmma_e4m3<TOKENS>(sums.sums, a, b);
    else if constexpr (ARITHMETIC == HALVES) wgmma_f16<TOKENS>(sums.sums, a, b);
    else wgmma_s8<TOKENS>(sums.sums, a, b);
}

// Gives a stage back that this warp has read.
template <u32 TOKENS> DEV void leave_stage(u32 stage) {
    if (lane() == 0) barrier_arrive(codes_empty<TOKENS>(stage));
}

// All of k as one segment: products of one stage run while the codes of the next are decoded.
template <u32 ARITHMETIC, u32 CODE>
DEV void multiply_whole(const Matrix& m, const u8* codes, CodesRing<256>& ring, CodesSums<ARITHMETIC, 256>& sums) {
    StageCodes<ARITHMETIC, CODE> words;
    u32 a[2][STAGE_STEPS][4], before = 0, stages = stages_of<ARITHMETIC>(m);
    load_stage(m, codes, 0, words);
    wgmma_sums(sums.sums);
    for (u32 pair = 0; pair < stages; pair += 2) {
        // Registers of products under way are left alone: two sets, each known when this is compiled.
        UNROLL
        for (u32 set = 0; set < 2; set++) {
            u32 i = pair + set;
            if (i >= stages) continue;
            decode_codes(m, words, a[set]);
            if (i + 1 < stages) load_stage(m, codes, i + 1, words);
            barrier_wait(codes_full<256>(ring.stage), ring.round);
            u32 stage = shared_address(shared()) + ring.stage * CodesRoom<256>::BYTES;
            wgmma_operands(a[set]);
            wgmma_fence();
            UNROLL
            for (u32 s = 0; s < STAGE_STEPS; s++) step_product(sums, a[set][s], matrix_rows(stage + 32 * s));
            wgmma_commit();
            if constexpr (ARITHMETIC == SHIFTED_INTEGERS) {
                // Sums of the codes themselves: a product with ones.
                UNROLL
                for (u32 s = 0; s < STAGE_STEPS; s++) {
                    u32 first = i * StageK<ARITHMETIC>::K + 32 * s;
                    mma_s8(sums.columns, a[set][s], ones(first, m.k), ones(first + 16, m.k));
                }
            }
            wgmma_wait<1>();
            if (i > 0) leave_stage<256>(before);
            before = ring.stage;
            advance(ring);
        }
    }
    wgmma_wait<0>();
    wgmma_sums(sums.sums);
    leave_stage<256>(before);
}

// Adds what was summed to the outputs. Sums of fp8 are rounded once with their scale, as nobody else has their bits.
template <u32 ARITHMETIC>
DEV void fold_sums(const CodesArgs& args, CodesSums<ARITHMETIC, 128>& sums, u32 start, u32 first_token) {
    take_sums(args, sums, start, first_token, [&sums](u32 at, u32, u32, float value, float scale) {
        if constexpr (ARITHMETIC == FP8) sums.out[at] = fused(value, scale, sums.out[at]);
        else sums.out[at] = sums.out[at] + value * scale;
    });
}

// Segments of whole stages: their sums are folded while the other warpgroup multiplies; those of fp8 after each stage.
template <u32 ARITHMETIC, u32 CODE>
DEV void multiply_segments(const CodesArgs& args, const u8* codes, u32 first_token, CodesRing<128>& ring,
                           CodesSums<ARITHMETIC, 128>& sums) {
    const Matrix& m = args.matrix;
    StageCodes<ARITHMETIC, CODE> words;
    u32 a[2][STAGE_STEPS][4], start = 0, stages = stages_of<ARITHMETIC>(m);
    load_token_scale(args, sums, 0, first_token);
    load_stage(m, codes, 0, words);
    decode_codes(m, words, a[0]);
    load_stage(m, codes, 1, words);
    for (u32 pair = 0; pair < stages; pair += 2) {
        UNROLL
        for (u32 set = 0; set < 2; set++) {
            u32 i = pair + set, end = least((i + 1) * StageK<ARITHMETIC>::K, m.k);
            if (i >= stages) continue;
            barrier_wait(codes_full<128>(ring.stage), ring.round);
            u32 stage = shared_address(shared()) + ring.stage * CodesRoom<128>::BYTES;
            wgmma_sums(sums.sums);
            wgmma_operands(a[set]);
            wgmma_fence();
            UNROLL
            for (u32 s = 0; s < STAGE_STEPS; s++) step_product(sums, a[set][s], matrix_rows(stage + 32 * s));
            wgmma_commit();
            // Codes come from far: they are asked for a stage before they are decoded.
            decode_codes(m, words, a[1 - set]);
            load_stage(m, codes, i + 2, words);
            if (i * StageK<ARITHMETIC>::K == start) {
                decode_scales(m, sums);
                show_token_scale(args, sums, ring.turn);
                ring.turn ^= 1;
            }
            wgmma_wait<0>();
            wgmma_sums(sums.sums);
            leave_stage<128>(ring.stage);
            advance(ring);
            bool closed = end == m.k || end - start >= args.step;
            if (ARITHMETIC != FP8 && !closed) continue;
            fold_sums(args, sums, start, first_token);
            clear_sums(sums);
            if (!closed) continue;
            start = end;
            if (start >= m.k) continue;
            load_scales(m, sums, start);
            load_token_scale(args, sums, start, first_token);
        }
    }
}

// Tile after tile of the block, 64 rows of it.
template <u32 ARITHMETIC, u32 CODE, u32 TOKENS> DEV void multiply_tiles(const CodesHopperArgs& all) {
    const CodesArgs& args = all.codes;
    const Matrix& m = args.matrix;
    constexpr u32 TILE_BYTES = 512 * CodeBits<CODE>::value;
    u32 group = warp() / 4 - 1, atom = warp() % 4;
    CodesRing<TOKENS> ring;
    for (u32 index = block_x(); index < all.row_blocks * all.token_blocks; index += all.blocks) {
        BlockPlace place = block_place(all, index);
        u32 first_token = place.token_block * TOKENS;
        // The last block may have one row tile only; the second half then repeats it, and nobody stores that.
        u32 row_tile = least(place.row_block * 2 + group, m.row_tiles - 1);
        const u8* codes = m.codes + (u64)row_tile * m.k_tiles * TILE_BYTES + atom * TILE_BYTES / 4 + lane() * 16;
        CodesSums<ARITHMETIC, TOKENS> sums;
        sums.row = row_tile * MATRIX_TILE + atom * ATOM + lane() / 4;
        UNROLL
        for (u32 h = 0; h < 2; h++) sums.places[h] = scale_place(m, sums.row + 8 * h);
        clear_sums(sums);
        load_scales(m, sums, 0);
        u32 row = place.row_block * CODES_HOPPER_ROWS + group * MATRIX_TILE + atom * ATOM + lane() / 4;
        auto store = [&](u32, u32 h, u32 token, float value) {
            u32 held = row + 8 * h, to = first_token + token;
            if (to >= args.m || held < m.first || held - m.first >= m.n) return;
            // A scale that does not change along k is applied once, at the end.
            if (args.segment >= m.k) value = value * args.scales[to];
            args.y[(u64)to * args.y_stride + (held - m.first)] = value;
        };
        if constexpr (TOKENS == 256) {
            multiply_whole<ARITHMETIC, CODE>(m, codes, ring, sums);
            decode_scales(m, sums);
            // As a first segment is added to nothing: -0 becomes +0.
            take_sums(args, sums, 0, first_token,
                      [&](u32 at, u32 h, u32 token, float value, float scale) { store(at, h, token, 0.0f + value * scale); });
        } else {
            UNROLL
            for (u32 i = 0; i < TOKENS / 2; i++) sums.out[i] = 0.0f;
            multiply_segments<ARITHMETIC, CODE>(args, codes, first_token, ring, sums);
            UNROLL
            for (u32 j = 0; j < TOKENS / 2; j++) store(j, j / 2 % 2, j / 4 * 8 + lane() % 4 * 2 + j % 2, sums.out[j]);
        }
    }
}

template <u32 ARITHMETIC, u32 CODE, u32 TOKENS> DEV void codes_hopper(const CodesHopperArgs& args) {
    if (thread() == 0) {
        for (u32 i = 0; i < CodesRoom<TOKENS>::STAGES; i++) {
            barrier_init(codes_full<TOKENS>(i), 1);
            // The first lane of each warp that multiplies.
            barrier_init(codes_empty<TOKENS>(i), 8);
        }
        barrier_init_done();
    }
    sync_block();
    if (warp() < 4) {
        registers_less<24>();
        if (thread() == 0) copy_activations<ARITHMETIC, TOKENS>(args);
    } else {
        registers_more<240>();
        multiply_tiles<ARITHMETIC, CODE, TOKENS>(args);
    }
}

#define CODES_HOPPER(name, ARITHMETIC, CODE, TOKENS)                                                                   \
    KERNEL_HOPPER(codes_hopper_##name, CodesHopperArgs, CODES_HOPPER_THREADS, CodesRoom<TOKENS>::ALL) {                \
        codes_hopper<ARITHMETIC, CODE, TOKENS>(args);                                                                  \
    }

CODES_HOPPER(int4, INTEGERS, CODE_INT4, 256)
CODES_HOPPER(int8, INTEGERS, CODE_INT8, 256)
CODES_HOPPER(int4_shifted, SHIFTED_INTEGERS, CODE_INT4, 256)
CODES_HOPPER(int8_shifted, SHIFTED_INTEGERS, CODE_INT8, 256)
CODES_HOPPER(int4_segments, INTEGERS, CODE_INT4, 128)
CODES_HOPPER(int8_segments, INTEGERS, CODE_INT8, 128)
CODES_HOPPER(e4m3, HALVES, CODE_E4M3, 256)
CODES_HOPPER(e4m3_segments, HALVES, CODE_E4M3, 128)
CODES_HOPPER(fp8, FP8, CODE_E4M3, 128)

#endif  // HOPPER
