// CUDA's execution model on a CPU: what arch.cuh's names mean to a C++ compiler.
//
// Each thread of a block is a fiber; operations of a warp are a meeting of 32 fibers, and the last to arrive performs
// it for all. Blocks are independent and run on any thread of the host. Timing, bank conflicts and the rounding inside
// a tensor core are not modelled: a product of matrices sums k in order in f32.
//
// What it is strict about, because hardware would be silent:
//   * shared memory starts as NaN, so that a read before a write shows;
//   * asynchronous copies happen as early or as late as is legal, by the schedule that a test chooses;
//   * accesses of 16 bytes must be aligned, and those to shared memory inside it;
//   * a barrier or warp operation that some thread never reaches ends the block with an error, and so does a block that
//     makes no progress.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "fiber.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEV static inline
#define UNROLL
#define ROLL
#define __restrict__ __restrict

#define KERNEL(name, Arguments, THREADS, SHARED)                                                                      \
    static_assert((SHARED) <= SHARED_LIMIT, #name " takes more shared memory than every target has");                 \
    static void name##_body(const Arguments& args);                                                                   \
    static void name##_call(const void* args) { name##_body(*(const Arguments*)args); }                               \
    static const simt::Registration name##_registration{{#name, name##_call, (THREADS), (SHARED), sizeof(Arguments)}}; \
    static void name##_body(const Arguments& args)

namespace simt {

// What a launcher needs to know of a kernel.
struct Kernel {
    const char* name;
    void (*call)(const void* args);
    u32 threads;
    u32 shared_bytes;
    size_t argument_bytes;
};

inline std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

struct Registration {
    explicit Registration(Kernel kernel) { kernels().push_back(kernel); }
};

// Order of fibers: a warp runs until it meets a barrier of the block (which shows reads that miss a barrier), or all
// threads take turns, or the first with the last thread first (which shows writes that must wait for earlier threads).
enum class Order : u32 { DepthFirst = 0, LockStep = 1, LastFirst = 2 };
// When an asynchronous copy happens: at once (which shows buffers overwritten too early), or at the last legal wait
// (which shows waits that are missing or too weak).
enum class Copies : u32 { Eager = 0, Lazy = 1 };

struct Schedule {
    Order order;
    Copies copies;
};

struct Block {
    u32 x, y, z;
};

enum class Failure : u32 { None = 0, Deadlock = 1, SharedBounds = 2, ThreadLeft = 3, Misaligned = 4, Misuse = 5, Unfinished = 6 };

struct Copy {
    u32 to;
    const void* from;
    bool valid;
};

// A warp's meeting place: inputs by lane, results by lane.
struct Warp {
    u32 arrived = 0;
    u32 generation = 0;
    u32 in[WARP][8];
    float sums[WARP][4];
    u64 values[WARP];
    u32 out[WARP][4];
};

// A barrier in shared memory: arrivals of a phase, those that are missing of this one, and bytes announced that have yet
// to come.
struct Barrier {
    u32 arrivals;
    i32 missing;
    long long bytes;
    u32 phase;
};

// A bulk copy under way: runs of bytes, zeros where they come from nowhere.
struct BulkCopy {
    struct Row {
        u32 to;
        const u8* from;
        u32 bytes;
    };
    u32 barrier, bytes;
    std::vector<Row> rows;
};

// What operands of a warpgroup's product are.
enum class Element : u32 { Bf16, F16, E4m3, S8 };

// A product that a warpgroup has issued.
struct Product {
    Element kind;
    u32 n;
    bool a_shared, b_by_columns;
    u64 a_descriptor, b;
    u32 a[WARPGROUP][4];
    void* sums[WARPGROUP];
};

// A warpgroup's meeting place, and its products by groups: the last group is still open.
struct Warpgroup {
    u32 arrived = 0;
    u32 generation = 0;
    bool fenced[WARPGROUP] = {false};
    Product next;
    std::vector<std::vector<Product>> groups{1};
};

struct Meeting {
    u32 arrived, generation;
};

// The block that this thread of the host is running.
struct State {
    Schedule schedule;
    Block block;
    u32 threads, live, current;
    u32 barrier_arrived, barrier_generation;
    u64 idle_switches;
    Failure failure;
    u8* shared;
    u32 shared_bytes;
    std::vector<Warp> warps;
    std::vector<Fiber> fibers;
    std::vector<u8> done;
    // Threads that have given way and not been let on since: what they wait for has not come that anybody knows of.
    std::vector<u8> waiting;
    std::vector<std::vector<std::vector<Copy>>> copies;
    std::vector<Warpgroup> warpgroups;
    std::map<u32, Barrier> barriers;
    std::vector<BulkCopy> bulk_copies;
    Meeting meetings[16];
    Fiber host;
    const Kernel* kernel;
    const void* args;
};

inline thread_local State state;

void leave_block(Failure failure);
void switch_to(u32 fiber);

// The fiber whose turn is next among the `count` that begin with `first`.
DEV u32 beside(u32 fiber, u32 first, u32 count) {
    u32 step = state.schedule.order == Order::LastFirst ? count - 1 : 1;
    return first + (fiber - first + step) % count;
}

// What `count` threads from `first` on wait for has come.
DEV void let_on(u32 first, u32 count) {
    for (u32 i = first; i < first + count; i++) state.waiting[i] = 0;
}

// A lane of the same warp that can go on, or this thread.
DEV u32 lane_that_can() {
    State& s = state;
    u32 next = s.current;
    for (u32 i = 1; i < WARP; i++) {
        next = beside(next, s.current / WARP * WARP, WARP);
        if (!s.done[next] && !s.waiting[next]) return next;
    }
    return s.current;
}

// Lets another fiber run. Fibers only wait for one another, so a round in which nobody arrives anywhere is the end.
DEV void give_way(bool within_warp) {
    State& s = state;
    if (++s.idle_switches > 8ull * s.threads + 64) leave_block(s.live < s.threads ? Failure::ThreadLeft : Failure::Deadlock);
    u32 me = s.current;
    bool by_warps = s.schedule.order != Order::LockStep;
    s.waiting[me] = 1;
    // A warp is left when none of its lanes can go on.
    u32 next = by_warps && !within_warp ? lane_that_can() : me;
    if (next == me) do {
        bool stay = within_warp && by_warps;
        next = stay ? beside(next, next / WARP * WARP, WARP) : beside(next, 0, s.threads);
        if (next == s.current) leave_block(Failure::ThreadLeft);
    } while (s.done[next]);
    switch_to(next);
    s.waiting[me] = 0;
}

// The last lane to arrive performs `operation` for the whole warp.
template <class Operation> DEV void meet(Operation operation) {
    State& s = state;
    Warp& warp = s.warps[s.current / WARP];
    u32 generation = warp.generation;
    s.idle_switches = 0;
    if (++warp.arrived == WARP) {
        operation(warp);
        let_on(s.current / WARP * WARP, WARP);
        warp.arrived = 0;
        warp.generation++;
    } else {
        while (warp.generation == generation) give_way(true);
    }
}

DEV u8* shared_range(u32 address, u32 bytes) {
    if ((u64)address + bytes > state.shared_bytes) leave_block(Failure::SharedBounds);
    return state.shared + address;
}

DEV void aligned(const void* place, u32 bytes) {
    if ((uintptr_t)place % bytes != 0) leave_block(Failure::Misaligned);
}
DEV void aligned16(const void* place) { aligned(place, 16); }

DEV void perform(const Copy& copy) {
    u8* to = shared_range(copy.to, 16);
    aligned16(to);
    if (copy.valid) aligned16(copy.from);
    if (copy.valid) memcpy(to, copy.from, 16);
    else memset(to, 0, 16);
}

DEV float bf16(u32 bits) {
    u32 wide = (bits & 0xffff) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

template <class T> DEV T exchange(T value, u32 from) {
    u32 me = state.current % WARP;
    Warp& warp = state.warps[state.current / WARP];
    u64 raw = 0;
    memcpy(&raw, &value, sizeof(T));
    warp.values[me] = raw;
    meet([](Warp&) {});
    T result;
    memcpy(&result, &warp.values[from % WARP], sizeof(T));
    // Nobody may overwrite a value that another lane has yet to read.
    meet([](Warp&) {});
    return result;
}

template <bool TRANSPOSED> DEV void load_matrices(u32 (&to)[4], u32 address) {
    u32 me = state.current % WARP;
    Warp& warp = state.warps[state.current / WARP];
    warp.in[me][0] = address;
    meet([](Warp& w) {
        for (u32 matrix = 0; matrix < 4; matrix++)
            for (u32 row = 0; row < 8; row++) {
                u16 elements[8];
                const u8* from = shared_range(w.in[8 * matrix + row][0], 16);
                aligned16(from);
                memcpy(elements, from, 16);
                for (u32 column = 0; column < 8; column++) {
                    u32 r = TRANSPOSED ? column : row, c = TRANSPOSED ? row : column;
                    memcpy((u8*)&w.out[r * 4 + c / 2][matrix] + 2 * (c % 2), &elements[column], 2);
                }
            }
    });
    memcpy(to, warp.out[me], 16);
    meet([](Warp&) {});
}

}  // namespace simt

DEV u32 thread() { return simt::state.current; }
DEV u32 lane() { return simt::state.current % WARP; }
DEV u32 warp() { return simt::state.current / WARP; }
DEV u32 block_x() { return simt::state.block.x; }
DEV u32 block_y() { return simt::state.block.y; }
DEV u32 block_z() { return simt::state.block.z; }

DEV void sync_block() {
    simt::State& s = simt::state;
    u32 generation = s.barrier_generation;
    s.idle_switches = 0;
    if (++s.barrier_arrived == s.threads) {
        simt::let_on(0, s.threads);
        s.barrier_arrived = 0;
        s.barrier_generation++;
    } else {
        while (s.barrier_generation == generation) simt::give_way(false);
    }
}
DEV void sync_warp() { simt::meet([](simt::Warp&) {}); }

DEV u8* shared() { return simt::state.shared; }
DEV u32 shared_address(const void* place) { return (u32)((const u8*)place - simt::state.shared); }

DEV void copy_async16(u32 to, const void* from, bool valid) {
    simt::Copy copy{to, from, valid};
    if (simt::state.schedule.copies == simt::Copies::Eager) simt::perform(copy);
    else simt::state.copies[simt::state.current].back().push_back(copy);
}
DEV void copy_commit() { simt::state.copies[simt::state.current].emplace_back(); }
template <int PENDING> DEV void copy_wait() {
    auto& groups = simt::state.copies[simt::state.current];
    while ((int)groups.size() - 1 > PENDING) {
        for (const simt::Copy& copy : groups.front()) simt::perform(copy);
        groups.erase(groups.begin());
    }
}

DEV void load_matrices(u32 (&to)[4], u32 address) { simt::load_matrices<false>(to, address); }
DEV void load_matrices_transposed(u32 (&to)[4], u32 address) { simt::load_matrices<true>(to, address); }

namespace simt {

DEV float f16(u32 bits) {
    u16 low = (u16)bits;
    _Float16 half;
    memcpy(&half, &low, 2);
    return (float)half;
}

// d[16x8] += a[16xK] * b[Kx8] of a warp, elements of 32 / PER bits: register r of a lane's A has row
// lane / 4 + 8 (r & 1) and k PER (lane % 4).. + 4 PER (r >> 1), register r of its B column lane / 4 and the same k.
template <u32 PER, class Sum, class Decode>
DEV void multiply(Sum (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Decode element) {
    constexpr u32 K = 8 * PER;
    u32 me = state.current % WARP;
    Warp& warp = state.warps[state.current / WARP];
    memcpy(warp.in[me], a, 16);
    warp.in[me][4] = b0;
    warp.in[me][5] = b1;
    memcpy(warp.sums[me], d, 16);
    meet([element](Warp& w) {
        Sum left[16][K], right[K][8];
        for (u32 l = 0; l < WARP; l++) {
            u32 g = l / 4, k = PER * (l % 4);
            for (u32 i = 0; i < PER; i++) {
                for (u32 r = 0; r < 4; r++)
                    left[g + 8 * (r & 1)][k + i + 4 * PER * (r >> 1)] = element(w.in[l][r] >> (32 / PER * i));
                for (u32 r = 0; r < 2; r++) right[k + i + 4 * PER * r][g] = element(w.in[l][4 + r] >> (32 / PER * i));
            }
        }
        Sum sums[16][8];
        for (u32 i = 0; i < 16; i++) {
            Sum row[8] = {0};
            for (u32 k = 0; k < K; k++)
                for (u32 j = 0; j < 8; j++) row[j] += left[i][k] * right[k][j];
            memcpy(sums[i], row, sizeof row);
        }
        for (u32 l = 0; l < WARP; l++) {
            Sum old[4];
            memcpy(old, w.sums[l], 16);
            for (u32 r = 0; r < 4; r++) old[r] += sums[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)];
            memcpy(w.sums[l], old, 16);
        }
    });
    // A lane reads only its own place: no second meeting.
    memcpy(d, warp.sums[me], 16);
}

}  // namespace simt

DEV void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    simt::multiply<2>(d, a, b0, b1, [](u32 bits) { return simt::bf16(bits); });
}
DEV void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    simt::multiply<2>(d, a, b0, b1, [](u32 bits) { return simt::f16(bits); });
}
DEV void mma_s8(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    // Unsigned sums wrap.
    u32 sums[4];
    memcpy(sums, d, 16);
    simt::multiply<4>(sums, a, b0, b1, [](u32 bits) { return (u32)(i32)(signed char)bits; });
    memcpy(d, sums, 16);
}

