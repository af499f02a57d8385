// Activation quantization: compressed-tensors' values and serving kernels' codes, the formulas of the CPU backend
// (kernels/src/cpu/quantize.rs) operation by operation. Runs are consecutive elements of a row that share a scale; a
// run belongs to a power of two of neighbouring lanes.
#include "codes.cuh"
#include "numbers.cuh"
#include "row.cuh"

#define QUANTIZE_THREADS 256

// How codes are rounded: `Rounding` of quantize.rs.
#define QUANTIZE_INTEGERS 0
#define QUANTIZE_E4M3 1
#define QUANTIZE_E2M1 2
// Where scales come from: `ActivationScale`.
#define QUANTIZE_STATIC 0
#define QUANTIZE_DYNAMIC 1
#define QUANTIZE_LOCAL 2
#define QUANTIZE_POWER_OF_TWO 3
// What is written: `Output`. Values dequantized, codes, or codes times their local scale.
#define QUANTIZE_VALUES 0
#define QUANTIZE_CODES 1
#define QUANTIZE_SCALED 2
// As what: `Format`. Bytes are integers with their zero point, or codes of fp8 numbers, in the order of code_slot().
#define FORMAT_F32 0
#define FORMAT_BF16 1
#define FORMAT_F16 2
#define FORMAT_BYTES 3
#define FORMAT_E4M3 4

struct QuantizeArgs {
    const float* x;
    // [rows, stride] in the format; f32 may be `x` itself.
    void* out;
    // For codes: f32 [rows, runs], NaN where a code would be.
    float* scales;
    // For integer codes with zero points, else null: f32 [rows, runs].
    float* offsets;
    // For static scales: one, or one a run of a row.
    const float* stored;
    // For scales of a whole window, else null: smallest and largest value of each, and the window of every row.
    const float* ranges;
    const u32* windows;
    u64 rows;
    u32 width;
    u32 stride;
    u32 length;
    // Runs of a row; the last may be shorter.
    u32 runs;
    u32 lanes;
    u32 rounding;
    u32 scale;
    u32 output;
    u32 symmetric;
    u32 stored_runs;
    u32 format;
    // Range of codes.
    float low;
    float high;
    float zero;
    float global;
};

struct Range {
    float low, high;
};

// Adding a zero point of 0 turns -0 into +0, having none does not.
struct Parameters {
    float scale;
    float zero;
    bool has_zero;
    // What multiplies the code in the end.
    float factor;
};

// Smallest and largest value of every `step`-th element; NaN are passed over.
DEV Range range_of(const float* x, u32 from, u32 count, u32 step) {
    Range range{float_of(0x7f800000u), float_of(0xff800000u)};
    for (u32 i = from; i < count; i += step) {
        range.low = least(range.low, x[i]);
        range.high = most(range.high, x[i]);
    }
    return range;
}

// Over neighbouring lanes. A zero ends as +0, whichever lane had it.
DEV Range range_of_lanes(Range range, u32 lanes) {
    for (u32 mask = lanes / 2; mask > 0; mask /= 2) {
        range.low = least(range.low, shuffle_xor(range.low, mask));
        range.high = most(range.high, shuffle_xor(range.high, mask));
    }
    return Range{range.low + 0.0f, range.high + 0.0f};
}

// Machine epsilon of f32 stands in for a scale of zero.
DEV float or_epsilon(float scale) { return scale == 0.0f ? float_of(0x34000000u) : scale; }

DEV float round_code(const QuantizeArgs& args, float x) {
    return args.rounding == QUANTIZE_INTEGERS ? nearest(x) : args.rounding == QUANTIZE_E4M3 ? round_e4m3(x) : round_e2m1(x);
}

// MX: the largest magnitude rounded to a power of two at the first (of fp4 and fp8) mantissa bit, over the largest
// power of two of the code.
DEV float power_of_two(const QuantizeArgs& args, float largest) {
    u32 rounded = (bits_of(largest) + (1u << 21)) & 0xff800000u;
    i32 exponent = (i32)(rounded >> 23) - (args.rounding == QUANTIZE_E4M3 ? 8 : 2);
    exponent = least(most(exponent, 0), 255);
    return float_of(exponent == 0 ? 0x00400000u : (u32)exponent << 23);
}

