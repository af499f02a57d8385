// What hopper.cuh's names mean on a CPU: barriers in shared memory, bulk copies and products of a warpgroup.
//
// Copies and products happen when they are issued or at the last wait for them, by the schedule, in all four pairings:
// a stage that is given back before the products that read it are done shows where copies are early and products late.
// What is an error here,
// because hardware would hang or be silent: a barrier that nobody made, or at which too many arrive; addresses that are
// not aligned; products without the fence before them; copies and products that nobody waits for before the block ends.
#pragma once

#include "simt.h"

#define KERNEL_HOPPER(name, Arguments, THREADS, SHARED)                                                               \
    static_assert((SHARED) <= HOPPER_SHARED_LIMIT, #name " takes more shared memory than there is");                  \
    static void name##_body(const Arguments& args);                                                                   \
    static void name##_call(const void* args) { name##_body(*(const Arguments*)args); }                               \
    static const simt::Registration name##_registration{{#name, name##_call, (THREADS), (SHARED), sizeof(Arguments)}}; \
    static void name##_body(const Arguments& args)

namespace simt {

DEV void misuse() { leave_block(Failure::Misuse); }

DEV Barrier& barrier_at(u32 address) {
    auto found = state.barriers.find(address);
    if (found == state.barriers.end()) misuse();
    return found->second;
}

// Ends the phase where everything has come.
DEV void barrier_moved(Barrier& barrier) {
    state.idle_switches = 0;
    if (barrier.missing < 0) misuse();
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.phase++;
    barrier.missing = barrier.arrivals;
}

DEV void perform(const BulkCopy& copy) {
    for (const BulkCopy::Row& row : copy.rows) {
        u8* to = shared_range(row.to, row.bytes);
        if (row.from) memcpy(to, row.from, row.bytes);
        else memset(to, 0, row.bytes);
    }
    Barrier& barrier = barrier_at(copy.barrier);
    barrier.bytes -= copy.bytes;
    barrier_moved(barrier);
}

DEV void begin(BulkCopy copy) {
    state.idle_switches = 0;
    barrier_at(copy.barrier);
    if (state.schedule.copies == Copies::Eager) perform(copy);
    else state.bulk_copies.push_back(copy);
}

// Copies that bring what a barrier waits for.
DEV void perform_copies_for(u32 barrier) {
    auto& copies = state.bulk_copies;
    for (size_t i = 0; i < copies.size();) {
        if (copies[i].barrier != barrier) {
            i++;
            continue;
        }
        BulkCopy copy = copies[i];
        copies.erase(copies.begin() + (long)i);
        perform(copy);
    }
}

// As meet(), of a warpgroup.
template <class Operation> DEV void meet_group(Operation operation) {
    State& s = state;
    Warpgroup& group = s.warpgroups[s.current / WARPGROUP];
    u32 generation = group.generation;
    s.idle_switches = 0;
    if (++group.arrived == WARPGROUP) {
        operation(group);
        let_on(s.current / WARPGROUP * WARPGROUP, WARPGROUP);
        group.arrived = 0;
        group.generation++;
    } else {
        while (group.generation == generation) give_way(false);
    }
}

// Byte address of element (row, column) of an operand that a descriptor tells of. Rows run along k.
DEV u32 element_by_rows(u64 descriptor, u32 row, u32 column_byte) {
    u32 base = (u32)(descriptor & 0x3fff) << 4, stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
    u32 address = base + row / 8 * stride + row % 8 * 128 + column_byte;
    return address ^ (address >> 7 & 7) << 4;
}
// The same where a row is one k, and columns come in boxes of 64.
DEV u32 element_by_columns(u64 descriptor, u32 k, u32 column) {
    u32 base = (u32)(descriptor & 0x3fff) << 4, boxes = (u32)(descriptor >> 16 & 0x3fff) << 4;
    u32 stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
    u32 address = base + column / 64 * boxes + k / 8 * stride + k % 8 * 128 + column % 64 * 2;
    return address ^ (address >> 7 & 7) << 4;
}

DEV float e4m3(u32 code) {
    float value;
    u32 bits = (code & 0x80) << 24 | (code & 0x7f) << 20;
    memcpy(&value, &bits, 4);
    return (code & 0x7f) == 0x7f ? NAN : value * 0x1p120f;
}

DEV u32 bytes_of(Element kind) { return kind == Element::Bf16 || kind == Element::F16 ? 2 : 1; }

// Element of an operand, as a float, which holds all of its kinds.
DEV float element(Element kind, const u8* from) {
    u16 half = 0;
    if (bytes_of(kind) == 2) memcpy(&half, from, 2);
    return kind == Element::Bf16 ? bf16(half) : kind == Element::F16 ? f16(half) : kind == Element::S8 ? (float)(int8_t)*from : e4m3(*from);
}

DEV void perform(const Product& product) {
    const u32 SIZE = bytes_of(product.kind), K = 32 / SIZE, N = product.n;
    static thread_local float left[64][32], right[32][256];
    for (u32 row = 0; row < 64; row++)
        for (u32 k = 0; k < K; k++) {
            if (product.a_shared) {
                left[row][k] = element(product.kind, shared_range(element_by_rows(product.a_descriptor, row, k * SIZE), SIZE));
                continue;
            }
            // A register holds 4 bytes along k; registers 0 and 1 are rows g and g + 8 of the first half of k.
            u32 byte = k * SIZE, lane = row % 8 * 4 + byte % 16 / 4, r = row % 16 / 8 + byte / 16 * 2;
            left[row][k] = element(product.kind, (const u8*)&product.a[row / 16 * 32 + lane][r] + byte % 4);
        }
    for (u32 k = 0; k < K; k++)
        for (u32 n = 0; n < N; n++) {
            u32 at = product.b_by_columns ? element_by_columns(product.b, k, n) : element_by_rows(product.b, n, k * SIZE);
            right[k][n] = element(product.kind, shared_range(at, SIZE));
        }
    for (u32 row = 0; row < 64; row++) {
        float sums[256] = {0};
        i32 whole[256] = {0};
        for (u32 k = 0; k < K; k++)
            for (u32 n = 0; n < N; n++) {
                if (product.kind == Element::S8) whole[n] += (i32)left[row][k] * (i32)right[k][n];
                else sums[n] += left[row][k] * right[k][n];
            }
        for (u32 n = 0; n < N; n++) {
            u32 thread = row / 16 * 32 + row % 8 * 4 + n % 8 / 2, at = n / 8 * 4 + row % 16 / 8 * 2 + n % 2;
            if (product.kind == Element::S8) ((i32*)product.sums[thread])[at] += whole[n];
            else ((float*)product.sums[thread])[at] += sums[n];
        }
    }
}

DEV bool products_are_late() {
    bool late = state.schedule.copies == Copies::Lazy;
    return state.schedule.order == Order::LastFirst ? !late : late;
}

// All threads of a warpgroup issue one product.
template <class Sum> DEV void issue(Element kind, u32 n, Sum* sums, const u32* a, u64 a_descriptor, u64 b, bool by_columns) {
    u32 me = state.current % WARPGROUP;
    Warpgroup& group = state.warpgroups[state.current / WARPGROUP];
    Product& next = group.next;
    if (!group.fenced[me]) misuse();
    // Descriptors are of the whole warpgroup.
    if (group.arrived > 0 && (next.b != b || next.a_descriptor != a_descriptor)) misuse();
    next.kind = kind;
    next.n = n;
    next.a_shared = a == nullptr;
    next.a_descriptor = a_descriptor;
    next.b = b;
    next.b_by_columns = by_columns;
    next.sums[me] = sums;
    if (a) memcpy(next.a[me], a, 16);
    meet_group([](Warpgroup& g) {
        if (products_are_late()) g.groups.back().push_back(g.next);
        else perform(g.next);
    });
}

}  // namespace simt

DEV void barrier_init(u32 barrier, u32 arrivals) {
    if (barrier % 8 != 0 || arrivals == 0) simt::misuse();
    simt::shared_range(barrier, 8);
    simt::state.barriers[barrier] = simt::Barrier{arrivals, (i32)arrivals, 0, 0};
}
DEV void barrier_init_done() {}
DEV void barrier_arrive(u32 barrier) {
    simt::Barrier& b = simt::barrier_at(barrier);
    b.missing--;
    simt::barrier_moved(b);
}
DEV void barrier_expect(u32 barrier, u32 bytes) {
    simt::Barrier& b = simt::barrier_at(barrier);
    b.bytes += bytes;
    b.missing--;
    simt::barrier_moved(b);
}
DEV void barrier_wait(u32 barrier, u32 parity) {
    simt::Barrier& b = simt::barrier_at(barrier);
    while ((b.phase & 1) == parity) {
        // Nothing but copies is missing: now they have to have come.
        if (b.missing == 0) simt::perform_copies_for(barrier);
        if ((b.phase & 1) == parity) simt::give_way(false);
    }
}

DEV void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    if (to % 16 != 0 || bytes % 16 != 0) simt::misuse();
    simt::aligned16(from);
    simt::begin(simt::BulkCopy{barrier, bytes, {{to, (const u8*)from, bytes}}});
}

