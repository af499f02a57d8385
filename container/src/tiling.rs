//! Where the code of (row, k) lies: the bijection between a matrix and its tiles.
//!
//! A tile is 64 output rows by 64 k. Tiles of one row of tiles are contiguous, so any range of row tiles is one
//! range of bytes. Inside a tile, codes lie in the fragment order of operand A of `mma.m16n8k16` (and of wgmma with
//! A from registers), 16 bytes a lane, so that one load feeds complete fragments:
//!
//! * 4-bit codes: four atoms of 16 rows x 64 k, 512 bytes each; a lane's word `s` covers k `16s..16s+16`;
//! * 8-bit codes: eight atoms of 16 x 32, 512 bytes each;
//! * 16- and 32-bit codes: sixteen atoms of 16 x 16, a lane's four registers of two k each.
//!
//! Rows and k beyond the matrix are padded with zero bits. Knows widths, not what a code means.

use std::sync::OnceLock;

use crate::fragments::{self, PackedRows};

/// Rows, and k, of one tile.
pub const TILE: usize = 64;

const TILE_CODES: usize = TILE * TILE;

/// Geometry of one tiled matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    n: usize,
    k: usize,
    bits: usize,
}

impl Tiling {
    /// Tiling of an `n` x `k` matrix of codes of `bits` bits.
    ///
    /// # Panics
    /// If `bits` is none of 4, 8, 16 and 32.
    pub fn new(n: usize, k: usize, bits: usize) -> Tiling {
        assert!(matches!(bits, 4 | 8 | 16 | 32), "no tile holds codes of {bits} bits");
        Tiling { n, k, bits }
    }

    /// Output rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs, the reduction axis.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bits of one code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// Tiles along the rows.
    pub fn row_tiles(&self) -> usize {
        self.n.div_ceil(TILE)
    }

    /// Tiles along k.
    pub fn k_tiles(&self) -> usize {
        self.k.div_ceil(TILE)
    }

    /// Bytes of one tile.
    pub fn tile_bytes(&self) -> usize {
        TILE_CODES * self.bits / 8
    }

    /// Bytes of one row of tiles.
    pub fn row_tile_bytes(&self) -> usize {
        self.k_tiles() * self.tile_bytes()
    }

    /// Bytes of the whole matrix.
    pub fn bytes(&self) -> usize {
        self.row_tiles() * self.row_tile_bytes()
    }

    /// Index of the code of (`row`, `k`), counted in codes from the start of the tiles.
    pub fn slot(&self, row: usize, k: usize) -> usize {
        let tile = (row / TILE) * self.k_tiles() + k / TILE;
        tile * TILE_CODES + usize::from(order(self.bits).slot[(row % TILE) * TILE + k % TILE])
    }

    /// Row and k (padding included) of the code at `slot`: the inverse of [`Tiling::slot`].
    pub fn place(&self, slot: usize) -> (usize, usize) {
        let (tile, inner) = (slot / TILE_CODES, slot % TILE_CODES);
        let place = usize::from(order(self.bits).place[inner]);
        ((tile / self.k_tiles()) * TILE + place / TILE, (tile % self.k_tiles()) * TILE + place % TILE)
    }

