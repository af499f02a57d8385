//! Rows of packed codes into the fragment order of one row of tiles, by words. The same order as the place table of
//! [`Tiling`], which the tests hold it against; knows no code's worth.
//!
//! A lane's words hold codes of two rows, `r` and `r + 8` of an atom. The four lanes of a row are neighbours, so a
//! strip of both rows becomes one run of bytes: 32 bytes of each row become 64, whether they are codes of 4, 8 or 16
//! bits; 64 become 128 for those of 32.

use crate::Tiling;
use crate::sixteen::Sixteen;
use crate::tiling::TILE;

/// Bytes of a row that go to one run, for codes of up to 16 bits.
const STRIP: usize = 32;

/// Rows packed in memory: row `i` begins at `bytes[i * stride]`.
#[derive(Clone, Copy)]
pub(crate) struct PackedRows<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) stride: usize,
    /// Bytes of a row that hold codes, the last of them perhaps half.
    pub(crate) length: usize,
}

impl<'a> PackedRows<'a> {
    /// `None` beyond the matrix.
    fn row(&self, index: usize) -> Option<&'a [u8]> {
        self.bytes.get(index * self.stride..)?.get(..self.length)
    }
}

/// Writes all of `out`, one row of tiles; what has no code is zero.
pub(crate) fn tile(tiling: &Tiling, rows: PackedRows<'_>, out: &mut [u8]) {
    match tiling.bits() {
        4 => tile_by(tiling, rows, out, nibbles),
        8 => tile_by(tiling, rows, out, octets),
        16 => tile_by(tiling, rows, out, pairs),
        _ => tile_by(tiling, rows, out, quads),
    }
}

fn tile_by<const IN: usize, const OUT: usize>(
    tiling: &Tiling,
    rows: PackedRows<'_>,
    out: &mut [u8],
    run: impl Fn(&[u8; IN], &[u8; IN]) -> [u8; OUT],
) {
    // A tile has four atoms of rows, each `strips` along k, each eight runs of bytes.
    let strips = TILE * tiling.bits() / 8 / IN;
    // Of those that all rows have whole.
    let whole = tiling.k() * tiling.bits() / 8 / IN;
    let zeros = vec![0; rows.length];
    for pair in 0..TILE / 2 {
        let (atom, row) = (pair / 8, pair % 8);
        let (first, second) = (rows.row(16 * atom + row), rows.row(16 * atom + row + 8));
        let (first, second) = (first.unwrap_or(&zeros), second.unwrap_or(&zeros));
        let (first, first_rest) = first.split_at(whole * IN);
        let (second, second_rest) = second.split_at(whole * IN);
        let place = |strip: usize| {
            let run = ((strip / strips * 4 + atom) * strips + strip % strips) * 8 + row;
            run * OUT..(run + 1) * OUT
        };
        let strips_of_both = first.as_chunks::<IN>().0.iter().zip(second.as_chunks::<IN>().0);
        for (strip, (first, second)) in strips_of_both.enumerate() {
            out[place(strip)].copy_from_slice(&run(first, second));
        }
        let (mut first, mut second) = ([0; IN], [0; IN]);
        first[..first_rest.len()].copy_from_slice(first_rest);
        second[..second_rest.len()].copy_from_slice(second_rest);
        if tiling.bits() == 4 && tiling.k() % 2 == 1 {
            // The last byte's upper half is no code.
            first[first_rest.len() - 1] &= 15;
            second[second_rest.len() - 1] &= 15;
        }
        for strip in whole..tiling.k_tiles() * strips {
            out[place(strip)].copy_from_slice(&run(&first, &second));
            (first, second) = ([0; IN], [0; IN]);
        }
    }
}

/// 64 k of 4 bits: word `s` of lane `q` has the codes 16 s + 2 q and 16 s + 8 + 2 q of both rows in its lower half, and
/// those after them in its upper half.
#[inline(always)]
fn nibbles(first: &[u8; STRIP], second: &[u8; STRIP]) -> [u8; 2 * STRIP] {
    // Bytes of each row: of every sixteen k those of the first eight and of the others by turns.
    let by_turns = |row: &[u8; STRIP]| {
        let [low, high] = sixteens(row);
        let [low, high] = Sixteen::zip::<4>(low, high);
        let [low, high] = Sixteen::zip::<4>(low, high);
        Sixteen::zip::<1>(low, high)
    };
    let ([a, b], [c, d]) = (by_turns(first), by_turns(second));
    let [even, odd] = Sixteen::zip_nibbles(a, c);
    let [w0, w1] = Sixteen::zip::<2>(even, odd);
    let [even, odd] = Sixteen::zip_nibbles(b, d);
    let [w2, w3] = Sixteen::zip::<2>(even, odd);
    transpose([w0, w1, w2, w3])
}

