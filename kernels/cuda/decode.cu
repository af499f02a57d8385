// Packed weights to decompressed ones: a whole range of rows as operands of a dense product, or single rows to look
// up. Columns of operands stay in the order of the tiles; looked-up rows are in the order of the inputs.
#include "operands.cuh"

#define DECODE_THREADS 256
#define DECODE_WARPS (DECODE_THREADS / WARP)
// 16 rows of 128 bytes a warp.
#define DECODE_STAGED (DECODE_WARPS * ATOM * 128)

struct DecodeArgs {
    Matrix matrix;
    u16* out;  // bf16
    u32 rows;  // of `out`; those beyond the matrix are zero
};

// 16 bytes of shared memory.
struct alignas(16) Chunk { u32 v[4]; };

// A warp's atom, one slice after another.
template <u32 CODE> struct AtomOperands {
    u32 words[CodeBits<CODE>::value];
    u32 row, column;
    bool inside;
};

template <u32 CODE> DEV AtomOperands<CODE> load_atom(const Matrix& m, u32 row_tile, u32 k_tile, u32 atom) {
    AtomOperands<CODE> operands;
    operands.inside = row_tile < m.row_tiles && k_tile < m.k_tiles;
    // Outside, the codes of some tile that exists are loaded and dropped.
    u32 tile = least(row_tile, m.row_tiles - 1), column = least(k_tile, m.k_tiles - 1);
    load_codes<CODE>(m, tile, column, atom, operands.words);
    operands.row = tile * MATRIX_TILE + atom * ATOM;
    operands.column = column * MATRIX_TILE;
    return operands;
}

// bf16 pairs of slice `s`, one a register of the fragment; zeros outside the matrix.
template <u32 CODE>
DEV void slice_operands(const Matrix& m, const float* table, const AtomOperands<CODE>& atom, u32 s, u32 (&pairs)[4]) {
    float weights[8];
    slice_weights<CODE>(m, table, atom.words, s, atom.row, atom.column, weights);
    UNROLL
    for (u32 r = 0; r < 4; r++) {
        bool held = atom.inside && atom.row + lane() / 4 + 8 * (r & 1) < m.first + m.n;
        pairs[r] = held ? pack_bf16(weights[2 * r], weights[2 * r + 1]) : 0;
    }
}

// 64 rows x 128 k of row-major operands, a row every k_tiles * 64. Fragments become rows of 128 bytes in shared
// memory, whose 16-byte chunks are exchanged so that neither side meets a bank twice.
template <u32 CODE> DEV void decode_rows(const DecodeArgs& args) {
    const Matrix& m = args.matrix;
    u32 row_tile = block_y(), k_tile = block_x() * 2 + warp() / 4, atom = warp() % 4;
    AtomOperands<CODE> operands = load_atom<CODE>(m, row_tile, k_tile, atom);
    u8* staged = shared() + warp() * (ATOM * 128);
    float* table = (float*)(shared() + DECODE_STAGED);
    fill_scale_table(m, table);
    sync_block();
    UNROLL
    for (u32 s = 0; s < 4; s++) {
        u32 pairs[4];
        slice_operands<CODE>(m, table, operands, s, pairs);
        UNROLL
        for (u32 r = 0; r < 4; r++) {
            u32 row = lane() / 4 + 8 * (r & 1), chunk = 2 * s + (r >> 1);
            *(u32*)(staged + row * 128 + (chunk ^ row % 8) * 16 + lane() % 4 * 4) = pairs[r];
        }
    }
    sync_warp();
    UNROLL
    for (u32 i = 0; i < 4; i++) {
        u32 row = i * 4 + lane() / 8, chunk = lane() % 8;
        Chunk words = *(const Chunk*)(staged + row * 128 + (chunk ^ row % 8) * 16);
        u32 held = row_tile * MATRIX_TILE + atom * ATOM + row;
        bool wanted = held >= m.first && held - m.first < args.rows && k_tile < m.k_tiles;
        u64 at = ((u64)(held - m.first) * m.k_tiles + k_tile) * MATRIX_TILE + chunk * 8;
        if (wanted) store16(args.out + at, Quad{words.v[0], words.v[1], words.v[2], words.v[3]});
    }
}

