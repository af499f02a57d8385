// The emulation's engine: fibers, one block at a time on each thread of the host, and the C interface that the launcher
// in Rust calls. Kernels register themselves.
#include "../arch.cuh"

#include <cstdlib>

namespace simt {
namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr u32 MAX_THREADS = 1024;

struct Stacks {
    u8* bytes = (u8*)aligned_alloc(4096, STACK_BYTES * MAX_THREADS);
    ~Stacks() { free(bytes); }
};
thread_local Stacks stacks;

// First function of every fiber.
void fiber() {
    State& s = state;
    s.kernel->call(s.args);
    s.done[s.current] = 1;
    s.live--;
    s.idle_switches = 0;
    Fiber nobody;
    if (s.live == 0) change(nobody, s.host);
    u32 next = s.current;
    do next = beside(next, 0, s.threads);
    while (s.done[next]);
    s.current = next;
    change(nobody, s.fibers[next]);
    abort();
}

}  // namespace

void switch_to(u32 next) {
    State& s = state;
    u32 me = s.current;
    s.current = next;
    change(s.fibers[me], s.fibers[next]);
}

// Ends the block: the host goes on, no fiber ever runs again.
void leave_block(Failure failure) {
    state.failure = failure;
    Fiber nobody;
    change(nobody, state.host);
    abort();
}

}  // namespace simt

extern "C" {

// The kernel of a name, or null.
const simt::Kernel* ctq_kernel(const char* name) {
    for (const simt::Kernel& kernel : simt::kernels())
        if (strcmp(kernel.name, name) == 0) return &kernel;
    return nullptr;
}

// Runs one block; returns a simt::Failure.
u32 ctq_run_block(const simt::Kernel* kernel, const void* args, u32 x, u32 y, u32 z, u32 order, u32 copies) {
    using namespace simt;
    static thread_local std::vector<u8> memory;
    State& s = state;
    s.schedule = Schedule{(Order)order, (Copies)copies};
    s.block = Block{x, y, z};
    s.threads = s.live = kernel->threads;
    s.current = s.schedule.order == Order::LastFirst ? s.threads - 1 : 0;
    s.barrier_arrived = 0;
    s.idle_switches = 0;
    s.failure = Failure::None;
    s.shared_bytes = kernel->shared_bytes;
    memory.assign(kernel->shared_bytes + 1024, 0xff);
    s.shared = (u8*)(((uintptr_t)memory.data() + 1023) & ~(uintptr_t)1023);
    s.warps.assign((s.threads + WARP - 1) / WARP, Warp{});
    s.fibers.assign(s.threads, Fiber{});
    s.done.assign(s.threads, 0);
    // Whole warps, however many threads there are.
    s.waiting.assign((s.threads + WARP - 1) / WARP * WARP, 0);
    s.copies.assign(s.threads, std::vector<std::vector<Copy>>(1));
    s.warpgroups.assign(s.threads / WARPGROUP, Warpgroup{});
    s.barriers.clear();
    s.bulk_copies.clear();
    for (Meeting& meeting : s.meetings) meeting = Meeting{0, 0};
    s.kernel = kernel;
    s.args = args;
    for (u32 i = 0; i < s.threads; i++) prepare(s.fibers[i], stacks.bytes + STACK_BYTES * i, STACK_BYTES, fiber);
    change(s.host, s.fibers[s.current]);
    // What is under way when a block ends would come to whatever has its shared memory next.
    bool whole = s.bulk_copies.empty();
    for (const Warpgroup& group : s.warpgroups) whole = whole && group.groups.size() == 1 && group.groups[0].empty();
    if (s.failure == Failure::None && !whole) s.failure = Failure::Unfinished;
    return (u32)s.failure;
}

}  // extern "C"