/// 32 k of 8 bits: word `w` of lane `q` has the codes 8 w + 2 q of both rows, then those after them.
#[inline(always)]
fn octets(first: &[u8; STRIP], second: &[u8; STRIP]) -> [u8; 2 * STRIP] {
    let ([a, b], [c, d]) = (sixteens(first), sixteens(second));
    let ([w0, w1], [w2, w3]) = (Sixteen::zip::<1>(a, c), Sixteen::zip::<1>(b, d));
    transpose([w0, w1, w2, w3])
}

/// 16 k of 16 bits: the words of lane `q` have codes 2 q and 2 q + 1 of the first row, the same of the second, and the
/// same of both 8 k further.
#[inline(always)]
fn pairs(first: &[u8; STRIP], second: &[u8; STRIP]) -> [u8; 2 * STRIP] {
    let ([a, b], [c, d]) = (sixteens(first), sixteens(second));
    transpose([a, c, b, d])
}

#[inline(always)]
fn sixteens(row: &[u8; STRIP]) -> [Sixteen; 2] {
    let halves = row.as_chunks().0;
    [Sixteen::of(halves[0]), Sixteen::of(halves[1])]
}

/// From word `q` of the `w`-th to word `w` of lane `q`.
#[inline(always)]
fn transpose(words: [Sixteen; 4]) -> [u8; 2 * STRIP] {
    let ([a, b], [c, d]) = (Sixteen::zip::<4>(words[0], words[1]), Sixteen::zip::<4>(words[2], words[3]));
    let ([w, x], [y, z]) = (Sixteen::zip::<8>(a, c), Sixteen::zip::<8>(b, d));
    let mut lanes = [0; 2 * STRIP];
    for (to, lane) in lanes.as_chunks_mut().0.iter_mut().zip([w, x, y, z]) {
        *to = lane.bytes();
    }
    lanes
}

/// As [`pairs`], of 32 bits.
#[inline(always)]
fn quads(first: &[u8; 2 * STRIP], second: &[u8; 2 * STRIP]) -> [u8; 4 * STRIP] {
    let mut words = [0; 4 * STRIP];
    for q in 0..4 {
        for (half, word) in words[32 * q..][..32].as_chunks_mut::<16>().0.iter_mut().enumerate() {
            word[..8].copy_from_slice(&first[32 * half + 8 * q..][..8]);
            word[8..].copy_from_slice(&second[32 * half + 8 * q..][..8]);
        }
    }
    words
}

/// One byte a code to two codes a byte, the even one in the low half. Bits of a code above the fourth are dropped.
pub(crate) fn pack_nibbles(codes: &[u8], out: &mut [u8]) {
    let (pairs, rest) = codes.as_chunks::<2>();
    for (pair, byte) in pairs.iter().zip(&mut *out) {
        *byte = pair[0] & 15 | pair[1] << 4;
    }
    if let Some(last) = rest.first() {
        out[pairs.len()] = last & 15;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every code lies where the place table says, and everything else is zero, whatever was there before.
        #[test]
        fn packed_rows_lie_where_the_place_table_says(
            n in 1..130_usize,
            k in 1..200_usize,
            bits in prop::sample::select(vec![4, 8, 16, 32]),
            beyond in 0..9_usize,
            seed: u64,
        ) {
            let tiling = Tiling::new(n, k, bits);
            let length = (k * bits).div_ceil(8);
            let stride = length + beyond;
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            };
            let stored: Vec<u8> = (0..n * stride).map(|_| next()).collect();
            let mut expected = vec![0_u8; tiling.bytes()];
            for row in 0..n {
                for column in 0..k {
                    let (slot, line) = (tiling.slot(row, column), &stored[row * stride..]);
                    if bits == 4 {
                        let code = (line[column / 2] >> (4 * (column % 2))) & 15;
                        expected[slot / 2] |= code << (4 * (slot % 2));
                    } else {
                        let width = bits / 8;
                        expected[slot * width..][..width].copy_from_slice(&line[column * width..][..width]);
                    }
                }
            }
            let mut tiles = vec![0xa5_u8; tiling.bytes()];
            for (row_tile, out) in tiles.chunks_exact_mut(tiling.row_tile_bytes()).enumerate() {
                let rows = row_tile * TILE..n.min((row_tile + 1) * TILE);
                tiling.tile_packed_rows(&stored[rows.start * stride..rows.end * stride], stride, out);
            }
            prop_assert_eq!(tiles, expected);
        }
    }
}
