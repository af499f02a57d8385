// Activation quantization: compressed-tensors' values and serving kernels' codes, the formulas of the CPU backend
// (kernels/src/cpu/quantize.rs) operation by operation. Runs are consecutive elements of a row that share a scale; a
// run belongs to a power of two of neighbouring lanes.
#include "codes.cuh"
#include "numbers.cuh"

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
// As what: `Format`. Bytes are integers with their zero point, in the order of code_slot().
#define FORMAT_F32 0
#define FORMAT_BF16 1
#define FORMAT_F16 2
#define FORMAT_BYTES 3

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
    // No integer stands for NaN: the scale says it.
    else ((i8*)args.out)[row * args.stride + code_slot(column)] = value == value ? (i8)(i32)value : (i8)0;
}

// Whether a flag is set in any of neighbouring lanes.
DEV bool any_of_lanes(bool flag, u32 lanes) {
    u32 any = flag;
    for (u32 mask = lanes / 2; mask > 0; mask /= 2) any |= shuffle_xor(any, mask);
    return any;
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
        float scale = args.stored[args.stored_runs ? run : 0];
        bool codes = args.output == QUANTIZE_CODES;
        parameters = Parameters{scale, args.zero, codes || !args.symmetric, codes ? 1.0f : scale};
    } else {
        Range range;
        if (args.ranges) range = Range{args.ranges[2 * args.windows[row]], args.ranges[2 * args.windows[row] + 1]};
        else range = range_of_lanes(range_of(x, from, count, args.lanes), args.lanes);
        parameters = args.output == QUANTIZE_CODES ? kernel_parameters(args, range) : library_parameters(args, range);
    }
    bool lost = false;
    for (u32 i = from; i < count; i += args.lanes) {
        float value = quantized(args, parameters, x[i]);
        lost = lost || value != value;
        write_quantized(args, row, start + i, value);
    }
    lost = any_of_lanes(lost, args.lanes);
    if (!active) return;
    if (args.scales && from == 0) {
        args.scales[index] = lost ? float_of(0x7fc00000u) : parameters.scale;
        if (args.offsets) args.offsets[index] = parameters.zero;
    }
    if (run + 1 == args.runs)
        for (u32 i = args.width + from; i < args.stride; i += args.lanes) write_quantized(args, row, i, 0.0f);
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
