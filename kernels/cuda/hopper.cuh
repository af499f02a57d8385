// The names of what Hopper (sm_90a) alone has: bulk copies that end at a barrier in shared memory, and products of
// matrices by 128 threads, a warpgroup, from shared memory. A file that uses them puts its kernels between `#if HOPPER`
// and `#endif`; for other targets it holds none.
#pragma once
#include "arch.cuh"

// What sm_90a lets a block have.
#define HOPPER_SHARED_LIMIT (227 * 1024)

// Describes a matrix in global memory to copy_tensor: made by the driver, an argument of the kernel, or inside it.
struct alignas(64) TensorMap { u64 words[16]; };

#ifdef __CUDACC__

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER 1
#else
#define HOPPER 0
#endif

#if HOPPER

// As KERNEL.
#define KERNEL_HOPPER(name, Arguments, THREADS, SHARED)                                                               \
    static_assert((SHARED) <= HOPPER_SHARED_LIMIT, #name " takes more shared memory than there is");                  \
    extern "C" __device__ unsigned int name##_launch[2] = {(THREADS), (SHARED)};                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ Arguments args)

// A barrier is 8 bytes of shared memory. A phase of it is over when as many threads have arrived as it was made for and
// all bytes that were announced are there. Phases have parity 0, 1, 0, ...; the phase before the first counts as over
// and has parity 1. One thread makes it; all threads meet after barrier_init_done().
DEV void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Shows barriers to the copy engine.
DEV void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
DEV void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// Arrives, and announces bytes that copies will bring.
DEV void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until a phase of this parity is over.
DEV void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@over bra done;\n"
        "bra again;\n"
        "done:\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// Begins to copy bytes, a multiple of 16 between places aligned to 16. They count for the barrier.
DEV void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier) : "memory");
}
// Begins to copy a box of a mapped matrix whose first element is (row, column): as many rows as the map says by 128
// bytes, zeros beyond the matrix. Chunk c of 16 bytes of row r comes to lie at chunk c ^ r % 8 of row r. `to` is a
// multiple of 1024. The whole box counts for the barrier, zeros included.
DEV void copy_tensor(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n"
                 ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
// What this thread has written to shared memory is there for products and copies that begin after the next barrier.
DEV void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Meeting `id` (1 to 15) of `threads` threads, whole warps of the block.
DEV void sync_named(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory"); }

// Registers of each thread of this warpgroup from here on, a multiple of 8; all its threads together.
template <u32 COUNT> DEV void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT)); }
template <u32 COUNT> DEV void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT)); }

// Before the first product, and whenever registers that products read or write were written.
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
// Closes the group of products that this warpgroup has begun.
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Waits until at most PENDING groups of this warpgroup are under way.
template <int PENDING> DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory"); }
// After a wait: sums that products have written. What is computed from them may not move before it.
template <u32 COUNT> DEV void wgmma_sums(float (&sums)[COUNT]) {
    UNROLL
    for (u32 i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}
template <u32 COUNT> DEV void wgmma_sums(i32 (&sums)[COUNT]) {
    UNROLL
    for (u32 i = 0; i < COUNT; i++) asm volatile("" : "+r"(sums[i])::"memory");
}
// Before the fence: operands in registers. What makes them may not move behind it.
template <u32 COUNT> DEV void wgmma_operands(u32 (&a)[COUNT][4]) {
    UNROLL
    for (u32 i = 0; i < 4 * COUNT; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Names of registers, 16 at a time, and the variables behind them.
#define NAMES_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_1 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_2 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES_3 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_4 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define NAMES_5 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES_6 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define NAMES_7 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define NAMES_32 NAMES_0
#define NAMES_64 NAMES_0 "," NAMES_1
#define NAMES_96 NAMES_64 "," NAMES_2
#define NAMES_128 NAMES_96 "," NAMES_3
#define NAMES_192 NAMES_128 "," NAMES_4 "," NAMES_5
#define NAMES_256 NAMES_192 "," NAMES_6 "," NAMES_7
#define REGISTERS_8(C, d, i)                                                                                           \
    C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7])
#define REGISTERS_16(C, d, i) REGISTERS_8(C, d, i), REGISTERS_8(C, d, i + 8)
#define REGISTERS_32(C, d) REGISTERS_16(C, d, 0)
#define REGISTERS_64(C, d) REGISTERS_32(C, d), REGISTERS_16(C, d, 16)
#define REGISTERS_96(C, d) REGISTERS_64(C, d), REGISTERS_16(C, d, 32)
#define REGISTERS_128(C, d) REGISTERS_96(C, d), REGISTERS_16(C, d, 48)
#define REGISTERS_192(C, d) REGISTERS_128(C, d), REGISTERS_16(C, d, 64), REGISTERS_16(C, d, 80)
#define REGISTERS_256(C, d) REGISTERS_192(C, d), REGISTERS_16(C, d, 96), REGISTERS_16(C, d, 112)
// What follows the sums: operand A in registers and B by its descriptor, or both by descriptors.
#define NAMES_AB_32 "{%16,%17,%18,%19},%20"
#define NAMES_AB_64 "{%32,%33,%34,%35},%36"
#define NAMES_AB_96 "{%48,%49,%50,%51},%52"
#define NAMES_AB_128 "{%64,%65,%66,%67},%68"
#define NAMES_AB_192 "{%96,%97,%98,%99},%100"
#define NAMES_AB_256 "{%128,%129,%130,%131},%132"
#define NAMES_SHARED_32 "%16,%17"
#define NAMES_SHARED_64 "%32,%33"
#define NAMES_SHARED_96 "%48,%49"
#define NAMES_SHARED_128 "%64,%65"
#define NAMES_SHARED_192 "%96,%97"
#define NAMES_SHARED_256 "%128,%129"

// d[64 x N] += a[64 x K] * b[K x N], asynchronously, in groups. Of the sums a thread has d[4 j + 2 h + e]: row
// 16 * (its warp in the warpgroup) + lane / 4 + 8 h, column 8 j + 2 (lane % 4) + e. Of an operand A in registers it has
// what mma_bf16 takes of its warp's 16 rows.
template <u32 N> DEV void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], u64 b);
template <u32 N> DEV void wgmma_bf16_columns(float (&d)[N / 2], const u32 (&a)[4], u64 b);
template <u32 N> DEV void wgmma_bf16_shared(float (&d)[N / 2], u64 a, u64 b);
template <u32 N> DEV void wgmma_f16(float (&d)[N / 2], const u32 (&a)[4], u64 b);
template <u32 N> DEV void wgmma_e4m3(float (&d)[N / 2], const u32 (&a)[4], u64 b);
template <u32 N> DEV void wgmma_s8(i32 (&d)[N / 2], const u32 (&a)[4], u64 b);

