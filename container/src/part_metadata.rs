//! What a part file says of itself, and how its bytes are aligned: what its reader and its writer share.

use std::collections::BTreeMap;

use ctq_model::DType;
use ctq_model::inventory::Part;
use serde::{Deserialize, Serialize};

use crate::MatrixRecord;

/// Key in the safetensors `__metadata__` under which a part file describes itself.
pub(crate) const METADATA_KEY: &str = "ctq";

/// What a part file says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PartMetadata {
    pub(crate) format_version: u32,
    pub(crate) part: Part,
    /// Matrices by module: `<module>.codes`, `.scales`, `.zeros`, `.permutation`.
    pub(crate) matrices: BTreeMap<String, MatrixRecord>,
    /// Tensors stored as they were.
    pub(crate) tensors: BTreeMap<String, StoredRecord>,
    /// Bytes of `<tensor>.original`.
    pub(crate) originals: BTreeMap<String, usize>,
    /// Entries of `<tensor>.exceptions`.
    pub(crate) exceptions: BTreeMap<String, usize>,
}

/// True type and shape of a tensor that is stored as padded bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredRecord {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: usize,
}

/// Every tensor of a part file starts on a multiple of this many bytes: a page, and a block for direct I/O.
pub const ALIGNMENT: usize = 4096;

/// `length` rounded up to [`ALIGNMENT`].
pub(crate) const fn padded(length: usize) -> usize {
    length.div_ceil(ALIGNMENT) * ALIGNMENT
}

/// Bytes of one exception: a little-endian u64 offset and the byte.
pub(crate) const EXCEPTION_BYTES: usize = 9;

/// One byte of an original tensor that differs from what its module's tiles regenerate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Offset in the original tensor's bytes.
    pub offset: u64,
    /// The byte that is there.
    pub byte: u8,
}

impl Exception {
    pub(crate) fn read(bytes: &[u8]) -> Exception {
        let (offset, byte) = bytes.split_at(8);
        Exception { offset: u64::from_le_bytes(offset.try_into().expect("eight bytes")), byte: byte[0] }
    }

    pub(crate) fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.push(self.byte);
    }
}
