//! From packed tiles to a panel of f32: the only place where the CPU backend learns what a weight is worth.
//!
//! With [`Decode::Operand`] a weight is bit for bit what compressed-tensors' decompress yields (then rounded to the
//! compute mode); with the other two it is the exact code, or the exact product of code and stored scale.

use ctq_container::TILE;
use ctq_model::DType;
use ctq_model::matrix::Code;
use rayon::prelude::*;

use crate::Compute;
use crate::cpu::CpuBuffer;
use crate::cpu::math::{round_bf16, round_f16};
use crate::cpu::matrix::{CpuMatrix, ScaleUse, decode_element};

/// What a panel's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decode {
    /// The decompressed weight, rounded to the compute mode.
    Operand(Compute),
    /// `code - zero`, no scale.
    Codes,
    /// `code * scale` without the global scale and without rounding: exact for fp4 codes.
    Scaled,
}

/// Decoder of one row tile: its scales as f32, ready for any run of k.
pub(crate) struct RowTile<'a> {
    matrix: &'a CpuMatrix,
    row_tile: usize,
    decode: Decode,
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl<'a> RowTile<'a> {
    /// Row tile `row_tile` of the whole matrix.
    pub(crate) fn new(matrix: &'a CpuMatrix, row_tile: usize, decode: Decode) -> RowTile<'a> {
        let scales = match decode {
            Decode::Operand(_) => matrix.row_scales(row_tile, ScaleUse::Operand),
            Decode::Scaled => matrix.row_scales(row_tile, ScaleUse::Stored),
            Decode::Codes => Vec::new(),
        };
        RowTile { matrix, row_tile, decode, scales, zeros: matrix.row_zeros(row_tile) }
    }

    /// Decodes k tiles `first..first + panel.len() / 4096` into `panel`, [k][64 rows].
    pub(crate) fn panel(&self, first: usize, panel: &mut [f32]) {
        for (index, out) in panel.chunks_exact_mut(TILE * TILE).enumerate() {
            self.tile(first + index, out);
        }
    }

    fn tile(&self, k_tile: usize, out: &mut [f32]) {
        let tiled = &self.matrix.tiled;
        let tiling = tiled.tiling();
        let at = self.row_tile * tiling.row_tile_bytes() + k_tile * tiling.tile_bytes();
        let codes = &tiled.codes[at..at + tiling.tile_bytes()];
        let places = tiling.tile_places();
        match tiled.code {
            Code::Int { bits } if bits <= 4 => self.quantized(k_tile, Nibbles { codes, places }, out),
            Code::E2m1 => self.quantized(k_tile, Nibbles { codes, places }, out),
            Code::Int { .. } | Code::E4m3 => self.quantized(k_tile, Octets { codes, places }, out),
            Code::Bf16 => self.dense(DType::BF16, codes, places, out),
            Code::F16 => self.dense(DType::F16, codes, places, out),
            Code::F32 => self.dense(DType::F32, codes, places, out),
        }
    }

    fn dense(&self, dtype: DType, codes: &[u8], places: &[u16], out: &mut [f32]) {
        for (slot, place) in places.iter().enumerate() {
            let value = decode_element(dtype, codes, slot);
            out[transposed(*place)] = match self.decode {
                Decode::Operand(Compute::Bf16) => round_bf16(value),
                Decode::Operand(Compute::F32) | Decode::Codes | Decode::Scaled => value,
            };
        }
    }

    fn quantized(&self, k_tile: usize, codes: impl Codes, out: &mut [f32]) {
        let values = self.matrix.values.as_ref().expect("codes of at most 8 bits have a table");
        match self.decode {
            Decode::Codes => self.each(k_tile, codes, out, |code, _, zero| values[code] - zero),
            Decode::Scaled => {
                self.each(k_tile, codes, out, |code, scale, zero| (values[code] - zero) * scale)
            }
            Decode::Operand(compute) => {
                let twice = compute == Compute::Bf16;
                match self.matrix.rounding() {
                    // bf16 weights are not changed by a second rounding to bf16.
                    Some(DType::BF16) => {
                        self.each(k_tile, codes, out, |code, scale, zero| {
                            round_bf16((values[code] - zero) * scale)
                        });
                    }
                    Some(DType::F16) => self.each(k_tile, codes, out, |code, scale, zero| {
                        let weight = round_f16((values[code] - zero) * scale);
                        if twice { round_bf16(weight) } else { weight }
                    }),
                    _ => self.each(k_tile, codes, out, |code, scale, zero| {
                        let weight = (values[code] - zero) * scale;
                        if twice { round_bf16(weight) } else { weight }
                    }),
                }
            }
        }
    }

    /// `weight(code, scale, zero)` for every code of a tile; padding beyond the last k is zero.
    #[inline(always)]
    fn each(
        &self,
        k_tile: usize,
        codes: impl Codes,
        out: &mut [f32],
        weight: impl Fn(usize, f32, f32) -> f32,
    ) {
        let size = self.matrix.group_size();
        let first = k_tile * TILE;
        let k = self.matrix.k();
        // Group of each of the tile's 64 columns, as an offset into the tables.
        let offsets: [usize; TILE] =
            std::array::from_fn(|column| ((first + column).min(k - 1) / size) * TILE);
        codes.each(|place, code| {
            let (row, column) = (usize::from(place) / TILE, usize::from(place) % TILE);
            let at = offsets[column] + row;
            let scale = self.scales.get(at).copied().unwrap_or(1.0);
            let zero = self.zeros.get(at).copied().unwrap_or(0.0);
            out[column * TILE + row] = weight(code, scale, zero);
        });
        for column in k.saturating_sub(first).min(TILE)..TILE {
            out[column * TILE..(column + 1) * TILE].fill(0.0);
        }
    }
}

/// Codes of one tile with their places.
trait Codes {
    fn each(self, visit: impl FnMut(u16, usize));
}

struct Nibbles<'a> {
    codes: &'a [u8],
    places: &'a [u16],
}