// As compressed-tensors finds them, activations f32.
DEV Parameters library_parameters(const QuantizeArgs& args, Range range) {
    float low = least(range.low, 0.0f), high = most(range.high, 0.0f);
    if (!args.symmetric) {
        float scale = (high - low) / (args.high - args.low);
        float zero = nearest(clamped(args.low - low / scale, args.low, args.high));
        scale = or_epsilon(scale);
        return Parameters{scale, zero != zero ? 0.0f : zero, true, scale};
    }
    float largest = most(-low, high);
    if (args.scale == QUANTIZE_LOCAL) {
        // NVFP4: the group's scale in fp8, under the global scale.
        float local = round_e4m3(clamped(args.global * (largest / 6.0f), -448.0f, 448.0f));
        local = local == 0.0f ? 0.125f : local;
        float scale = local / args.global;
        // The code is the library's; what multiplies it in an exact product is the fp8 scale alone.
        return Parameters{scale, 0.0f, true, args.output == QUANTIZE_SCALED ? local : scale};
    }
    float scale = args.scale == QUANTIZE_POWER_OF_TWO ? power_of_two(args, largest)
                                                      : or_epsilon(largest / ((args.high - args.low) / 2.0f));
    return Parameters{scale, 0.0f, true, scale};
}

// As serving kernels find them: int8 over 127, fp8 over 448, asymmetric over the whole range of codes.
DEV Parameters kernel_parameters(const QuantizeArgs& args, Range range) {
    if (args.symmetric) {
        float largest = most(most(-range.low, range.high), 0.0f);
        return Parameters{or_epsilon(largest / args.high), 0.0f, false, 1.0f};
    }
    float scale = or_epsilon((range.high - range.low) / (args.high - args.low));
    return Parameters{scale, nearest(args.low - range.low / scale), true, 1.0f};
}

DEV float quantized(const QuantizeArgs& args, const Parameters& parameters, float x) {
    float scaled = x / parameters.scale;
    if (args.output != QUANTIZE_CODES) {
        float shifted = parameters.has_zero ? scaled + parameters.zero : scaled;
        float code = round_code(args, clamped(shifted, args.low, args.high));
        return (parameters.has_zero ? code - parameters.zero : code) * parameters.factor;
    }
    if (args.rounding != QUANTIZE_INTEGERS) return round_code(args, clamped(scaled, args.low, args.high));
    // Kernels round before they add the zero point.
    return clamped(nearest(scaled) + parameters.zero, args.low, args.high);
}

DEV void write_quantized(const QuantizeArgs& args, u64 row, u32 column, float value) {
    u64 at = row * args.stride + column;
    if (args.format == FORMAT_F32) ((float*)args.out)[at] = value;
    else if (args.format == FORMAT_BF16) ((u16*)args.out)[at] = (u16)pack_bf16(value, 0.0f);
    else if (args.format == FORMAT_F16) ((u16*)args.out)[at] = f32_to_f16(value);
    else if (args.format == FORMAT_E4M3) ((u8*)args.out)[row * args.stride + code_slot(column)] = (u8)e4m3_code(value);
    // No integer stands for NaN: the scale says it.
    else ((i8*)args.out)[row * args.stride + code_slot(column)] = value == value ? (i8)(i32)value : (i8)0;
}

// Whether a flag is set in any of neighbouring lanes.
DEV bool any_of_lanes(bool flag, u32 lanes) {
    u32 any = flag;
    for (u32 mask = lanes / 2; mask > 0; mask /= 2) any |= shuffle_xor(any, mask);
    return any;
}

// Of a run whose scale is stored.
DEV Parameters stored_parameters(const QuantizeArgs& args, u32 run) {
    float scale = args.stored[args.stored_runs ? run : 0];
    bool codes = args.output == QUANTIZE_CODES;
    return Parameters{scale, args.zero, codes || !args.symmetric, codes ? 1.0f : scale};
}

// Of a run that has these values.
DEV Parameters range_parameters(const QuantizeArgs& args, Range range) {
    return args.output == QUANTIZE_CODES ? kernel_parameters(args, range) : library_parameters(args, range);
}

// What this thread, the `from`-th of `lanes`, makes of the `count` elements of a run; whether one of them is no number.
DEV bool write_run(const QuantizeArgs& args, const Parameters& parameters, u64 row, u32 run, const float* x, u32 count,
                   u32 from, u32 lanes) {
    bool lost = false;
    for (u32 i = from; i < count; i += lanes) {
        float value = quantized(args, parameters, x[i]);
        lost = lost || value != value;
        write_quantized(args, row, run * args.length + i, value);
    }
    return lost;
}

