//! The codes of one linear, some rows at a time: checked, unpacked, tiled, and held against what comes back of them.
//! Where rows lie in the checkpoint as a tile takes them, no code is ever unpacked.

use std::ops::Range;

use ctq_container::{Exception, TILE, TileCodes, Tiling};
use ctq_model::inventory::Linear;
use ctq_model::{Result, Tensor, TensorSource};
use rayon::prelude::*;

use super::{Codec, Module, RowLayout, act_order, codec};
use crate::loss::{Differences, Loss};

/// The codes of one linear.
pub(crate) struct CodeRows<'a> {
    module: Module<'a>,
    tensor: Tensor<'a>,
    leaf: &'static str,
    codec: Box<dyn Codec>,
    permutation: Option<Vec<u32>>,
    tiling: Tiling,
    /// Bytes of a row in the tensor.
    stored: usize,
    /// Bytes of an unpacked row.
    pub(super) unpacked: usize,
}

impl<'a> CodeRows<'a> {
    /// Of `linear`, columns in the order of its permutation, where it has one.
    ///
    /// # Errors
    /// Where the tensor is not there, or has not its length.
    pub(crate) fn new(source: &'a dyn TensorSource, linear: &'a Linear) -> Result<CodeRows<'a>> {
        let module = Module { source, linear };
        let permutation = act_order::read(&module)?;
        let (storage, n, k) = (linear.scheme.storage, linear.n, linear.k);
        let codec = codec(storage);
        let (leaf, stored) = (module.codes_leaf(), codec.row_bytes(k));
        let tensor = module.tensor(leaf, n * stored)?;
        let tiling = Tiling::new(n, k, storage.code().tile_bits());
        let unpacked = k * storage.code().unpacked_bytes();
        Ok(CodeRows { module, tensor, leaf, codec, permutation, tiling, stored, unpacked })
    }

    /// Name of the tensor that holds them.
    pub(crate) fn tensor_name(&self) -> String {
        self.module.name(self.leaf)
    }

    /// Unpacks one row.
    pub(super) fn unpack(&self, row: usize, codes: &mut [u8]) {
        self.codec.unpack_row(self.row(row), codes);
        if let Some(permutation) = &self.permutation {
            let before = codes.to_vec();
            act_order::gather(permutation, self.unpacked / self.tiling.k(), &before, codes);
        }
    }

    /// Holds every row against its format.
    ///
    /// # Errors
    /// Names row and column of the first code that is none.
    pub(crate) fn check(&self, rows: Range<usize>) -> Result<()> {
        for row in rows {
            self.codec.check_row(self.row(row)).map_err(|bad| {
                self.module.bad(self.leaf, format!("row {row}, column {}: {}", bad.column, bad.what))
            })?;
        }
        Ok(())
    }

    /// As [`CodeRows::check`], of all rows.
    ///
    /// # Errors
    /// As [`CodeRows::check`].
    pub(crate) fn check_all(&self) -> Result<()> {
        let row_tiles = (0..self.tiling.row_tiles()).into_par_iter();
        row_tiles.find_map_first(|row_tile| self.check(self.rows(row_tile)).err()).map_or(Ok(()), Err)
    }

    /// What the codes do not bring back of their tensor: bits that belong to no code.
    pub(crate) fn loss(&self) -> Loss {
        let n = self.tiling.n();
        if self.stored * 8 == self.tiling.k() * self.tiling.bits() && self.layout() == RowLayout::AsTiled {
            return Loss::Nothing;
        }
        let new = || (vec![0; self.unpacked], vec![0; self.stored]);
        let rows = || (0..n).into_par_iter();
        let number = rows().map_init(new, |scratch, row| self.differences(row, scratch).number()).sum();
        Loss::of(number, self.tensor.bytes.len(), || {
            let lists = rows().map_init(new, |scratch, row| self.differences(row, scratch).exceptions());
            lists.collect::<Vec<Vec<Exception>>>().concat()
        })
    }

    /// Of one row and what comes back of it; an order of columns is undone exactly, whatever it is.
    fn differences<'b>(&'b self, row: usize, scratch: &'b mut (Vec<u8>, Vec<u8>)) -> Differences<'b> {
        let (codes, again) = scratch;
        self.codec.unpack_row(self.row(row), codes);
        again.fill(0);
        self.codec.pack_row(codes, again);
        Differences::between(row * self.stored, self.row(row), again)
    }

    /// Tiles one row of tiles; all of `out` is written. `scratch` is of any length.
    pub(crate) fn tile_one(&self, row_tile: usize, out: &mut [u8], scratch: &mut Vec<u8>) {
        let rows = self.rows(row_tile);
        match self.layout() {
            RowLayout::AsTiled => {
                let stored = &self.tensor.bytes[rows.start * self.stored..rows.end * self.stored];
                self.tiling.tile_packed_rows(stored, self.stored, out);
            }
            RowLayout::Own => {
                scratch.resize(rows.len() * self.unpacked, 0);
                for (row, codes) in rows.clone().zip(scratch.chunks_exact_mut(self.unpacked.max(1))) {
                    self.unpack(row, codes);
                }
                let tiling = Tiling::new(rows.len(), self.tiling.k(), self.tiling.bits());
                tiling.tile_rows(scratch, 0, out);
            }
        }
    }

    /// How rows lie, given that another order of columns moves each code.
    fn layout(&self) -> RowLayout {
        if self.permutation.is_some() { RowLayout::Own } else { self.codec.layout() }
    }

    fn row(&self, row: usize) -> &[u8] {
        &self.tensor.bytes[row * self.stored..(row + 1) * self.stored]
    }

    /// Rows of the matrix in one row of tiles.
    pub(crate) fn rows(&self, row_tile: usize) -> Range<usize> {
        row_tile * TILE..self.tiling.n().min((row_tile + 1) * TILE)
    }

    pub(crate) fn tiling(&self) -> Tiling {
        self.tiling
    }
}

impl TileCodes for CodeRows<'_> {
    fn row_tiles(&self) -> usize {
        self.tiling.row_tiles()
    }

    fn row_tile_bytes(&self) -> usize {
        self.tiling.row_tile_bytes()
    }

    fn tile(&self, row_tiles: Range<usize>, out: &mut [u8]) {
        let tiles = out.par_chunks_exact_mut(self.row_tile_bytes()).zip(row_tiles);
        tiles.for_each_init(Vec::new, |scratch, (out, row_tile)| self.tile_one(row_tile, out, scratch));
    }

    fn original(&self, row_tiles: Range<usize>) -> &[u8] {
        let rows = row_tiles.start * TILE..self.tiling.n().min(row_tiles.end * TILE);
        &self.tensor.bytes[rows.start * self.stored..rows.end * self.stored]
    }
}
