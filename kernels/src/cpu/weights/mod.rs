//! From packed tiles to weights: the only place where the CPU backend learns what a code is worth.
//!
//! With [`Decode::Operand`] a weight is bit for bit what compressed-tensors' decompress yields (then rounded to the
//! compute mode by the unit that it is packed in); with the other two it is the exact code, or the exact product of code
//! and stored scale.

mod codes;
mod embedding;
mod panel;
mod values;

use std::ops::Range;

use ctq_container::TILE;
use ctq_model::DType;
use ctq_model::matrix::Code;

pub(crate) use self::embedding::rows;
pub(crate) use self::panel::{HALVES, Panel, Scratch};
use self::values::{Coded, Run, Worth};
use crate::cpu::Isa;
use crate::cpu::matrix::{CpuMatrix, ScaleUse, decode_element};
use crate::cpu::product::{Unit, pack_rows};

/// What weights are decoded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decode {
    /// The decompressed weight.
    Operand,
    /// `code - zero`, no scale.
    Codes,
    /// The code of an integer: its zero point is taken from the sums.
    Integers,
    /// `code * scale` without the global scale and without rounding: exact for fp4 codes.
    Scaled,
}

/// Decoder of one row tile: its scales as f32, ready for any run of k.
pub(crate) struct RowTile<'a> {
    isa: Isa,
    matrix: &'a CpuMatrix,
    row_tile: usize,
    decode: Decode,
    worth: Option<Worth>,
    /// [groups][64].
    scales: Vec<f32>,
    /// [groups][64], or none.
    zeros: Vec<f32>,
}

impl<'a> RowTile<'a> {
    /// Row tile `row_tile` of the whole matrix.
    pub(crate) fn new(isa: Isa, matrix: &'a CpuMatrix, row_tile: usize, decode: Decode) -> RowTile<'a> {
        let scales = match decode {
            Decode::Operand => matrix.row_scales(row_tile, ScaleUse::Operand),
            Decode::Scaled => matrix.row_scales(row_tile, ScaleUse::Stored),
            Decode::Codes | Decode::Integers => Vec::new(),
        };
        let worth = Worth::of(matrix.tiled.code);
        let zeros = match decode {
            Decode::Integers => Vec::new(),
            Decode::Operand | Decode::Scaled | Decode::Codes => matrix.row_zeros(row_tile),
        };
        RowTile { isa, matrix, row_tile, decode, worth, scales, zeros }
    }

    /// Words of one k tile, [64 rows][steps of 64 k], zero beyond the last k.
    fn words(&self, unit: Unit, k_tile: usize, scratch: &mut Scratch) {
        if unit == Unit::Pair && self.matrix.tiled.code == Code::Bf16 {
            codes::pairs(self.isa, self.bytes(k_tile), self.places(), scratch.pairs());
            let kept = self.kept(k_tile).div_ceil(2);
            scratch.pairs().chunks_exact_mut(TILE / 2).for_each(|row| row[kept..].fill(0));
            return;
        }
        let steps = unit.steps(TILE);
        match unit {
            // Packing rounds to bf16: once is enough.
            Unit::Pair | Unit::SwappedFloat => self.values(k_tile, Some(DType::BF16), scratch),
            Unit::Float | Unit::Quad | Unit::Short => self.values(k_tile, None, scratch),
        }
        let Scratch { values, words, .. } = scratch;
        pack_rows(self.isa, unit, values.as_slice(), TILE, &mut words[..TILE * steps], steps);
    }

    /// Weights of one k tile, [64 rows][64 k], zero beyond the last k. `follows`: a rounding that is yet to come.
    fn values(&self, k_tile: usize, follows: Option<DType>, scratch: &mut Scratch) {
        let code = self.matrix.tiled.code;
        match code {
            Code::Int { .. } | Code::E2m1 | Code::E4m3 => self.quantized(k_tile, follows, scratch),
            Code::Bf16 => {
                codes::pairs(self.isa, self.bytes(k_tile), self.places(), scratch.pairs());
                for (values, word) in
                    scratch.values.as_chunks_mut::<2>().0.iter_mut().zip(scratch.words.iter())
                {
                    *values = [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
                }
            }
            Code::F16 => {
                codes::pairs(self.isa, self.bytes(k_tile), self.places(), scratch.pairs());
                for (values, word) in
                    scratch.values.as_chunks_mut::<2>().0.iter_mut().zip(scratch.words.iter())
                {
                    let half = |bits: u32| half::f16::from_bits(bits as u16).to_f32();
                    *values = [half(*word), half(word >> 16)];
                }
            }
            Code::F32 => {
                let bytes = self.bytes(k_tile);
                for (slot, place) in self.places().iter().enumerate() {
                    scratch.values[usize::from(*place)] = decode_element(DType::F32, bytes, slot);
                }
            }
        }
        let kept = self.kept(k_tile);
        if kept < TILE {
            scratch.values.chunks_exact_mut(TILE).for_each(|row| row[kept..].fill(0.0));
        }
    }

    fn quantized(&self, k_tile: usize, follows: Option<DType>, scratch: &mut Scratch) {
        let (bytes, places) = (self.bytes(k_tile), self.places());
        match self.matrix.tiled.code.tile_bits() {
            4 => codes::nibbles(self.isa, bytes, places, &mut scratch.codes),
            _ => codes::octets(self.isa, bytes, places, &mut scratch.codes),
        }
        let mut runs = [Run::default(); TILE];
        let count = self.runs(k_tile, &mut runs);
        let coded = Coded {
            worth: self.worth.as_ref().expect("codes of at most 8 bits"),
            codes: &scratch.codes,
            runs: &runs[..count],
            scales: &self.scales,
            zeros: &self.zeros,
            rounding: match self.decode {
                Decode::Operand => self.matrix.rounding().filter(|dtype| Some(*dtype) != follows),
                Decode::Codes | Decode::Integers | Decode::Scaled => None,
            },
        };
        values::values(self.isa, &coded, &mut scratch.values);
    }

    /// Runs of a tile's k that share a scale, as many as are returned; padding counts to the last group.
    fn runs(&self, k_tile: usize, runs: &mut [Run; TILE]) -> usize {
        let (size, last) = (self.matrix.group_size(), self.matrix.groups() - 1);
        let first = k_tile * TILE;
        let (mut start, mut count) = (0, 0);
        while start < TILE {
            let group = ((first + start) / size).min(last);
            let end = if group == last { TILE } else { ((group + 1) * size - first).min(TILE) };
            runs[count] = Run { start, end, group };
            (start, count) = (end, count + 1);
        }
        count
    }

    /// k of a tile that are not padding.
    fn kept(&self, k_tile: usize) -> usize {
        (self.matrix.k() - k_tile * TILE).min(TILE)
    }

    fn bytes(&self, k_tile: usize) -> &[u8] {
        let tiling = self.matrix.tiled.tiling();
        let at = self.row_tile * tiling.row_tile_bytes() + k_tile * tiling.tile_bytes();
        &self.matrix.tiled.codes[at..at + tiling.tile_bytes()]
    }

    fn places(&self) -> &'static [u16] {
        self.matrix.tiled.tiling().tile_places()
    }

    /// Decodes k tiles `tiles` into `panel`.
    pub(crate) fn panel(&self, unit: Unit, tiles: Range<usize>, scratch: &mut Scratch, panel: &mut Panel) {
        panel.begin(unit, tiles.len());
        for (index, k_tile) in tiles.enumerate() {
            self.words(unit, k_tile, scratch);
            panel.put(self.isa, index, scratch.words.as_slice());
        }
    }
}