// What a run leaves beside its values, where codes need it; zeros behind the last run.
DEV void close_run(const QuantizeArgs& args, const Parameters& parameters, u64 row, u32 run, bool lost, u32 from, u32 lanes) {
    if (args.scales && from == 0) {
        args.scales[row * args.runs + run] = lost ? float_of(0x7fc00000u) : parameters.scale;
        if (args.offsets) args.offsets[row * args.runs + run] = parameters.zero;
    }
    if (run + 1 == args.runs)
        for (u32 i = args.width + from; i < args.stride; i += lanes) write_quantized(args, row, i, 0.0f);
}

KERNEL(quantize_runs, QuantizeArgs, QUANTIZE_THREADS, 0) {
    u64 index = (u64)block_x() * (QUANTIZE_THREADS / args.lanes) + thread() / args.lanes;
    u32 from = thread() & (args.lanes - 1);
    // Lanes without a run take part in the exchange below.
    bool active = index < args.rows * args.runs;
    u64 row = active ? index / args.runs : 0;
    u32 run = active ? (u32)(index - row * args.runs) : 0;
    u32 start = run * args.length;
    u32 count = active ? least(args.length, args.width - start) : 0;
    const float* x = args.x + row * args.width + start;
    Parameters parameters;
    if (args.scale == QUANTIZE_STATIC) {
        parameters = stored_parameters(args, run);
    } else {
        Range range;
        if (args.ranges) range = Range{args.ranges[2 * args.windows[row]], args.ranges[2 * args.windows[row] + 1]};
        else range = range_of_lanes(range_of(x, from, count, args.lanes), args.lanes);
        parameters = range_parameters(args, range);
    }
    bool lost = write_run(args, parameters, row, run, x, count, from, args.lanes);
    lost = any_of_lanes(lost, args.lanes);
    if (active) close_run(args, parameters, row, run, lost, from, args.lanes);
}

struct RangeArgs {
    const float* x;
    // f32 [rows, 2].
    float* ranges;
    u64 rows;
    u32 width;
};

// Smallest and largest value of every row; a warp a row.
KERNEL(range_rows, RangeArgs, QUANTIZE_THREADS, 0) {
    u64 row = (u64)block_x() * (QUANTIZE_THREADS / WARP) + warp();
    if (row >= args.rows) return;
    Range range = range_of_lanes(range_of(args.x + row * args.width, lane(), args.width, WARP), WARP);
    if (lane() == 0) {
        args.ranges[2 * row] = range.low;
        args.ranges[2 * row + 1] = range.high;
    }
}

struct FoldArgs {
    const float* rows;
    // First row and the row behind the last: u32 [windows, 2].
    const u32* windows;
    float* ranges;
};

// Smallest and largest value of every window, from those of its rows; a block a window.
KERNEL(range_windows, FoldArgs, QUANTIZE_THREADS, 8 * (QUANTIZE_THREADS / WARP)) {
    Range range{float_of(0x7f800000u), float_of(0xff800000u)};
    for (u32 row = args.windows[2 * block_x()] + thread(); row < args.windows[2 * block_x() + 1]; row += QUANTIZE_THREADS) {
        range.low = least(range.low, args.rows[2 * (u64)row]);
        range.high = most(range.high, args.rows[2 * (u64)row + 1]);
    }
    range = range_of_lanes(range, WARP);
    Range* warps = (Range*)shared();
    if (lane() == 0) warps[warp()] = range;
    sync_block();
    if (thread() == 0) {
        for (u32 i = 1; i < QUANTIZE_THREADS / WARP; i++) {
            range.low = least(range.low, warps[i].low);
            range.high = most(range.high, warps[i].high);
        }
        args.ranges[2 * block_x()] = range.low;
        args.ranges[2 * block_x() + 1] = range.high;
    }
}

struct OperandArgs {
    const float* x;
    u16* out;
    u32 width;
    u32 stride;
};

// Rows rounded to bf16 and padded with zeros to `stride`, a multiple of 64; block x is a row, a thread four elements.
KERNEL(round_operands, OperandArgs, QUANTIZE_THREADS, 0) {
    u32 column = (block_y() * QUANTIZE_THREADS + thread()) * 4;
    if (column >= args.stride) return;
    const float* x = args.x + (u64)block_x() * args.width + column;
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (args.width % 4 == 0 && column < args.width) {
        Quad quad = load16(x);
        values[0] = float_of(quad.x), values[1] = float_of(quad.y);
        values[2] = float_of(quad.z), values[3] = float_of(quad.w);
    } else {
        UNROLL for (u32 i = 0; i < 4; i++)
            if (column + i < args.width) values[i] = x[i];
    }
    u64 low = pack_bf16(values[0], values[1]), high = pack_bf16(values[2], values[3]);
    *(u64*)(args.out + (u64)block_x() * args.stride + column) = low | high << 32;
}