struct Octets<'a> {
    codes: &'a [u8],
    places: &'a [u16],
}

impl Codes for Nibbles<'_> {
    #[inline(always)]
    fn each(self, mut visit: impl FnMut(u16, usize)) {
        for (byte, places) in self.codes.iter().zip(self.places.chunks_exact(2)) {
            visit(places[0], usize::from(byte & 15));
            visit(places[1], usize::from(byte >> 4));
        }
    }
}

impl Codes for Octets<'_> {
    #[inline(always)]
    fn each(self, mut visit: impl FnMut(u16, usize)) {
        for (byte, place) in self.codes.iter().zip(self.places) {
            visit(*place, usize::from(*byte));
        }
    }
}

/// `row * 64 + k` to `k * 64 + row`.
const fn transposed(place: u16) -> usize {
    let place = place as usize;
    (place % TILE) * TILE + place / TILE
}

/// Rows `ids` as f32, in the order of the inputs: the weight bit for bit as compressed-tensors yields it.
pub(crate) fn rows(table: &CpuMatrix, ids: &[u32]) -> CpuBuffer {
    let width = table.k();
    // Rows of one row tile are decoded together: each tile once.
    let mut order: Vec<(usize, usize)> =
        ids.iter().map(|id| table.rows.start + *id as usize).enumerate().collect();
    order.sort_by_key(|(_, row)| *row);
    let runs: Vec<&[(usize, usize)]> = order.chunk_by(|a, b| a.1 / TILE == b.1 / TILE).collect();
    let decoded: Vec<(usize, Vec<f32>)> =
        runs.par_iter().flat_map_iter(|run| tile_rows(table, run)).collect();
    let mut values = vec![0.0; ids.len() * width];
    for (index, row) in decoded {
        values[index * width..(index + 1) * width].copy_from_slice(&row);
    }
    CpuBuffer { width, values }
}

/// `(index, row)` of one row tile, decoded.
fn tile_rows(table: &CpuMatrix, run: &[(usize, usize)]) -> Vec<(usize, Vec<f32>)> {
    let tile = RowTile::new(table, run[0].1 / TILE, Decode::Operand(Compute::F32));
    let mut panel = vec![0.0; table.tiled.tiling().k_tiles() * TILE * TILE];
    tile.panel(0, &mut panel);
    let decode = |row: usize| {
        let mut values = vec![0.0; table.k()];
        for column in 0..table.k() {
            let input = table.permutation.as_ref().map_or(column, |permutation| permutation[column] as usize);
            values[input] = panel[column * TILE + row % TILE];
        }
        values
    };
    run.iter().map(|(index, row)| (*index, decode(*row))).collect()
}
