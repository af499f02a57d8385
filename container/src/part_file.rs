//! Reading one part file: a mapped safetensors file whose metadata is held against the manifest before a byte of it
//! is used. Knows names and lengths, not values.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ctq_model::inventory::PartInventory;
use memmap2::Mmap;
use safetensors::SafeTensors;

use crate::part_metadata::{EXCEPTION_BYTES, Exception, METADATA_KEY, PartMetadata, StoredRecord, padded};
use crate::{
    Bytes, Error, MatrixRecord, Origin, PartRecord, PartTiles, RawVector, Result, ScaleTable, TiledMatrix,
};

/// One part of a container, mapped. Whatever it hands out keeps the map alive.
#[derive(Debug)]
pub struct PartFile {
    path: PathBuf,
    map: Arc<Mmap>,
    metadata: PartMetadata,
    ranges: BTreeMap<String, Range<usize>>,
}

impl PartFile {
    /// Maps `root/record.file` and checks it against `record` and the inventory.
    pub(crate) fn open(root: &Path, record: &PartRecord, inventory: &PartInventory) -> Result<PartFile> {
        let path = root.join(&record.file);
        let map = map(&path)?;
        if map.len() as u64 != record.bytes {
            let what = format!("it is {} bytes long, and ctq.json says {}", map.len(), record.bytes);
            return Err(Error::part(&path, what));
        }
        let (header, header_metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| Error::part(&path, format!("not a valid safetensors file ({e})")))?;
        let text = header_metadata.metadata().as_ref().and_then(|metadata| metadata.get(METADATA_KEY));
        let text = text.ok_or_else(|| Error::part(&path, "its header has no `ctq` metadata"))?;
        let metadata: PartMetadata = serde_json::from_str(text)
            .map_err(|e| Error::part(&path, format!("its metadata is damaged ({e})")))?;
        let ranges = header_metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| (name, 8 + header + info.data_offsets.0..8 + header + info.data_offsets.1));
        let ranges = ranges.collect();
        let file = PartFile { path, map: Arc::new(map), metadata, ranges };
        file.check(record, inventory)?;
        Ok(file)
    }

    /// Everything that a runtime needs of the part, without copying a byte.
    ///
    /// # Errors
    /// Where lengths do not fit the geometry, or a permutation is none.
    pub fn tiles(&self) -> Result<PartTiles> {
        let mut part = PartTiles::default();
        for module in self.metadata.matrices.keys() {
            part.matrices.insert(module.clone(), self.matrix(module)?);
        }
        for (name, record) in &self.metadata.tensors {
            let vector = RawVector { dtype: record.dtype, bytes: self.bytes(name, record.bytes)? };
            part.vectors.insert(name.clone(), vector);
        }
        Ok(part)
    }

    /// One matrix.
    ///
    /// # Errors
    /// Where there is none of that name, or its lengths do not fit.
    pub fn matrix(&self, module: &str) -> Result<TiledMatrix> {
        let record = self.metadata.matrices.get(module);
        let record = record.ok_or_else(|| self.wrong(format!("it has no matrix `{module}`")))?;
        let optional = |leaf: &str, length: usize| -> Result<Option<Bytes>> {
            if length == 0 { Ok(None) } else { self.bytes(&format!("{module}.{leaf}"), length).map(Some) }
        };
        let scales = match (record.sharing, record.scale_dtype, optional("scales", record.scales)?) {
            (Some(sharing), Some(dtype), Some(bytes)) => Some(ScaleTable { dtype, sharing, bytes }),
            _ => None,
        };
        let permutation = optional("permutation", record.permutation)?;
        if let Some(permutation) = &permutation
            && !is_permutation(permutation, record.k)
        {
            return Err(
                self.wrong(format!("`{module}.permutation` is no permutation of {} inputs", record.k))
            );
        }
        Ok(TiledMatrix {
            n: record.n,
            k: record.k,
            code: record.code,
            formula: record.formula,
            codes: self.bytes(&format!("{module}.codes"), record.codes)?,
            scales,
            zeros: optional("zeros", record.zeros)?,
            global_scale: record.global_scale,
            permutation,
        })
    }

    /// The bytes of a small tensor that is stored for the runtime as it was.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn stored(&self, tensor: &str) -> Result<Bytes> {
        let record = self.metadata.tensors.get(tensor);
        let record = record.ok_or_else(|| self.wrong(format!("tensor `{tensor}` is missing")))?;
        self.bytes(tensor, record.bytes)
    }

    /// The bytes of a weight-side tensor that its module's tiles do not regenerate at all.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn original(&self, tensor: &str) -> Result<Bytes> {
        let length = self.metadata.originals.get(tensor);
        let length = length.ok_or_else(|| self.wrong(format!("tensor `{tensor}` is missing")))?;
        self.bytes(&format!("{tensor}.original"), *length)
    }

    /// Bytes of an original tensor that its module's tiles do not regenerate; empty where there are none.
    ///
    /// # Errors
    /// Where the list is shorter than the metadata says.
    pub fn exceptions(&self, tensor: &str) -> Result<Vec<Exception>> {
        let Some(count) = self.metadata.exceptions.get(tensor) else { return Ok(Vec::new()) };
        let length = count.saturating_mul(EXCEPTION_BYTES);
        let bytes = self.bytes(&format!("{tensor}.exceptions"), length)?;
        Ok(bytes.chunks_exact(EXCEPTION_BYTES).map(Exception::read).collect())
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn wrong(&self, what: impl Into<String>) -> Error {
        Error::part(&self.path, what)
    }

    fn bytes(&self, name: &str, length: usize) -> Result<Bytes> {
        let range = self.ranges.get(name).ok_or_else(|| self.wrong(format!("tensor `{name}` is missing")))?;
        if range.len() != padded(length) {
            let what = format!("tensor `{name}` has {} bytes where {} are due", range.len(), padded(length));
            return Err(self.wrong(what));
        }
        Ok(Bytes::of(Arc::clone(&self.map) as Arc<_>, range.start..range.start + length))
    }

    /// Holds the file's own description against the manifest.
    fn check(&self, record: &PartRecord, inventory: &PartInventory) -> Result<()> {
        if self.metadata.part != record.part {
            return Err(self.wrong(format!("it holds {}, not {}", self.metadata.part, record.part)));
        }
        let due: Vec<&str> = inventory.linears.iter().map(|linear| linear.module.as_str()).collect();
        if due.len() != self.metadata.matrices.len() {
            return Err(self.wrong("its matrices are not those of the manifest"));
        }
        for linear in &inventory.linears {
            let expected = MatrixRecord::of(linear);
            let found = self.metadata.matrices.get(&linear.module);
            if !found.is_some_and(|found| found.fits(&expected)) {
                let what = format!("matrix `{}` is not the one that the manifest describes", linear.module);
                return Err(self.wrong(what));
            }
        }
        for tensor in record.tensors.iter().filter(|tensor| tensor.origin == Origin::Stored) {
            let bytes = tensor.bytes() as usize;
            let expected = StoredRecord { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes };
            if self.metadata.tensors.get(&tensor.name) != Some(&expected) {
                let what = format!("tensor `{}` is not the one that the manifest describes", tensor.name);
                return Err(self.wrong(what));
            }
        }
        Ok(())
    }
}

/// Maps a file and has its pages read ahead.
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::part(path, "this part of the container is missing"),
        _ => Error::io(path, e, "check the permissions"),
    })?;
    // SAFETY: the map is read-only. Part files are replaced by renames, never rewritten in place, so nothing of ours
    // changes or shortens a file that is mapped (FORMAT.md asks the same of everybody else).
    #[expect(unsafe_code, reason = "mapping is how a part is read without copying it")]
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e, "check the file system"))?;
    // The whole part is about to be read, in order; where the advice is not taken, reading is only slower.
    #[cfg(unix)]
    let _ = map.advise(memmap2::Advice::WillNeed);
    Ok(map)
}

fn is_permutation(bytes: &[u8], k: usize) -> bool {
    let mut seen = vec![false; k];
    let mut targets = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    bytes.len() == k * 4
        && targets.all(|target| seen.get_mut(target).is_some_and(|seen| !std::mem::replace(seen, true)))
}