// Rows that become operands without lying in memory as f32 first: the results of a norm, or of a gate.
struct RowArgs {
    // Its `x`: what is normed, or gates.
    QuantizeArgs quantize;
    // Weight of the norm; or what gates are multiplied with, as `x`.
    const float* other;
    // Of a norm: the number of each row that is not finite, else the largest number.
    u32* bad_rows;
    float epsilon;
    // Nothing but the rounding of the format.
    u32 plain;
    // Columns of one block: whole runs, or all.
    u32 columns;
};

// All threads of the block on the only run of a row, which is in shared memory.
DEV void quantize_whole_row(const QuantizeArgs& args, const float* x, Range* warps) {
    Parameters parameters;
    if (args.scale == QUANTIZE_STATIC) {
        parameters = stored_parameters(args, 0);
    } else {
        Range range = range_of_lanes(range_of(x, thread(), args.width, ROW_THREADS), WARP);
        if (lane() == 0) warps[warp()] = range;
        sync_block();
        for (u32 i = 0; i < ROW_WARPS; i++) {
            range.low = least(range.low, warps[i].low);
            range.high = most(range.high, warps[i].high);
        }
        parameters = range_parameters(args, range);
    }
    bool lost = any_of_lanes(write_run(args, parameters, block_x(), 0, x, args.width, thread(), ROW_THREADS), WARP);
    if (args.scales) {
        u32* flags = (u32*)(warps + ROW_WARPS);
        if (lane() == 0) flags[warp()] = lost;
        sync_block();
        for (u32 i = 0; i < ROW_WARPS; i++) lost = lost || flags[i];
    }
    close_run(args, parameters, block_x(), 0, lost, thread(), ROW_THREADS);
}

// A few lanes on each of the runs of columns `first..first + columns`, which are in shared memory.
DEV void quantize_row_runs(const QuantizeArgs& args, const float* x, u32 first, u32 columns) {
    u32 from = thread() & (args.lanes - 1), beside = ROW_THREADS / args.lanes;
    u32 first_run = first / args.length, runs = (columns + args.length - 1) / args.length;
    for (u32 begin = 0; begin < runs; begin += beside) {
        u32 slot = begin + thread() / args.lanes;
        // Lanes without a run take part in the exchange below.
        bool active = slot < runs;
        u32 start = active ? slot * args.length : 0;
        u32 count = active ? least(args.length, columns - start) : 0;
        Parameters parameters;
        if (args.scale == QUANTIZE_STATIC) parameters = stored_parameters(args, active ? first_run + slot : 0);
        else parameters = range_parameters(args, range_of_lanes(range_of(x + start, from, count, args.lanes), args.lanes));
        bool lost = write_run(args, parameters, block_x(), first_run + slot, x + start, count, from, args.lanes);
        lost = any_of_lanes(lost, args.lanes);
        if (active) close_run(args, parameters, block_x(), first_run + slot, lost, from, args.lanes);
    }
}

// Four neighbouring elements of an operand of f32 or bf16, or zeros behind the last of a row.
DEV void write_four(const QuantizeArgs& args, u32 column, const float (&values)[4]) {
    u64 at = (u64)block_x() * args.stride + column;
    if (args.format == FORMAT_BF16) {
        u64 low = pack_bf16(values[0], values[1]), high = pack_bf16(values[2], values[3]);
        *(u64*)((u16*)args.out + at) = low | high << 32;
    } else {
        store16((float*)args.out + at, Quad{bits_of(values[0]), bits_of(values[1]), bits_of(values[2]), bits_of(values[3])});
    }
}

// Four elements of the row after the norm.
DEV void normed_four(const RowArgs& args, u32 column, float inverse, float (&values)[4]) {
    RowFour x = *(const RowFour*)(row_values() + column);
    Quad weight = load16(args.other + column);
    values[0] = (x.values[0] * inverse) * float_of(weight.x);
    values[1] = (x.values[1] * inverse) * float_of(weight.y);
    values[2] = (x.values[2] * inverse) * float_of(weight.z);
    values[3] = (x.values[3] * inverse) * float_of(weight.w);
}

