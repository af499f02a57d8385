//! From the tiles of a container to rows of codes. Moves bits; knows no code's worth.
#![expect(unsafe_code, reason = "vector loads and stores take pointers")]

use ctq_container::TILE;

use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;

/// Codes of a tile.
const CODES: usize = TILE * TILE;

/// Codes of at most 4 bits of one tile, [64 rows][64 k], a byte each. `places`: as of [`Tiling::tile_places`].
///
/// [`Tiling::tile_places`]: ctq_container::Tiling::tile_places
pub(super) fn nibbles(isa: Isa, tile: &[u8], places: &[u16], out: &mut [u8; CODES]) {
    assert!(tile.len() == CODES / 2 && places.len() == CODES);
    untile_nibbles(isa, tile, places, out);
}

/// Codes of 8 bits of one tile, [64 rows][64 k].
pub(super) fn octets(isa: Isa, tile: &[u8], places: &[u16], out: &mut [u8; CODES]) {
    assert!(tile.len() == CODES && places.len() == CODES);
    untile_octets(isa, tile, places, out);
}

/// Pairs of 16-bit codes of one tile, [64 rows][32], the even k in the low half.
pub(super) fn pairs(isa: Isa, tile: &[u8], places: &[u16], out: &mut [u32; CODES / 2]) {
    assert!(tile.len() == 2 * CODES && places.len() == CODES);
    untile_pairs(isa, tile, places, out);
}

for_each_isa! {
    /// [`nibbles`], checked.
    fn untile_nibbles(tile: &[u8], places: &[u16], out: &mut [u8; CODES]) {
        avx512bf16: nibbles_in_vectors, avx512: nibbles_in_vectors, avx2: nibbles_by_place, portable: nibbles_by_place,
    }
}

for_each_isa! {
    /// [`octets`], checked.
    fn untile_octets(tile: &[u8], places: &[u16], out: &mut [u8; CODES]) {
        avx512bf16: octets_in_vectors, avx512: octets_in_vectors, avx2: octets_by_place, portable: octets_by_place,
    }
}

for_each_isa! {
    /// [`pairs`], checked.
    fn untile_pairs(tile: &[u8], places: &[u16], out: &mut [u32; CODES / 2]) {
        avx512bf16: pairs_in_vectors, avx512: pairs_in_vectors, avx2: pairs_by_place, portable: pairs_by_place,
    }
}

#[inline(always)]
fn nibbles_by_place(tile: &[u8], places: &[u16], out: &mut [u8; CODES]) {
    for (byte, places) in tile.iter().zip(places.as_chunks::<2>().0) {
        out[usize::from(places[0])] = byte & 15;
        out[usize::from(places[1])] = byte >> 4;
    }
}

#[inline(always)]
fn octets_by_place(tile: &[u8], places: &[u16], out: &mut [u8; CODES]) {
    for (byte, place) in tile.iter().zip(places) {
        out[usize::from(*place)] = *byte;
    }
}

#[inline(always)]
fn pairs_by_place(tile: &[u8], places: &[u16], out: &mut [u32; CODES / 2]) {
    out.fill(0);
    for (code, place) in tile.as_chunks::<2>().0.iter().zip(places) {
        let place = usize::from(*place);
        out[place / 2] |= u32::from(u16::from_le_bytes(*code)) << (16 * (place % 2));
    }
}

/// Lane of quarter `q` and word `w` of a lane's sixteen bytes, in a vector of the four lanes of one row.
#[cfg(target_arch = "x86_64")]
const fn lane(q: usize, w: usize) -> i32 {
    (q * 4 + w) as i32
}

/// Sixteen words are the four lanes of one row (and of the row 8 below): word `s` of lane `q` has k `16 s + 2 q` and
/// `16 s + 8 + 2 q` of both (`tiling::slot4`).
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn nibbles_in_vectors(tile: &[u8], _: &[u16], out: &mut [u8; CODES]) {
    use std::arch::x86_64::*;
    /// Pair of k `j` from the vectors of the lower and the upper k8 of each k16.
    const fn order(first_slice: usize) -> [i32; 16] {
        let mut order = [0; 16];
        let mut j = 0;
        while j < 16 {
            order[j] = lane(j % 4, first_slice + j / 8) + 16 * ((j / 4) % 2) as i32;
            j += 1;
        }
        order
    }
    const LOW: [i32; 16] = order(0);
    const HIGH: [i32; 16] = order(2);
    // SAFETY: 32 vectors of 64 bytes are the tile; 64 rows of 64 bytes are `out`. The caller has AVX-512.
    unsafe {
        let (low, high) = (_mm512_loadu_si512(LOW.as_ptr().cast()), _mm512_loadu_si512(HIGH.as_ptr().cast()));
        let mask = _mm512_set1_epi32(0x000f_000f);
        for vector in 0..32 {
            let words = _mm512_loadu_si512(tile.as_ptr().add(64 * vector).cast());
            let row = vector / 8 * 16 + vector % 8;
            let upper = _mm512_srli_epi32::<4>(words);
            for (words, row) in [(words, row), (upper, row + 8)] {
                let near = _mm512_and_si512(words, mask);
                let far = _mm512_and_si512(_mm512_srli_epi32::<8>(words), mask);
                for (order, k) in [(low, 0), (high, 32)] {
                    let codes = _mm512_permutex2var_epi32(near, order, far);
                    let to = out.as_mut_ptr().add(row * TILE + k);
                    _mm256_storeu_si256(to.cast(), _mm512_cvtepi16_epi8(codes));
                }
            }
        }
    }
}

