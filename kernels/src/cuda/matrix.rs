//! A packed matrix on the device: the container's tiles, untouched, and what kernels must know to decode them.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;

use bytemuck::NoUninit;
use ctq_container::{TILE, TiledMatrix, Tiling};
use ctq_model::DType;
use ctq_model::matrix::{Code, Formula, Sharing};

use crate::KernelError;
use crate::cuda::device::{Address, Arguments, Device};
use crate::exact_product::Weights;

/// Rows of a packed matrix: the container's tiles on the device.
#[derive(Debug)]
pub struct CudaMatrix<M> {
    /// Rows of the whole matrix that this is.
    pub(crate) rows: Range<usize>,
    /// Rows of the whole matrix.
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) code: Code,
    pub(crate) formula: Formula,
    pub(crate) sharing: Option<Sharing>,
    pub(crate) scale_dtype: Option<DType>,
    pub(crate) global_scale: f32,
    /// Tiles of the row tiles that `rows` touches.
    pub(crate) codes: M,
    /// Scales of the same row tiles; of the whole matrix where they are not arranged by row.
    pub(crate) scales: Option<M>,
    /// Zero points, I8, in the order of the scales.
    pub(crate) zeros: Option<M>,
    /// The largest zero point; 0 where there are none.
    pub(crate) largest_zero: i8,
    /// Column `j` of the tiles is input `permutation[j]`: u32 [k].
    pub(crate) permutation: Option<M>,
}

/// What kernels make of codes: the CPU backend's `Decode`, the rounding to the compute mode aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Worth {
    /// The decompressed weight.
    Operand,
    /// `code - zero`, no scale.
    Codes,
    /// `code * scale` as stored, without the global scale and without rounding.
    Scaled,
}

/// `Matrix` of matrix.cuh.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub(crate) struct MatrixArgs {
    codes: Address,
    scales: Address,
    zeros: Address,
    pub(crate) first: u32,
    pub(crate) n: u32,
    k: u32,
    k_tiles: u32,
    pub(crate) row_tiles: u32,
    top: u32,
    whole_n: u32,
    groups: u32,
    group: u32,
    sharing: u32,
    block_rows: u32,
    scale_type: u32,
    code: u32,
    rounding: u32,
    code_offset: f32,
    global: f32,
}

// SAFETY: as the structure `Matrix` in matrix.cuh.
unsafe impl Arguments for MatrixArgs {}

const _: () = assert!(size_of::<MatrixArgs>() == 88, "as the assertion in matrix.cuh");

impl MatrixArgs {
    /// Runs of k that share a scale.
    pub(crate) fn groups(&self) -> usize {
        self.groups as usize
    }

    /// With scales and zero points of each row and group, in the order of those that are shared by row, for kernels that
    /// take them by stages of 64 k. Rows with one scale have it for whole stages.
    pub(crate) fn by_row(self, scales: Address, zeros: Address) -> MatrixArgs {
        let group = if self.groups <= 1 { self.k_tiles * TILE as u32 } else { self.group };
        MatrixArgs { scales, zeros, group, sharing: 1, ..self }
    }

    /// The same with the scales and zero points that there are.
    pub(crate) fn as_stored(self) -> MatrixArgs {
        self.by_row(self.scales, self.zeros)
    }

    /// Tiles of 16-bit operands that a kernel has made of this matrix's own row tiles.
    pub(crate) fn retiled(self, tiles: Address) -> MatrixArgs {
        MatrixArgs {
            codes: tiles,
            scales: Address::NULL,
            zeros: Address::NULL,
            groups: 1,
            group: self.k,
            sharing: 0,
            scale_type: 0,
            code: 4,
            rounding: 0,
            global: 1.0,
            ..self
        }
    }
}

/// The last part of the names of kernels that are there once for each width and meaning of codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CodeClass {
    Int4,
    E2m1,
    Int8,
    E4m3,
    Bf16,
    F16,
    F32,
}