// silu(gate) * up of four elements at aligned places.
DEV void gated_four(const float* gate, const float* up, float (&values)[4]) {
    Quad g = load16(gate), u = load16(up);
    values[0] = silu(float_of(g.x)) * float_of(u.x);
    values[1] = silu(float_of(g.y)) * float_of(u.y);
    values[2] = silu(float_of(g.z)) * float_of(u.z);
    values[3] = silu(float_of(g.w)) * float_of(u.w);
}

// Says whether the row is finite, as it was before the norm: it is where the sum of its squares is. The first warp alone:
// nobody changes the row before it is through.
DEV void tell_bad_row(const RowArgs& args, float square_sum) {
    if (warp() != 0) return;
    u32 bad = 0;
    if (!is_finite(bits_of(square_sum)))
        for (u32 i = lane(); i < args.quantize.width; i += WARP) bad |= !is_finite(bits_of(row_values()[i]));
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) bad |= shuffle_xor(bad, mask);
    if (lane() == 0) args.bad_rows[block_x()] = bad ? block_x() : 0xffffffffu;
}

// Block x is a row, of a multiple of four columns.
template <u32 CAPACITY> DEV void norm_operand(const RowArgs& args) {
    const QuantizeArgs& quantize = args.quantize;
    u32 width = quantize.width;
    load_row(quantize.x + (u64)block_x() * width, width);
    float sum = row_square_sum<CAPACITY>(width);
    tell_bad_row(args, sum);
    float inverse = 1.0f / root(sum / (float)width + args.epsilon);
    float values[4];
    if (args.plain) {
        for (u32 i = thread() * 4; i < quantize.stride; i += ROW_THREADS * 4) {
            UNROLL for (u32 j = 0; j < 4; j++) values[j] = 0.0f;
            if (i < width) normed_four(args, i, inverse, values);
            write_four(quantize, i, values);
        }
        return;
    }
    // Others may still be summing the row.
    sync_block();
    for (u32 i = thread() * 4; i < width; i += ROW_THREADS * 4) {
        normed_four(args, i, inverse, values);
        *(RowFour*)(row_values() + i) = RowFour{{values[0], values[1], values[2], values[3]}};
    }
    sync_block();
    if (quantize.runs == 1) quantize_whole_row(quantize, row_values(), (Range*)row_warps<CAPACITY>());
    else quantize_row_runs(quantize, row_values(), 0, width);
}

// Block x is a row, block y some of its columns.
template <u32 CAPACITY> DEV void gate_operand(const RowArgs& args) {
    const QuantizeArgs& quantize = args.quantize;
    u32 first = block_y() * args.columns, columns = least(args.columns, quantize.width - first);
    const float* gate = quantize.x + (u64)block_x() * quantize.width + first;
    const float* up = args.other + (u64)block_x() * quantize.width + first;
    if (quantize.width % 4 == 0 && args.columns % 4 == 0) {
        for (u32 i = thread() * 4; i < columns; i += ROW_THREADS * 4) {
            float values[4];
            gated_four(gate + i, up + i, values);
            *(RowFour*)(row_values() + i) = RowFour{{values[0], values[1], values[2], values[3]}};
        }
    } else {
        for (u32 i = thread(); i < columns; i += ROW_THREADS) row_values()[i] = silu(gate[i]) * up[i];
    }
    sync_block();
    if (quantize.runs == 1) quantize_whole_row(quantize, row_values(), (Range*)row_warps<CAPACITY>());
    else quantize_row_runs(quantize, row_values(), first, columns);
}

#define ROW_KERNELS(CAPACITY)                                                                                          \
    KERNEL(norm_operand_##CAPACITY, RowArgs, ROW_THREADS, ROW_SHARED(CAPACITY)) { norm_operand<CAPACITY>(args); }      \
    KERNEL(gate_operand_##CAPACITY, RowArgs, ROW_THREADS, ROW_SHARED(CAPACITY)) { gate_operand<CAPACITY>(args); }

ROW_KERNELS(4096)
ROW_KERNELS(8192)
ROW_KERNELS(16384)

// Gates of a multiple of four columns that are only rounded: block x is a row, a thread four elements.
KERNEL(gate_operand_plain, RowArgs, ROW_THREADS, 0) {
    const QuantizeArgs& quantize = args.quantize;
    u32 column = (block_y() * ROW_THREADS + thread()) * 4;
    if (column >= quantize.stride) return;
    const float* gate = quantize.x + (u64)block_x() * quantize.width + column;
    const float* up = args.other + (u64)block_x() * quantize.width + column;
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (column < quantize.width) gated_four(gate, up, values);
    write_four(quantize, column, values);
}