DEV float shuffle_xor(float value, u32 mask) { return simt::exchange(value, lane() ^ mask); }
DEV double shuffle_xor(double value, u32 mask) { return simt::exchange(value, lane() ^ mask); }
DEV u32 shuffle_xor(u32 value, u32 mask) { return simt::exchange(value, lane() ^ mask); }
DEV float shuffle(float value, u32 from) { return simt::exchange(value, from); }
DEV u32 shuffle(u32 value, u32 from) { return simt::exchange(value, from); }
DEV bool every_lane(bool so) {
    u32 all = so;
    for (u32 mask = 1; mask < WARP; mask *= 2) all &= shuffle_xor(all, mask);
    return all != 0;
}

struct Quad { u32 x, y, z, w; };
DEV Quad load16(const void* from) {
    simt::aligned16(from);
    Quad quad;
    memcpy(&quad, from, 16);
    return quad;
}
struct Pair { float x, y; };
DEV Pair load8(const float* from) {
    simt::aligned(from, 8);
    return Pair{from[0], from[1]};
}
DEV void store8(float* to, Pair value) {
    simt::aligned(to, 8);
    to[0] = value.x;
    to[1] = value.y;
}
DEV void store16(void* to, Quad value) {
    simt::aligned16(to);
    memcpy(to, &value, 16);
}

