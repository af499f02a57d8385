// Which experts a token goes to and with what weight: softmax in f64 and the largest logits, in the order of operations
// of kernels/src/route.rs. A warp a token.
#include "numbers.cuh"

#define ROUTE_THREADS 256

struct RouteArgs {
    // f32 [tokens, experts].
    const float* logits;
    // [tokens, top_k], the largest logit first.
    u32* ids;
    float* weights;
    u64 tokens;
    u32 experts;
    u32 top_k;
    u32 renormalize;
};

// A number that is larger for what is chosen earlier: the larger logit in the total order of f32, then the lower
// index. No logit gives 0.
DEV u64 route_key(float logit, u32 expert) {
    u32 bits = bits_of(logit);
    u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)ordered << 32 | (0xffffffffu - expert);
}
DEV u32 route_expert(u64 key) { return 0xffffffffu - (u32)key; }
DEV float route_logit(u64 key) {
    u32 ordered = (u32)(key >> 32);
    return float_of(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// e^(logit - largest).
DEV double route_power(float logit, float largest) { return exp_double((double)(logit - largest)); }

// The largest of all lanes.
DEV u64 route_most(u64 key) {
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
        u32 high = shuffle_xor((u32)(key >> 32), mask), low = shuffle_xor((u32)key, mask);
        key = most(key, (u64)high << 32 | low);
    }
    return key;
}

// Sum of all powers in the order of experts, the same in every lane.
DEV double route_total(const float* logits, u32 experts, float largest) {
    double total = 0.0;
    for (u32 start = 0; start < experts; start += WARP) {
        u32 expert = start + lane();
        u64 power = bits_of(expert < experts ? route_power(logits[expert], largest) : 0.0);
        u32 count = least(experts - start, (u32)WARP);
        for (u32 i = 0; i < count; i++)
            total += double_of((u64)shuffle((u32)(power >> 32), i) << 32 | shuffle((u32)power, i));
    }
    return total;
}

KERNEL(route, RouteArgs, ROUTE_THREADS, 0) {
    u64 token = (u64)block_x() * (ROUTE_THREADS / WARP) + warp();
    if (token >= args.tokens) return;
    const float* logits = args.logits + token * args.experts;
    u32* ids = args.ids + token * args.top_k;
    float largest = float_of(0xff800000u);
    for (u32 expert = lane(); expert < args.experts; expert += WARP) largest = most(largest, logits[expert]);
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) largest = most(largest, shuffle_xor(largest, mask));
    double chosen = 0.0;
    u64 before = ~0ull;
    for (u32 rank = 0; rank < args.top_k; rank++) {
        u64 best = 0;
        for (u32 expert = lane(); expert < args.experts; expert += WARP) {
            u64 key = route_key(logits[expert], expert);
            if (key < before) best = most(best, key);
        }
        before = route_most(best);
        chosen += route_power(route_logit(before), largest);
        // Each lane keeps the ranks that it writes weights of below.
        if (lane() == rank % WARP) ids[rank] = route_expert(before);
    }
    double divisor = args.renormalize ? chosen : route_total(logits, args.experts, largest);
    for (u32 rank = lane(); rank < args.top_k; rank += WARP)
        args.weights[token * args.top_k + rank] = (float)(route_power(logits[ids[rank]], largest) / divisor);
}

struct ExponentialArgs {
    const double* x;
    double* out;
    u64 count;
};

// e^x, so that tests can compare its bits alone: the weights above have fewer.
KERNEL(exponentials, ExponentialArgs, ROUTE_THREADS, 0) {
    u64 i = (u64)block_x() * ROUTE_THREADS + thread();
    if (i < args.count) args.out[i] = exp_double(args.x[i]);
}
