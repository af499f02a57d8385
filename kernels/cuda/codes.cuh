// In which order codes of activations that are bytes, integers or fp8, lie in memory: 16 k of a row side by side in 16
// bytes, so that a lane's part of operand B is one word. Knows no values.
#pragma once
#include "arch.cuh"

// The byte of `k` in its row: of sixteen, k 0 8 1 9 2 10 3 11 and so on. A lane takes four neighbouring bytes of operand
// B, and its words of a tile of weights are k 2t, 2t + 8, 2t + 1, 2t + 9 of operand A (t = lane % 4). Sums of
// a step do not mind their order, so that both sides may have k in this one.
DEV u32 code_slot(u32 k) { return k / 16 * 16 + k % 8 * 2 + k % 16 / 8; }
