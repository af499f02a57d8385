//! Bugs in attention on Hopper's warpgroups: what a ring of tiles, its barriers and asynchronous products let one forget.

use ctq_kernels::check::Area;

use super::Bug;

const FILE: &str = "attention_hopper.cu";

const fn bug(what: &'static str, line: &'static str, planted: &'static str) -> Bug {
    Bug { what, area: Area::Attention, file: FILE, line, planted }
}

pub(super) const BUGS: &[Bug] = &[
    bug(
        "a parity that stays when a ring goes around",
        "    place.stage = 0;\n    place.parity ^= 1;",
        "    place.stage = 0;",
    ),
    bug(
        "a tile brought to where another is in use",
        "    barrier_wait(barrier_free<D>(ring, place.stage), place.parity ^ 1);\n",
        "",
    ),
    bug(
        "fewer bytes announced than come",
        "barrier_expect(there, Rings<D>::TILE_BYTES);",
        "barrier_expect(there, Rings<D>::TILE_BYTES - 128);",
    ),
    bug(
        "a barrier that a warp is not counted for",
        "(Ring)ring, stage), GROUPS * WARPGROUP / WARP);",
        "(Ring)ring, stage), GROUPS * WARPGROUP / WARP - 1);",
    ),
    bug(
        "values used before they are there",
        "        await_tile<D>(Ring::Values, place);\n        begin_mix",
        "        begin_mix",
    ),
    bug("scores used before they are there", "        wgmma_wait<1>();\n", "        wgmma_wait<2>();\n"),
    bug(
        "sums rescaled while products are added to them",
        "        // All of them before the wait.\n        wgmma_sums((float(&)[KEYS / 2])scores);\n        wgmma_wait<0>();\n",
        "        wgmma_wait<1>();\n",
    ),
    bug("sums over values that are not rescaled", "        rescale(rows.sums, shrink);\n", ""),
    bug(
        "the second box of values taken for nearer than it is",
        "matrix_columns(values, Rings<D>::BOX_BYTES)",
        "matrix_columns(values, Rings<D>::BOX_BYTES / 2)",
    ),
    bug("rows behind a window packed with it", "row < there && column", "column"),
    bug(
        "a warpgroup that takes the tiles of all",
        "            mix_tiles(rows, args, mine, place);",
        "            mix_tiles(rows, args, all, place);",
    ),
    Bug {
        what: "eight rows of values taken for twice as far apart",
        area: Area::Attention,
        file: "hopper.cuh",
        line: "(u64)(box_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32",
        planted: "(u64)(box_bytes >> 4) << 16 | (u64)(2048 >> 4) << 32",
    },
];
