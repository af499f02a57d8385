// What both kernels of causal attention know: the pieces of work, and which keys a query sees.
#pragma once
#include "numbers.cuh"

namespace attention {

// Keys of one tile; tiles begin at the window's first row.
const u32 KEYS = 64;

// A run of queries of one window, for every head.
struct Item {
    // First row of the window, and its rows.
    u32 start, length;
    // Position of the first query.
    u32 first;
    // Positions of the window whose queries are there: from `begin` on, before `end`. Runs begin at multiples of their
    // length whatever is there, so that a query has the same company in every case.
    u32 begin, end;
    // Row of queries and of output of position `begin`.
    u32 row;
};

DEV bool is_there(const Item& item, u32 position) { return position >= item.begin && position < item.end; }

// Row of queries and of output of a position that is there.
DEV u64 row_of(const Item& item, u32 position) { return (u64)item.row + (position - item.begin); }

// First of the keys that `position` sees when each position sees the last `window`, itself included.
DEV u32 first_seen(u32 position, u32 window) { return position + 1 > window ? position + 1 - window : 0; }

// Tiles of keys that any of the queries [first, last] sees: from `begin` on, before `end`.
struct Tiles {
    u32 begin, end;
};

DEV Tiles tiles_seen(u32 first, u32 last, u32 window) {
    return Tiles{first_seen(first, window) / KEYS, last / KEYS + 1};
}

}  // namespace attention