#define WGMMA_REGISTERS(NAME, N, TYPE, CONSTRAINT, INSTRUCTION, FLAGS)                                                 \
    template <> DEV void NAME<N>(TYPE(&d)[N / 2], const u32(&a)[4], u64 b) {                                           \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N INSTRUCTION " {" NAMES_##N "}," NAMES_AB_##N FLAGS ";\n"   \
                     : REGISTERS_##N(CONSTRAINT, d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));             \
    }
#define WGMMA_SHARED(N)                                                                                                \
    template <> DEV void wgmma_bf16_shared<N>(float (&d)[N / 2], u64 a, u64 b) {                                       \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES_##N "}," NAMES_SHARED_##N      \
                     ",1,1,1,0,0;\n" : REGISTERS_##N("+f", d) : "l"(a), "l"(b));                                       \
    }
// Flags: add to the sums; signs of a and b; whether b lies by columns.
#define WGMMA(N)                                                                                                       \
    WGMMA_REGISTERS(wgmma_bf16, N, float, "+f", "k16.f32.bf16.bf16", ",1,1,1,0")                                       \
    WGMMA_REGISTERS(wgmma_bf16_columns, N, float, "+f", "k16.f32.bf16.bf16", ",1,1,1,1")                               \
    WGMMA_REGISTERS(wgmma_f16, N, float, "+f", "k16.f32.f16.f16", ",1,1,1,0")                                         \
    WGMMA_REGISTERS(wgmma_e4m3, N, float, "+f", "k32.f32.e4m3.e4m3", ",1,1,1")                                         \
    WGMMA_REGISTERS(wgmma_s8, N, i32, "+r", "k32.s32.s8.s8", ",1")                                                     \
    WGMMA_SHARED(N)
WGMMA(32)
WGMMA(64)
WGMMA(96)
WGMMA(128)
WGMMA(192)
WGMMA(256)

#endif  // HOPPER

#else
#define HOPPER 1
#include "emulation/hopper.h"
#endif

#if HOPPER

// Descriptors of operands in shared memory, as copy_tensor leaves them; `address` is a multiple of 1024, plus whole
// steps of k. PTX ISA, "Shared memory matrix layout" and "Matrix descriptor": 128-byte swizzle, offsets in units of 16
// bytes.
//
// Rows of 128 bytes along k: 8 rows are 1024 bytes. A step of k is 32 bytes further on.
DEV u64 matrix_rows(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// Rows along N, one a k: boxes of 64 columns, `box_bytes` apart; 8 k are 1024 bytes. A step of 16 k is 2048 bytes
// further on.
DEV u64 matrix_columns(u32 address, u32 box_bytes) {
    return (u64)(address >> 4 & 0x3fff) | (u64)(box_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// The operand so many bytes further on, with less arithmetic than a new descriptor: shared memory ends below 2^18, so
// nothing is carried out of the address.
DEV u64 matrix_after(u64 matrix, u32 bytes) { return matrix >> 32 << 32 | ((u32)matrix + (bytes >> 4)); }

#endif