// The same in the order of 16-bit tiles.
template <u32 CODE> DEV void decode_tiles(const DecodeArgs& args) {
    const Matrix& m = args.matrix;
    u32 row_tile = block_y(), k_tile = block_x() * 2 + warp() / 4, atom = warp() % 4;
    AtomOperands<CODE> operands = load_atom<CODE>(m, row_tile, k_tile, atom);
    float* table = (float*)shared();
    fill_scale_table(m, table);
    sync_block();
    u16* tile = args.out + ((u64)row_tile * m.k_tiles + k_tile) * (MATRIX_TILE * MATRIX_TILE);
    UNROLL
    for (u32 s = 0; s < 4; s++) {
        u32 pairs[4];
        slice_operands<CODE>(m, table, operands, s, pairs);
        if (k_tile < m.k_tiles)
            store16(tile + (atom * 4 + s) * 256 + lane() * 8, Quad{pairs[0], pairs[1], pairs[2], pairs[3]});
    }
}

#define DECODE_KERNELS(name, CODE)                                                                                     \
    KERNEL(decode_rows_##name, DecodeArgs, DECODE_THREADS, DECODE_STAGED + SCALE_TABLE_BYTES) {                        \
        decode_rows<CODE>(args);                                                                                       \
    }                                                                                                                  \
    KERNEL(decode_tiles_##name, DecodeArgs, DECODE_THREADS, SCALE_TABLE_BYTES) { decode_tiles<CODE>(args); }

DECODE_KERNELS(int4, CODE_INT4)
DECODE_KERNELS(e2m1, CODE_E2M1)
DECODE_KERNELS(int8, CODE_INT8)
DECODE_KERNELS(e4m3, CODE_E4M3)
DECODE_KERNELS(bf16, CODE_BF16)
DECODE_KERNELS(f16, CODE_F16)
DECODE_KERNELS(f32, CODE_F32)

// Tiles that a warp decodes one after the other, and k of a block.
#define QUICK_TILES 4
#define QUICK_COLUMNS (2 * QUICK_TILES)

// Scales and zero points of a lane's two rows.
template <u32 CODE, u32 ARITHMETIC> struct QuickRows {
    ScalePlace place[2];
    bool held[2];
    Scaling<CODE, ARITHMETIC> scaling[2];
};

template <u32 CODE, u32 ARITHMETIC>
DEV void take_scales(const Matrix& m, const u8* table, u32 group, QuickRows<CODE, ARITHMETIC>& rows) {
    UNROLL
    for (u32 high = 0; high < 2; high++) {
        u64 at = rows.place[high].base + (u64)group * rows.place[high].step;
        u32 stored = ARITHMETIC == BY_BF16   ? ((const u16*)m.scales)[at]
                     : ARITHMETIC == BY_TABLE ? m.scales[at]
                                              : bits_of(scale_value(m, stored_scale(m, at)));
        float zero = m.zeros ? (float)m.zeros[at] : 0.0f;
        prepare<CODE>(m, table, stored, zero, rows.scaling[high]);
    }
}

// Of a pair of neighbouring k, the first of which is `k`, what lies inside.
DEV u32 inside_pair(u32 pair, u32 k, u32 end) { return k + 1 < end ? pair : k < end ? pair & 0xffff : 0; }

// A warp's atom of one tile to rows of 128 bytes in shared memory, exchanged as in decode_rows.
template <u32 CODE, u32 ARITHMETIC>
DEV void stage_atom(const Matrix& m, const u8* table, u32 row_tile, u32 k_tile, u8* staged,
                    QuickRows<CODE, ARITHMETIC>& rows) {
    u32 words[CodeBits<CODE>::value];
    load_codes<CODE>(m, row_tile, k_tile, warp() % 4, words);
    u32 first_group = m.groups <= 1 ? 0 : k_tile * MATRIX_TILE / m.group;
    bool ends_here = (k_tile + 1) * MATRIX_TILE > m.k;
    UNROLL
    for (u32 s = 0; s < 4; s++) {
        // Groups of a tile: one, two or four.
        u32 ahead = m.group >= MATRIX_TILE || m.groups <= 1 ? 0 : m.group == 32 ? s / 2 : s;
        if (s == 0 || ahead > 0) take_scales(m, table, least(first_group + ahead, most(m.groups, 1u) - 1), rows);
        u32 a[4];
        operand<CODE>(m, words, s, rows.scaling, a);
        UNROLL
        for (u32 r = 0; r < 4; r++) {
            u32 pair = rows.held[r & 1] ? a[r] : 0;
            if (ends_here) pair = inside_pair(pair, k_tile * MATRIX_TILE + 16 * s + 2 * (lane() % 4) + 8 * (r >> 1), m.k);
            u32 row = lane() / 4 + 8 * (r & 1), chunk = 2 * s + (r >> 1);
            *(u32*)(staged + row * 128 + (chunk ^ row % 8) * 16 + lane() % 4 * 4) = pair;
        }
    }
}

// As decode_rows, for schemes that operands.cuh has a short way for: 64 rows x 512 k a block. Scales are those of whole
// tiles, or of groups of 16 or 32.
template <u32 CODE, u32 ARITHMETIC> DEV void decode_quick(const DecodeArgs& args) {
    const Matrix& m = args.matrix;
    u8* staged = shared() + warp() * (ATOM * 128);
    u8* table = shared() + DECODE_STAGED;
    if (ARITHMETIC == BY_TABLE) {
        fill_magnitudes(m, table, thread());
        sync_block();
    }
    // Outside, the codes of some tile that exists are loaded and dropped.
    u32 row_tile = least(block_y(), m.row_tiles - 1), atom_row = row_tile * MATRIX_TILE + warp() % 4 * ATOM;
    QuickRows<CODE, ARITHMETIC> rows;
    UNROLL
    for (u32 high = 0; high < 2; high++) {
        u32 row = atom_row + lane() / 4 + 8 * high;
        rows.place[high] = scale_place(m, row);
        rows.held[high] = block_y() < m.row_tiles && row < m.first + m.n;
    }
    u32 first_tile = block_x() * QUICK_COLUMNS + warp() / 4, end_tile = least((block_x() + 1) * QUICK_COLUMNS, m.k_tiles);
    ROLL
    for (u32 k_tile = first_tile; k_tile < end_tile; k_tile += 2) {
        stage_atom(m, table, row_tile, k_tile, staged, rows);
        sync_warp();
        UNROLL
        for (u32 i = 0; i < 4; i++) {
            u32 row = i * 4 + lane() / 8, chunk = lane() % 8;
            Chunk words = *(const Chunk*)(staged + row * 128 + (chunk ^ row % 8) * 16);
            u32 held = block_y() * MATRIX_TILE + warp() % 4 * ATOM + row;
            u64 at = ((u64)(held - m.first) * m.k_tiles + k_tile) * MATRIX_TILE + chunk * 8;
            if (held >= m.first && held - m.first < args.rows)
                store16(args.out + at, Quad{words.v[0], words.v[1], words.v[2], words.v[3]});
        }
        sync_warp();
    }
}

#define DECODE_QUICK(name, CODE, ARITHMETIC)                                                                           \
    KERNEL(decode_quick_##name, DecodeArgs, DECODE_THREADS,                                                            \
           DECODE_STAGED + (ARITHMETIC == BY_TABLE ? MAGNITUDES_BYTES : 0)) {                                          \
        decode_quick<CODE, ARITHMETIC>(args);                                                                          \
    }

DECODE_QUICK(int4, CODE_INT4, BY_BF16)
DECODE_QUICK(int4_f32, CODE_INT4, BY_F32)
DECODE_QUICK(e2m1, CODE_E2M1, BY_TABLE)
DECODE_QUICK(int8, CODE_INT8, BY_BF16)
DECODE_QUICK(int8_f32, CODE_INT8, BY_F32)
DECODE_QUICK(e4m3, CODE_E4M3, BY_BF16)
DECODE_QUICK(e4m3_f32, CODE_E4M3, BY_F32)

struct LookUpArgs {
    Matrix matrix;
    const u32* ids;          // rows of the matrix
    const u32* permutation;  // column j of the tiles is input permutation[j], or null
    float* out;              // [ids, k]
};

// One looked-up row a block.
KERNEL(look_up, LookUpArgs, DECODE_THREADS, 0) {
    const Matrix& m = args.matrix;
    u32 row = m.first + args.ids[block_x()];
    float* out = args.out + (u64)block_x() * m.k;
    for (u32 column = thread(); column < m.k; column += DECODE_THREADS)
        out[args.permutation ? args.permutation[column] : column] = weight_at(m, row, column);
}