// The emulated device writes into a map: address, rows, columns, bytes of a row, rows of a box, bytes of an element.
DEV void copy_tensor(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier) {
    const u8* from = (const u8*)map.words[0];
    u64 rows = map.words[1], columns = map.words[2], row_bytes = map.words[3], box_rows = map.words[4], size = map.words[5];
    if (to % 1024 != 0 || (u64)column * size % 16 != 0) simt::misuse();
    simt::BulkCopy copy{barrier, (u32)box_rows * 128, {}};
    for (u32 r = 0; r < box_rows; r++)
        for (u32 chunk = 0; chunk < 8; chunk++) {
            u32 place = to + r * 128 + (chunk ^ r % 8) * 16;
            u64 first = (u64)column * size + chunk * 16, end = columns * size;
            u32 there = row + r >= rows || first >= end ? 0 : (u32)(end - first < 16 ? end - first : 16);
            if (there > 0) copy.rows.push_back({place, from + (u64)(row + r) * row_bytes + first, there});
            if (there < 16) copy.rows.push_back({place + there, nullptr, 16 - there});
        }
    simt::begin(copy);
}

DEV void async_proxy_fence() {}

DEV void sync_named(u32 id, u32 threads) {
    simt::State& s = simt::state;
    if (id == 0 || id >= 16 || threads % WARP != 0) simt::misuse();
    simt::Meeting& meeting = s.meetings[id];
    u32 generation = meeting.generation;
    s.idle_switches = 0;
    if (++meeting.arrived == threads) {
        // More than those who met may be let on: they look again.
        simt::let_on(0, s.threads);
        meeting.arrived = 0;
        meeting.generation++;
    } else {
        while (meeting.generation == generation) simt::give_way(false);
    }
}

