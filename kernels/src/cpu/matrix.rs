//! A packed matrix as the CPU backend holds it: the container's tiles, untouched, and a range of rows. Looks scales and
//! codes up; [`super::decode`] makes weights of them.

use std::ops::Range;
use std::sync::LazyLock;

use ctq_container::{TILE, TiledMatrix};
use ctq_model::DType;
use ctq_model::matrix::{Formula, Sharing};

use crate::cpu::math;

/// Rows of a packed matrix. Cloning shares the tiles.
#[derive(Clone, Debug)]
pub struct CpuMatrix {
    pub(crate) tiled: TiledMatrix,
    pub(crate) rows: Range<usize>,
    /// Column `j` of the tiles is input `permutation[j]`.
    pub(crate) permutation: Option<Vec<u32>>,
}

impl CpuMatrix {
    pub(crate) fn new(tiled: &TiledMatrix, rows: Range<usize>) -> CpuMatrix {
        let permutation = tiled.permutation.as_ref().map(|bytes| {
            bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
        });
        CpuMatrix { tiled: tiled.clone(), rows, permutation }
    }

    pub(crate) fn k(&self) -> usize {
        self.tiled.k
    }

    pub(crate) fn global_scale(&self) -> f32 {
        self.tiled.global_scale.map_or(1.0, f32::from_bits)
    }

    /// Scales of a row tile as f32, [groups][64], where rows have scales of their own; what the formula divides or
    /// exponentiates is already done, except for NVFP4's global scale in [`ScaleUse::Stored`].
    pub(crate) fn row_scales(&self, row_tile: usize, scale_use: ScaleUse) -> Vec<f32> {
        let Some(table) = &self.tiled.scales else { return Vec::new() };
        let groups = self.groups();
        let mut scales = vec![0.0; groups * TILE];
        match table.sharing {
            Sharing::Channel | Sharing::Group { .. } => {
                let width = table.dtype.bytes();
                let first = row_tile * groups * TILE * width;
                decode_elements(table.dtype, &table.bytes[first..first + groups * TILE * width], &mut scales);
            }
            Sharing::Tensor | Sharing::Block { .. } => {
                for (at, scale) in scales.iter_mut().enumerate() {
                    // Padding rows have no scale of their own in tables that are not arranged by row.
                    let row = (row_tile * TILE + at % TILE).min(self.tiled.n - 1);
                    let index = table.index(row, self.first_k(at / TILE), self.tiled.k);
                    *scale = decode_element(table.dtype, &table.bytes, index);
                }
            }
        }
        match (self.tiled.formula, scale_use) {
            (Formula::Nvfp4, ScaleUse::Operand) => {
                let global = self.global_scale();
                scales.iter_mut().for_each(|scale| *scale /= global);
            }
            (Formula::Nvfp4, ScaleUse::Stored)
            | (Formula::Affine | Formula::Mx | Formula::Dense, ScaleUse::Operand | ScaleUse::Stored) => {}
        }
        scales
    }

    /// Zero points of a row tile, [groups][64]; empty where there are none.
    pub(crate) fn row_zeros(&self, row_tile: usize) -> Vec<f32> {
        let (Some(zeros), Some(table)) = (&self.tiled.zeros, &self.tiled.scales) else { return Vec::new() };
        let mut values = Vec::new();
        for group in 0..self.groups() {
            for row in 0..TILE {
                let row = (row_tile * TILE + row).min(self.tiled.n - 1);
                let index = table.index(row, self.first_k(group), self.tiled.k);
                values.push(f32::from(zeros[index] as i8));
            }
        }
        values
    }

    /// Runs of k that share a scale.
    pub(crate) fn groups(&self) -> usize {
        self.tiled.k.div_ceil(self.group_size())
    }

    /// k in one run that shares a scale; the whole of k where rows have one scale, or there is one for all.
    pub(crate) fn group_size(&self) -> usize {
        match self.tiled.scales.as_ref().map(|table| table.sharing) {
            Some(Sharing::Group { size }) => size,
            Some(Sharing::Block { columns, .. }) => columns,
            Some(Sharing::Tensor | Sharing::Channel) | None => self.tiled.k.max(1),
        }
    }

    fn first_k(&self, group: usize) -> usize {
        group * self.group_size()
    }

    /// Dtype that the formula rounds weights to; `None`: no rounding.
    pub(crate) fn rounding(&self) -> Option<DType> {
        match self.tiled.formula {
            Formula::Dense => None,
            Formula::Affine => self.tiled.scales.as_ref().map(|table| table.dtype),
            Formula::Nvfp4 | Formula::Mx => Some(DType::BF16),
        }
    }
}

/// What scales are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleUse {
    /// To make the weight that compressed-tensors makes.
    Operand,
    /// As stored, for exact products.
    Stored,
}

/// Little-endian floats (or E8M0 exponents) as f32; exact.
fn decode_elements(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    /// Of every code of 8 bits.
    static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|code| math::e4m3(code as u8)));
    match dtype {
        DType::F8E4M3 => {
            out.iter_mut().zip(bytes).for_each(|(out, code)| *out = E4M3[usize::from(*code)]);
        }
        _ => out.iter_mut().enumerate().for_each(|(at, out)| *out = decode_element(dtype, bytes, at)),
    }
}

/// Element `index` of little-endian floats (or E8M0 exponents) as f32; exact.
#[inline]
pub(crate) fn decode_element(dtype: DType, bytes: &[u8], index: usize) -> f32 {
    let at = index * dtype.bytes();
    match dtype {
        DType::BF16 => f32::from_bits(u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])) << 16),
        DType::F16 => half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
        DType::F32 => f32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")),
        DType::F8E4M3 => math::e4m3(bytes[at]),
        DType::U8 | DType::F8E8M0 => math::e8m0(bytes[at]),
        DType::Bool
        | DType::I8
        | DType::U16
        | DType::I16
        | DType::U32
        | DType::I32
        | DType::U64
        | DType::I64
        | DType::F8E5M2
        | DType::F64 => {
            unreachable!("no scale or weight has dtype {dtype}: schemes are checked when they are read")
        }
    }
}
