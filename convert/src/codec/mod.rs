//! Codecs: how the codes of one linear lie in the checkpoint, both ways. One file per storage format, one exhaustive
//! match over [`Storage`]; scales, zero points and column order, which formats share, have files of their own.
//!
//! A codec works on one row at a time, because in every format rows share nothing. Act-order is applied here too: the
//! columns of a [`QuantMatrix`] are in an order in which groups are consecutive.

mod act_order;
mod dense;
mod inverse;
mod mx;
mod nibbles;
mod nvfp4;
mod pack;
mod plain;
mod rows;
mod scales;
mod values;
mod zeros;

use ctq_model::inventory::Linear;
use ctq_model::scheme::Storage;
use ctq_model::{QuantMatrix, Result, Tensor, TensorSource};
use rayon::prelude::*;

pub use inverse::{Leaf, regenerate};
pub(crate) use rows::CodeRows;
pub(crate) use values::check_vector;

/// How one row of codes lies in the tensor that holds it.
trait Codec: Send + Sync {
    /// Bytes that a row of `k` codes takes in the tensor.
    fn row_bytes(&self, k: usize) -> usize;

    /// Whether a row's bytes lie as a tile takes them.
    fn layout(&self) -> RowLayout;

    /// Holds one row against its format.
    ///
    /// # Errors
    /// The first code that is none.
    fn check_row(&self, stored: &[u8]) -> std::result::Result<(), BadCode>;

    /// Unpacks one row; `codes` has [`ctq_model::matrix::Code::unpacked_bytes`] bytes a code. Of a row that does not pass
    /// [`Codec::check_row`] come codes of no meaning.
    fn unpack_row(&self, stored: &[u8], codes: &mut [u8]);

    /// The inverse: packs one row into `stored`, which is all zeros.
    fn pack_row(&self, codes: &[u8], stored: &mut [u8]);
}

/// How the codes of a row follow one another in the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RowLayout {
    /// As [`ctq_container::Tiling::tile_packed_rows`] takes them.
    AsTiled,
    /// In a way of its own.
    Own,
}

/// A stored code that stands for no weight.
struct BadCode {
    /// Column in the order of the tensor.
    column: usize,
    /// What is wrong with it.
    what: String,
}

/// The codec of each storage format.
fn codec(storage: Storage) -> Box<dyn Codec> {
    match storage {
        Storage::Dense { dtype } => Box::new(dense::Dense { dtype }),
        Storage::PackedInt { bits, layout } => Box::new(pack::PackedInt { bits, layout }),
        Storage::PlainInt { bits } => Box::new(plain::PlainInt { bits }),
        Storage::PlainFp8 => Box::new(plain::PlainFp8),
        Storage::Nvfp4 => Box::new(nvfp4::Nvfp4),
        Storage::Mxfp4 => Box::new(mx::Mxfp4),
        Storage::Mxfp8 => Box::new(mx::Mxfp8),
    }
}

/// Reads one linear: its codes unpacked, its scales and zero points beside them.
///
/// # Errors
/// Names the tensor, row and column of a scale or weight that is not a number, or of a code out of its range.
pub fn encode(source: &dyn TensorSource, linear: &Linear) -> Result<QuantMatrix> {
    let rows = CodeRows::new(source, linear)?;
    rows.check_all()?;
    let mut codes = vec![0; linear.n * rows.unpacked];
    let parts = codes.par_chunks_exact_mut(rows.unpacked.max(1)).enumerate();
    parts.for_each(|(row, codes)| rows.unpack(row, codes));
    encode_around(source, linear, codes)
}

/// As [`encode`] with codes that come from elsewhere.
pub(crate) fn encode_around(
    source: &dyn TensorSource,
    linear: &Linear,
    codes: Vec<u8>,
) -> Result<QuantMatrix> {
    let module = Module { source, linear };
    Ok(QuantMatrix {
        n: linear.n,
        k: linear.k,
        code: linear.scheme.storage.code(),
        formula: linear.scheme.storage.formula(),
        codes,
        scales: scales::read(&module)?,
        zeros: zeros::read(&module)?,
        global_scale: nvfp4::global_scale(&module)?,
        permutation: act_order::read(&module)?,
    })
}

/// A linear and the tensors it is read from.
struct Module<'a> {
    source: &'a dyn TensorSource,
    linear: &'a Linear,
}

const REWRITE: &str = "download the checkpoint again, or quantize the model again";

impl<'a> Module<'a> {
    /// The tensor `<module>.<leaf>`, which must have `bytes` bytes.
    fn tensor(&self, leaf: &str, bytes: usize) -> Result<Tensor<'a>> {
        let name = self.name(leaf);
        let tensor = self.source.tensor(&name)?;
        let tensor = tensor
            .ok_or_else(|| ctq_model::Error::missing(self.source.root(), &name, "its module needs it"))?;
        if tensor.bytes.len() != bytes {
            let what = format!("{} bytes where {bytes} are expected", tensor.bytes.len());
            return Err(ctq_model::Error::tensor(tensor.file, &name, what, REWRITE));
        }
        Ok(tensor)
    }

    fn name(&self, leaf: &str) -> String {
        format!("{}.{leaf}", self.linear.module)
    }

    /// The leaf that holds the codes; files of early 2024 call packed words `weight` too.
    fn codes_leaf(&self) -> &'static str {
        let leaf = self.linear.scheme.storage.leaf();
        if self.source.info(&self.name(leaf)).is_some() { leaf } else { "weight" }
    }

    fn bad(&self, leaf: &str, what: impl Into<String>) -> ctq_model::Error {
        let name = self.name(leaf);
        ctq_model::Error::tensor(self.source.file_of(&name), &name, what, REWRITE)
    }
}

/// The inverse of [`CodeRows`].
fn pack(matrix: &QuantMatrix, storage: Storage) -> Vec<u8> {
    let codec = codec(storage);
    let (width, row_bytes) = (matrix.code.unpacked_bytes(), codec.row_bytes(matrix.k));
    let mut stored = vec![0; matrix.n * row_bytes];
    let rows = stored.par_chunks_exact_mut(row_bytes).zip(matrix.codes.par_chunks_exact(matrix.k * width));
    rows.for_each_init(
        || vec![0; matrix.k * width],
        |ordered, (stored, codes)| match &matrix.permutation {
            None => codec.pack_row(codes, stored),
            Some(permutation) => {
                act_order::scatter(permutation, width, codes, ordered);
                codec.pack_row(ordered, stored);
            }
        },
    );
    stored
}
