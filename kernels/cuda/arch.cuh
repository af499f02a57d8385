// The names that kernels are written in: the only file that knows whether it is read by a CUDA compiler or, for the
// emulation on a CPU, by a C++ compiler. Kernels use these names and plain arithmetic, nothing else: no threadIdx, no
// asm, no atomics, no headers, no library functions but those named here.
//
// Arithmetic is IEEE and never contracted (--fmad=false, -ffp-contract=off): a fused multiply-add is written fused().
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

// Threads of a warp, and of a warpgroup (hopper.cuh).
#define WARP 32
#define WARPGROUP 128

// Shared memory that a block may have on every target: sm_86, sm_89 and sm_120 give 99 KiB.
#define SHARED_LIMIT (99 * 1024)

#ifdef __CUDACC__

#define DEV __device__ __forceinline__
#define UNROLL _Pragma("unroll")
// Where unrolling would cost more registers than there are.
#define ROLL _Pragma("unroll 1")

// A kernel: name, type of its one argument, threads of a block, bytes of dynamic shared memory. The launcher reads the
// last two from `<name>_launch`, so that they are stated once. One block a multiprocessor is enough: left alone the
// compiler saves registers that nobody needs and spills others.
#define KERNEL(name, Arguments, THREADS, SHARED)                                                                      \
    static_assert((SHARED) <= SHARED_LIMIT, #name " takes more shared memory than every target has");                 \
    extern "C" __device__ unsigned int name##_launch[2] = {(THREADS), (SHARED)};                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ Arguments args)

DEV u32 thread() { return threadIdx.x; }
DEV u32 lane() { return threadIdx.x % WARP; }
DEV u32 warp() { return threadIdx.x / WARP; }
DEV u32 block_x() { return blockIdx.x; }
DEV u32 block_y() { return blockIdx.y; }
DEV u32 block_z() { return blockIdx.z; }

// All threads of the block.
DEV void sync_block() { __syncthreads(); }
// All lanes of the warp.
DEV void sync_warp() { __syncwarp(); }

// Dynamic shared memory of the block, and the 32-bit address of a place in it.
DEV u8* shared() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    return dynamic_shared;
}
DEV u32 shared_address(const void* place) { return (u32)__cvta_generic_to_shared(place); }

// What reads or writes shared memory by its address says so ("memory"): plain loads and stores may not move across it.

// 16 bytes from global to shared memory, asynchronously; zeros where not `valid`.
DEV void copy_async16(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
// Closes the group of copies that this thread has begun.
DEV void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most PENDING groups of this thread are under way.
template <int PENDING> DEV void copy_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory"); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEV void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
// The same, each matrix transposed.
DEV void load_matrices_transposed(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

// d[16x8] += a[16x16] * b[16x8], bf16 operands, f32 sums.
DEV void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with f16 operands.
DEV void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d[16x8] += a[16x32] * b[32x8], signed bytes, sums in 32 bits that wrap.
DEV void mma_s8(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two bf16 numbers in a register, each half by itself, rounded once; subnormal numbers are kept. A fused multiply-add,
// which is all that sm_80 has: with -0 added to a product, and times -1 for a difference, it is just that.
DEV u32 multiply_bf16(u32 a, u32 b) {
    u32 product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}
DEV u32 subtract_bf16(u32 a, u32 b) {
    u32 difference;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(difference) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return difference;
}

// Four of the eight bytes of `low` and `high`, each named by 4 bits of `selector`: 0 to 3 in `low`, 4 to 7 in `high`.
DEV u32 pick_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }

// Values of other lanes of the warp.
DEV float shuffle_xor(float value, u32 mask) { return __shfl_xor_sync(~0u, value, mask); }
DEV double shuffle_xor(double value, u32 mask) { return __shfl_xor_sync(~0u, value, mask); }
DEV u32 shuffle_xor(u32 value, u32 mask) { return __shfl_xor_sync(~0u, value, mask); }
DEV float shuffle(float value, u32 from) { return __shfl_sync(~0u, value, from); }
DEV u32 shuffle(u32 value, u32 from) { return __shfl_sync(~0u, value, from); }
// Whether it is so for all lanes of the warp.
DEV bool every_lane(bool so) { return __all_sync(~0u, so); }

struct Quad { u32 x, y, z, w; };
// 16 bytes that no kernel writes while this one runs.
DEV Quad load16(const void* from) {
    uint4 v = __ldg((const uint4*)from);
    return Quad{v.x, v.y, v.z, v.w};
}
// Two floats, aligned to 8 bytes.
struct Pair { float x, y; };
DEV Pair load8(const float* from) {
    float2 v = __ldg((const float2*)from);
    return Pair{v.x, v.y};
}
DEV void store8(float* to, Pair value) { *(float2*)to = make_float2(value.x, value.y); }
// 16 bytes to an aligned place in global or shared memory.
DEV void store16(void* to, Quad value) { *(uint4*)to = make_uint4(value.x, value.y, value.z, value.w); }

// Fused multiply-add, one rounding.
DEV float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEV double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
// Correctly rounded square root; nearest integer, ties to even; magnitude.
DEV float root(float x) { return __fsqrt_rn(x); }
DEV float nearest(float x) { return rintf(x); }
DEV float magnitude(float x) { return fabsf(x); }
// The larger of two; NaN where one is NaN. One instruction, unlike most().
DEV float maximum(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
}

DEV u32 bits_of(float x) { return __float_as_uint(x); }
DEV float float_of(u32 bits) { return __uint_as_float(bits); }
DEV u64 bits_of(double x) { return (u64)__double_as_longlong(x); }
DEV double double_of(u64 bits) { return __longlong_as_double((long long)bits); }

// Nearest bf16 numbers, ties to even: `low` in the low half.
DEV u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
// IEEE half precision, ties to even.
DEV float f16_to_f32(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(value) : "h"(bits));
    return value;
}
DEV u16 f32_to_f16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(bits) : "f"(value));
    return bits;
}
// The same for two numbers, `low` in the low half.
DEV u32 pack_f16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

#else
#include "emulation/simt.h"
#endif

// A bf16 number is the upper half of an f32.
DEV float bf16_to_f32(u16 bits) { return float_of((u32)bits << 16); }

template <class T> DEV T least(T a, T b) { return b < a ? b : a; }
template <class T> DEV T most(T a, T b) { return a < b ? b : a; }