    /// For each slot of a tile its `row * 64 + k` inside the tile: what a decoder walks along.
    pub fn tile_places(&self) -> &'static [u16] {
        &order(self.bits).place
    }

    /// Tiles a row-major matrix of codes: one byte a code for 4 and 8 bits, little-endian 2 or 4 bytes for the others.
    ///
    /// # Panics
    /// If `codes` is not `n * k` codes long.
    pub fn tile(&self, codes: &[u8]) -> Vec<u8> {
        let mut tiles = vec![0; self.bytes()];
        let rows = self.row_tile_bytes();
        for (row_tile, out) in tiles.chunks_exact_mut(rows.max(1)).enumerate() {
            self.tile_rows(codes, row_tile, out);
        }
        tiles
    }

    /// Tiles one row of tiles of a row-major matrix, in the form of [`Tiling::tile`], into `out` of
    /// [`Tiling::row_tile_bytes`] bytes, all of which are written.
    ///
    /// # Panics
    /// If `codes` or `out` have the wrong length.
    pub fn tile_rows(&self, codes: &[u8], row_tile: usize, out: &mut [u8]) {
        let width = self.bits.div_ceil(8);
        assert_eq!(codes.len(), self.n * self.k * width, "codes of a {} x {} matrix", self.n, self.k);
        let rows = row_tile * TILE..self.n.min((row_tile + 1) * TILE);
        let codes = &codes[rows.start * self.k * width..rows.end * self.k * width];
        if self.bits == 4 {
            let length = self.k.div_ceil(2);
            let mut packed = vec![0; rows.len() * length];
            for (codes, packed) in codes.chunks(self.k.max(1)).zip(packed.chunks_mut(length.max(1))) {
                fragments::pack_nibbles(codes, packed);
            }
            self.tile_packed_rows(&packed, length, out);
        } else {
            self.tile_packed_rows(codes, self.k * width, out);
        }
    }

    /// Tiles at most 64 rows, one row of tiles, whose codes are packed: [`Tiling::bits`] bits each, one after the other,
    /// 4-bit codes with the even k in the low half of a byte. Row `i` begins at `rows[i * stride]`; what comes after its
    /// `k` codes is left out. All of `out`, [`Tiling::row_tile_bytes`] bytes, is written.
    ///
    /// # Panics
    /// If `stride` is shorter than a row, or `rows` or `out` have the wrong length.
    pub fn tile_packed_rows(&self, rows: &[u8], stride: usize, out: &mut [u8]) {
        let length = (self.k * self.bits).div_ceil(8);
        assert!(stride >= length && rows.len() <= TILE * stride, "at most {TILE} rows of {length} bytes");
        assert!(stride == 0 || rows.len().is_multiple_of(stride), "whole rows");
        assert_eq!(out.len(), self.row_tile_bytes());
        fragments::tile(self, PackedRows { bytes: rows, stride, length }, out);
    }

    /// The inverse of [`Tiling::tile`].
    ///
    /// # Panics
    /// If `tiles` is not [`Tiling::bytes`] long.
    pub fn untile(&self, tiles: &[u8]) -> Vec<u8> {
        assert_eq!(tiles.len(), self.bytes());
        let width = self.bits.div_ceil(8);
        let mut codes = Vec::with_capacity(self.n * self.k * width);
        let slots = &order(self.bits).slot;
        for row in 0..self.n {
            let band = &tiles[(row / TILE) * self.row_tile_bytes()..][..self.row_tile_bytes()];
            let slots = &slots[(row % TILE) * TILE..][..TILE];
            for k in 0..self.k {
                let tile = &band[(k / TILE) * self.tile_bytes()..];
                let slot = usize::from(slots[k % TILE]);
                if self.bits == 4 {
                    codes.push((tile[slot / 2] >> (4 * (slot & 1))) & 15);
                } else {
                    codes.extend_from_slice(&tile[slot * width..(slot + 1) * width]);
                }
            }
        }
        codes
    }
}

/// Order of codes inside one tile, both ways.
struct Order {
    /// `row * 64 + k` to slot.
    slot: Vec<u16>,
    /// Slot to `row * 64 + k`.
    place: Vec<u16>,
}

fn order(bits: usize) -> &'static Order {
    static ORDERS: [OnceLock<Order>; 3] = [OnceLock::new(), OnceLock::new(), OnceLock::new()];
    let (index, slot_of): (usize, fn(usize, usize) -> usize) = match bits {
        4 => (0, slot4),
        8 => (1, slot8),
        _ => (2, slot16),
    };
    ORDERS[index].get_or_init(|| {
        let mut order = Order { slot: vec![0; TILE_CODES], place: vec![0; TILE_CODES] };
        for place in 0..TILE_CODES {
            let slot = slot_of(place / TILE, place % TILE);
            order.slot[place] = slot as u16;
            order.place[slot] = place as u16;
        }
        order
    })
}