impl CodeClass {
    pub(crate) fn of(code: Code) -> CodeClass {
        match code {
            Code::Int { bits } if bits <= 4 => CodeClass::Int4,
            Code::Int { .. } => CodeClass::Int8,
            Code::E2m1 => CodeClass::E2m1,
            Code::E4m3 => CodeClass::E4m3,
            Code::Bf16 => CodeClass::Bf16,
            Code::F16 => CodeClass::F16,
            Code::F32 => CodeClass::F32,
        }
    }

    /// The kernel of this class among `names`, in the order of the classes.
    pub(crate) fn pick(self, names: &[&'static str; 7]) -> &'static str {
        names[self as usize]
    }
}

impl<M> CudaMatrix<M> {
    /// Copies the tiles that hold `rows` to the device.
    pub(crate) fn upload<D: Device<Memory = M>>(
        device: &D,
        matrix: &TiledMatrix,
        rows: Range<usize>,
    ) -> Result<CudaMatrix<M>, KernelError> {
        let tiling = matrix.tiling();
        let tiles = rows.start / TILE..rows.end.div_ceil(TILE).max(rows.start / TILE);
        let part = |bytes: &[u8], per_tile: usize| {
            device.upload(&bytes[tiles.start * per_tile..tiles.end * per_tile])
        };
        let by_row = matrix.scales.as_ref().is_some_and(|table| is_by_row(table.sharing));
        let row_tiles = tiling.row_tiles().max(1);
        let per_scale =
            |bytes: &[u8]| if by_row { part(bytes, bytes.len() / row_tiles) } else { device.upload(bytes) };
        Ok(CudaMatrix {
            codes: part(&matrix.codes, tiling.row_tile_bytes())?,
            scales: matrix.scales.as_ref().map(|table| per_scale(&table.bytes)).transpose()?,
            zeros: matrix.zeros.as_ref().map(|zeros| per_scale(zeros)).transpose()?,
            largest_zero: matrix
                .zeros
                .as_ref()
                .and_then(|zeros| zeros.iter().map(|zero| zero.cast_signed()).max())
                .unwrap_or(0),
            permutation: matrix.permutation.as_ref().map(|bytes| device.upload(bytes)).transpose()?,
            sharing: matrix.scales.as_ref().map(|table| table.sharing),
            scale_dtype: matrix.scales.as_ref().map(|table| table.dtype),
            global_scale: matrix.global_scale.map_or(1.0, f32::from_bits),
            rows,
            n: matrix.n,
            k: matrix.k,
            code: matrix.code,
            formula: matrix.formula,
        })
    }

    /// k in one run that shares a scale; the whole of k where rows have one scale, or there is one for all.
    pub(crate) fn group_size(&self) -> usize {
        match self.sharing {
            Some(Sharing::Group { size }) => size,
            Some(Sharing::Block { columns, .. }) => columns,
            Some(Sharing::Tensor | Sharing::Channel) | None => self.k.max(1),
        }
    }

    /// What decides which products of codes are defined.
    pub(crate) fn weights(&self) -> Weights {
        Weights {
            code: self.code,
            formula: self.formula,
            k: self.k,
            group: self.group_size(),
            permuted: self.permutation.is_some(),
            zeros: self.zeros.is_some(),
        }
    }

    /// Whether scales change only at multiples of 16 k: what the fused kernels take.
    pub(crate) fn has_whole_slices(&self) -> bool {
        self.group_size() >= self.k || self.group_size().is_multiple_of(16)
    }

    pub(crate) fn class(&self) -> CodeClass {
        CodeClass::of(self.code)
    }

    /// k rounded up to whole tiles: elements from one row of bf16 operands to the next.
    pub(crate) fn stride(&self) -> usize {
        self.k.next_multiple_of(TILE)
    }

    /// Rows `rows`, counted from this matrix's own first, as kernels see them.
    pub(crate) fn args<D: Device<Memory = M>>(&self, rows: Range<usize>, worth: Worth) -> MatrixArgs {
        let tiling = Tiling::new(self.n, self.k, self.code.tile_bits());
        let first = self.rows.start % TILE + rows.start;
        let skipped = first / TILE;
        let groups = self.k.div_ceil(self.group_size());
        let width = self.scale_dtype.map_or(0, DType::bytes);
        // Scales, or zero points, of the row tiles before the first.
        let passed = if self.sharing.is_some_and(is_by_row) { skipped * groups * TILE } else { 0 };
        let address = |memory: &Option<M>, offset: usize| {
            memory.as_ref().map_or(Address::NULL, |memory| D::address(memory).offset(offset))
        };
        let (scales, rounding, global) = match worth {
            Worth::Operand => (true, self.rounding(), self.divisor()),
            Worth::Codes => (false, Rounding::None, 1.0),
            Worth::Scaled => (true, Rounding::None, 1.0),
        };
        MatrixArgs {
            codes: D::address(&self.codes).offset(skipped * tiling.row_tile_bytes()),
            scales: address(&self.scales, passed * width),
            zeros: address(&self.zeros, passed),
            first: (first % TILE) as u32,
            n: rows.len() as u32,
            k: self.k as u32,
            k_tiles: tiling.k_tiles() as u32,
            row_tiles: (first % TILE + rows.len()).div_ceil(TILE) as u32,
            top: ((self.rows.start / TILE + skipped) * TILE) as u32,
            whole_n: self.n as u32,
            groups: groups as u32,
            group: self.group_size().min(self.k) as u32,
            sharing: self.sharing.map_or(0, sharing_number),
            block_rows: match self.sharing {
                Some(Sharing::Block { rows, .. }) => rows as u32,
                Some(Sharing::Tensor | Sharing::Channel | Sharing::Group { .. }) | None => 1,
            },
            scale_type: if scales { self.scale_dtype.map_or(0, scale_number) } else { 0 },
            code: self.class() as u32,
            rounding: rounding as u32,
            code_offset: 8_388_608.0 + integer_bias(self.code),
            global,
        }
    }

    /// What the formula rounds weights to.
    pub(crate) fn rounding(&self) -> Rounding {
        match (self.formula, self.scale_dtype) {
            (Formula::Nvfp4 | Formula::Mx, _) | (Formula::Affine, Some(DType::BF16)) => Rounding::Bf16,
            (Formula::Affine, Some(DType::F16)) => Rounding::F16,
            (Formula::Affine | Formula::Dense, _) => Rounding::None,
        }
    }

    /// What the formula divides scales by.
    pub(crate) fn divisor(&self) -> f32 {
        match self.formula {
            Formula::Nvfp4 => self.global_scale,
            Formula::Affine | Formula::Mx | Formula::Dense => 1.0,
        }
    }
}

/// `Rounding` of matrix.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    None,
    Bf16,
    F16,
}

/// Whether scales lie in row tiles as codes do.
fn is_by_row(sharing: Sharing) -> bool {
    match sharing {
        Sharing::Channel | Sharing::Group { .. } => true,
        Sharing::Tensor | Sharing::Block { .. } => false,
    }
}

/// `ScaleSharing` of matrix.cuh.
fn sharing_number(sharing: Sharing) -> u32 {
    match sharing {
        Sharing::Tensor => 0,
        Sharing::Channel | Sharing::Group { .. } => 1,
        Sharing::Block { .. } => 2,
    }
}

/// `ScaleType` of matrix.cuh.
fn scale_number(dtype: DType) -> u32 {
    match dtype {
        DType::BF16 => 1,
        DType::F16 => 2,
        DType::F32 => 3,
        DType::F8E4M3 => 4,
        DType::U8 | DType::F8E8M0 => 5,
        DType::Bool
        | DType::I8
        | DType::U16
        | DType::I16
        | DType::U32
        | DType::I32
        | DType::U64
        | DType::I64
        | DType::F8E5M2
        | DType::F64 => unreachable!("no scale has dtype {dtype}: schemes are checked when they are read"),
    }
}

/// What a stored integer is above its value.
fn integer_bias(code: Code) -> f32 {
    match code {
        Code::Int { bits } => f32::from(1_u16 << (bits - 1)),
        Code::E4m3 | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32 => 0.0,
    }
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/packed.rs"]
pub(crate) mod packed;