DEV float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEV double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
DEV float root(float x) { return std::sqrt(x); }
DEV float nearest(float x) { return std::nearbyintf(x); }
DEV float magnitude(float x) { return std::fabs(x); }
DEV float maximum(float a, float b) { return a != a ? a : b != b ? b : a < b ? b : a; }

DEV u32 bits_of(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
DEV float float_of(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
DEV u64 bits_of(double x) { u64 bits; memcpy(&bits, &x, 8); return bits; }
DEV double double_of(u64 bits) { double x; memcpy(&x, &bits, 8); return x; }

namespace simt {
DEV u32 round_bf16(float x) {
    u32 bits = bits_of(x);
    // The hardware's canonical NaN.
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
}  // namespace simt

DEV u32 multiply_bf16(u32 a, u32 b) {
    return simt::round_bf16(simt::bf16(a) * simt::bf16(b)) | simt::round_bf16(simt::bf16(a >> 16) * simt::bf16(b >> 16)) << 16;
}
DEV u32 subtract_bf16(u32 a, u32 b) {
    return simt::round_bf16(simt::bf16(a) - simt::bf16(b)) | simt::round_bf16(simt::bf16(a >> 16) - simt::bf16(b >> 16)) << 16;
}
DEV u32 pick_bytes(u32 low, u32 high, u32 selector) {
    u64 bytes = (u64)high << 32 | low;
    u32 picked = 0;
    // Bit 3 of a name spreads a sign on the device: nobody may ask for it.
    if (selector & 0x8888) simt::leave_block(simt::Failure::Misuse);
    for (u32 i = 0; i < 4; i++) picked |= (u32)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return picked;
}

DEV u32 pack_bf16(float low, float high) { return simt::round_bf16(low) | simt::round_bf16(high) << 16; }
DEV float f16_to_f32(u16 bits) { _Float16 half; memcpy(&half, &bits, 2); return (float)half; }
DEV u16 f32_to_f16(float value) { _Float16 half = (_Float16)value; u16 bits; memcpy(&bits, &half, 2); return bits; }
DEV u32 pack_f16(float low, float high) { return (u32)f32_to_f16(low) | (u32)f32_to_f16(high) << 16; }