/// Lane of a fragment that holds (row, k): eight rows of four lanes, two neighbouring k each.
const fn lane(row: usize, k: usize) -> usize {
    (row % 8) * 4 + (k % 8) / 2
}

/// Register of a fragment: rows 0..8 and 8..16, then k 0..8 and 8..16.
const fn register(row: usize, k: usize) -> usize {
    (row % 16) / 8 + 2 * ((k % 16) / 8)
}

/// Nibbles: atom of 16 x 64; word `k / 16` of a lane; nibbles `r` and `r + 4` are a pair of k.
fn slot4(row: usize, k: usize) -> usize {
    (row / 16) * 1024 + lane(row, k) * 32 + (k / 16) * 8 + register(row, k) + 4 * (k & 1)
}

/// Bytes: atom of 16 x 32; a lane's four words are two k16 slices of two k8 halves.
fn slot8(row: usize, k: usize) -> usize {
    let word = 2 * ((k % 32) / 16) + (k % 16) / 8;
    ((row / 16) * 2 + k / 32) * 512 + lane(row, k) * 16 + word * 4 + (row % 16) / 8 + 2 * (k & 1)
}

/// 16- and 32-bit codes: atom of 16 x 16; a lane's registers hold two neighbouring k.
fn slot16(row: usize, k: usize) -> usize {
    ((row / 16) * 4 + k / 16) * 256 + lane(row, k) * 8 + register(row, k) * 2 + (k & 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Fragment of `mma.m16n8k16`, operand A (PTX ISA, "Matrix Fragments for mma.m16n8k16"): row and column of
    /// element `half` of register `register` in lane `lane`.
    fn fragment(lane: usize, register: usize, half: usize) -> (usize, usize) {
        (lane / 4 + 8 * (register & 1), 2 * (lane % 4) + half + 8 * (register / 2))
    }

    #[test]
    fn sixteen_bytes_of_a_lane_are_whole_fragments() {
        for atom in 0..4 {
            for lane in 0..32 {
                for register in 0..4 {
                    for half in 0..2 {
                        let (row, k) = fragment(lane, register, half);
                        for slice in 0..4 {
                            let (row, k) = (16 * atom + row, 16 * slice + k);
                            // A nibble of word `slice`, a byte of word pair `slice % 2`, a half of register `register`.
                            let nibble = atom * 1024 + lane * 32 + slice * 8 + register + 4 * half;
                            assert_eq!(slot4(row, k), nibble);
                            let byte = (atom * 2 + slice / 2) * 512
                                + lane * 16
                                + (2 * (slice % 2) + register / 2) * 4
                                + (register & 1)
                                + 2 * half;
                            assert_eq!(slot8(row, k), byte);
                            let word = (atom * 4 + slice) * 256 + lane * 8 + register * 2 + half;
                            assert_eq!(slot16(row, k), word);
                        }
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn slots_are_a_bijection(n in 1..150_usize, k in 1..200_usize, bits in prop::sample::select(vec![4, 8, 16, 32])) {
            let tiling = Tiling::new(n, k, bits);
            let codes = tiling.bytes() * 8 / bits;
            let mut seen = vec![false; codes];
            for row in 0..n {
                for k in 0..k {
                    let slot = tiling.slot(row, k);
                    prop_assert!(!std::mem::replace(&mut seen[slot], true));
                    prop_assert_eq!(tiling.place(slot), (row, k));
                }
            }
        }

        #[test]
        fn untile_undoes_tile(n in 1..150_usize, k in 1..200_usize, bits in prop::sample::select(vec![4, 8, 16, 32]), seed: u64) {
            let tiling = Tiling::new(n, k, bits);
            let mut state = seed;
            let codes: Vec<u8> = (0..n * k * bits.div_ceil(8)).map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let byte = (state >> 56) as u8;
                if bits == 4 { byte & 15 } else { byte }
            }).collect();
            let tiles = tiling.tile(&codes);
            prop_assert_eq!(tiles.len(), tiling.bytes());
            prop_assert_eq!(tiling.untile(&tiles), codes);
        }
    }
}