/// As [`nibbles_in_vectors`]; word `2 s + h` of lane `q` has k `16 s + 8 h + 2 q` of two rows (`tiling::slot8`).
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn octets_in_vectors(tile: &[u8], _: &[u16], out: &mut [u8; CODES]) {
    use std::arch::x86_64::*;
    const ORDER: [i32; 16] = {
        let mut order = [0; 16];
        let mut j = 0;
        while j < 16 {
            order[j] = lane(j % 4, j / 4);
            j += 1;
        }
        order
    };
    // SAFETY: 64 vectors of 64 bytes are the tile; 64 rows of 64 bytes are `out`. The caller has AVX-512.
    unsafe {
        let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
        let mask = _mm512_set1_epi32(0x00ff_00ff);
        for vector in 0..64 {
            let words = _mm512_loadu_si512(tile.as_ptr().add(64 * vector).cast());
            let (atom, k, row) = (vector / 16, vector / 8 % 2 * 32, vector % 8);
            let upper = _mm512_srli_epi32::<8>(words);
            for (words, row) in [(words, 16 * atom + row), (upper, 16 * atom + row + 8)] {
                let codes = _mm512_permutexvar_epi32(order, _mm512_and_si512(words, mask));
                let to = out.as_mut_ptr().add(row * TILE + k);
                _mm256_storeu_si256(to.cast(), _mm512_cvtepi16_epi8(codes));
            }
        }
    }
}

/// As [`nibbles_in_vectors`]; word `b + 2 h` of lane `q` is the pair at k `8 h + 2 q` of row `8 b` (`tiling::slot16`).
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn pairs_in_vectors(tile: &[u8], _: &[u16], out: &mut [u32; CODES / 2]) {
    use std::arch::x86_64::*;
    const ORDER: [i32; 16] = {
        let mut order = [0; 16];
        let mut j = 0;
        while j < 16 {
            order[j] = lane(j % 4, j / 8 + 2 * (j / 4 % 2));
            j += 1;
        }
        order
    };
    // SAFETY: 128 vectors of 64 bytes are the tile; 64 rows of 32 words are `out`. The caller has AVX-512.
    unsafe {
        let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
        for vector in 0..128 {
            let words = _mm512_loadu_si512(tile.as_ptr().add(64 * vector).cast());
            let words = _mm512_permutexvar_epi32(order, words);
            let (atom, slice, row) = (vector / 32, vector / 8 % 4, vector % 8);
            let to = out.as_mut_ptr().add((16 * atom + row) * (TILE / 2) + 8 * slice);
            _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(words));
            let below = to.add(8 * (TILE / 2));
            _mm256_storeu_si256(below.cast(), _mm512_extracti64x4_epi64::<1>(words));
        }
    }
}

#[cfg(test)]
mod tests {
    use ctq_container::Tiling;

    use super::*;

    /// Codes that tell their place apart.
    fn code(row: usize, k: usize) -> u32 {
        ((row * 64 + k) as u32).wrapping_mul(0x9e37_79b1) >> 7
    }

    fn tile(bits: usize) -> Vec<u8> {
        let codes = (0..TILE).flat_map(|row| (0..TILE).map(move |k| code(row, k)));
        let codes: Vec<u8> = match bits {
            4 => codes.map(|code| code as u8 & 15).collect(),
            8 => codes.map(|code| code as u8).collect(),
            _ => codes.flat_map(|code| (code as u16).to_le_bytes()).collect(),
        };
        Tiling::new(TILE, TILE, bits).tile(&codes)
    }

    #[test]
    fn every_code_of_a_tile_is_found_in_its_row() {
        let places = |bits| Tiling::new(TILE, TILE, bits).tile_places();
        for isa in Isa::here() {
            let mut bytes = [0; CODES];
            nibbles(isa, &tile(4), places(4), &mut bytes);
            assert!((0..CODES).all(|at| bytes[at] == code(at / 64, at % 64) as u8 & 15), "4 bits, {isa:?}");
            octets(isa, &tile(8), places(8), &mut bytes);
            assert!((0..CODES).all(|at| bytes[at] == code(at / 64, at % 64) as u8), "8 bits, {isa:?}");
            let mut words = [0; CODES / 2];
            pairs(isa, &tile(16), places(16), &mut words);
            let pair = |at: usize| [0, 1].map(|odd| code(at / 32, 2 * (at % 32) + odd) & 0xffff);
            assert!(
                (0..CODES / 2).all(|at| words[at] == pair(at)[0] | pair(at)[1] << 16),
                "16 bits, {isa:?}"
            );
        }
    }
}