template <u32 COUNT> DEV void registers_more() { static_assert(COUNT % 8 == 0 && COUNT <= 256, "registers"); }
template <u32 COUNT> DEV void registers_less() { static_assert(COUNT % 8 == 0 && COUNT >= 24, "registers"); }

DEV void wgmma_fence() { simt::state.warpgroups[thread() / WARPGROUP].fenced[thread() % WARPGROUP] = true; }
DEV void wgmma_commit() {
    simt::state.warpgroups[thread() / WARPGROUP].fenced[thread() % WARPGROUP] = false;
    simt::meet_group([](simt::Warpgroup& group) { group.groups.emplace_back(); });
}
template <int PENDING> DEV void wgmma_wait() {
    simt::meet_group([](simt::Warpgroup& group) {
        while ((int)group.groups.size() - 1 > PENDING) {
            for (const simt::Product& product : group.groups.front()) simt::perform(product);
            group.groups.erase(group.groups.begin());
        }
    });
}
template <u32 COUNT> DEV void wgmma_sums(float (&)[COUNT]) {}
template <u32 COUNT> DEV void wgmma_sums(i32 (&)[COUNT]) {}
template <u32 COUNT> DEV void wgmma_operands(u32 (&)[COUNT][4]) {}

template <u32 N> DEV void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], u64 b) {
    simt::issue(simt::Element::Bf16, N, d, a, 0, b, false);
}
template <u32 N> DEV void wgmma_bf16_columns(float (&d)[N / 2], const u32 (&a)[4], u64 b) {
    simt::issue(simt::Element::Bf16, N, d, a, 0, b, true);
}
template <u32 N> DEV void wgmma_bf16_shared(float (&d)[N / 2], u64 a, u64 b) {
    simt::issue(simt::Element::Bf16, N, d, nullptr, a, b, false);
}
template <u32 N> DEV void wgmma_f16(float (&d)[N / 2], const u32 (&a)[4], u64 b) {
    simt::issue(simt::Element::F16, N, d, a, 0, b, false);
}
template <u32 N> DEV void wgmma_e4m3(float (&d)[N / 2], const u32 (&a)[4], u64 b) {
    simt::issue(simt::Element::E4m3, N, d, a, 0, b, false);
}
template <u32 N> DEV void wgmma_s8(i32 (&d)[N / 2], const u32 (&a)[4], u64 b) {
    simt::issue(simt::Element::S8, N, d, a, 0, b, false);
}
