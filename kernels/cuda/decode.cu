// Packed weights to decompressed ones: a whole range of rows as operands of a dense product, or single rows to look
// up. Columns of operands stay in the order of the tiles; looked-up rows are in the order of the inputs.
#include "matrix.cuh"

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
