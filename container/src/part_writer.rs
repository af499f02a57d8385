//! Writing one part file: a safetensors file of bytes, every tensor and the header padded so that each tensor starts
//! on a multiple of 4096; true lengths and geometry are in the metadata.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};

use ctq_model::inventory::Part;
use serde_json::{Map, Value, json};

use crate::manifest::FORMAT_VERSION;
use crate::part_metadata::{
    ALIGNMENT, EXCEPTION_BYTES, Exception, METADATA_KEY, PartMetadata, StoredRecord, padded,
};
use crate::{Bytes, MatrixRecord, Origin, PartTiles, TensorRecord};

/// Everything that goes into one part file.
#[derive(Clone, Debug, Default)]
pub struct PartContents {
    /// What a runtime needs.
    pub tiles: PartTiles,
    /// Weight-side tensors that the tiles do not regenerate, by name.
    pub originals: BTreeMap<String, Bytes>,
    /// Exceptions of original tensors, by name; empty lists are not stored.
    pub exceptions: BTreeMap<String, Vec<Exception>>,
    /// The original tensors of this part, in the order of the inventory.
    pub tensors: Vec<TensorRecord>,
}

/// Writes the file and returns the bytes of its tensors without padding.
pub(crate) fn write_part(out: &mut impl Write, part: Part, contents: &PartContents) -> io::Result<u64> {
    let blobs = blobs(contents);
    let header = header(&metadata(part, contents)?, &blobs)?;
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let zeros = [0; ALIGNMENT];
    for blob in &blobs {
        out.write_all(&blob.bytes)?;
        out.write_all(&zeros[..padded(blob.bytes.len()) - blob.bytes.len()])?;
    }
    Ok(blobs.iter().map(|blob| blob.bytes.len() as u64).sum())
}

struct Blob<'a> {
    name: String,
    bytes: Cow<'a, [u8]>,
}

/// The file's tensors: matrices first, each with its scales behind it, in the order of their names.
fn blobs(contents: &PartContents) -> Vec<Blob<'_>> {
    let mut blobs = Vec::new();
    for (module, matrix) in &contents.tiles.matrices {
        let leaves = [
            ("codes", Some(&matrix.codes)),
            ("scales", matrix.scales.as_ref().map(|scales| &scales.bytes)),
            ("zeros", matrix.zeros.as_ref()),
            ("permutation", matrix.permutation.as_ref()),
        ];
        for (leaf, bytes) in leaves {
            if let Some(bytes) = bytes {
                blobs.push(Blob { name: format!("{module}.{leaf}"), bytes: Cow::Borrowed(bytes) });
            }
        }
    }
    for (name, vector) in &contents.tiles.vectors {
        blobs.push(Blob { name: name.clone(), bytes: Cow::Borrowed(&vector.bytes) });
    }
    for (tensor, bytes) in &contents.originals {
        blobs.push(Blob { name: format!("{tensor}.original"), bytes: Cow::Borrowed(bytes) });
    }
    for (tensor, exceptions) in contents.exceptions.iter().filter(|(_, list)| !list.is_empty()) {
        let mut bytes = Vec::with_capacity(exceptions.len() * EXCEPTION_BYTES);
        exceptions.iter().for_each(|exception| exception.write(&mut bytes));
        blobs.push(Blob { name: format!("{tensor}.exceptions"), bytes: Cow::Owned(bytes) });
    }
    blobs
}

fn metadata(part: Part, contents: &PartContents) -> io::Result<PartMetadata> {
    let tiles = &contents.tiles;
    let matrices = tiles.matrices.iter();
    let matrices =
        matrices.map(|(module, matrix)| (module.clone(), MatrixRecord::of_matrix(matrix))).collect();
    let mut tensors = BTreeMap::new();
    for record in contents.tensors.iter().filter(|record| record.origin == Origin::Stored) {
        let Some(vector) = tiles.vectors.get(&record.name) else {
            return Err(io::Error::other(format!("tensor `{}` was not handed over", record.name)));
        };
        let stored =
            StoredRecord { dtype: record.dtype, shape: record.shape.clone(), bytes: vector.bytes.len() };
        tensors.insert(record.name.clone(), stored);
    }
    let originals = contents.originals.iter().map(|(tensor, bytes)| (tensor.clone(), bytes.len())).collect();
    let exceptions = contents.exceptions.iter().filter(|(_, list)| !list.is_empty());
    let exceptions = exceptions.map(|(tensor, list)| (tensor.clone(), list.len())).collect();
    Ok(PartMetadata { format_version: FORMAT_VERSION, part, matrices, tensors, originals, exceptions })
}

/// The safetensors header, padded with spaces so that the data begins on a multiple of [`ALIGNMENT`].
fn header(metadata: &PartMetadata, blobs: &[Blob<'_>]) -> io::Result<Vec<u8>> {
    let mut header = Map::new();
    let text = serde_json::to_string(metadata)?;
    header.insert("__metadata__".to_owned(), json!({ METADATA_KEY: text }));
    let mut offset = 0;
    for blob in blobs {
        let end = offset + padded(blob.bytes.len());
        let info = json!({ "dtype": "U8", "shape": [end - offset], "data_offsets": [offset, end] });
        header.insert(blob.name.clone(), info);
        offset = end;
    }
    let mut header = serde_json::to_vec(&Value::Object(header))?;
    header.resize(padded(8 + header.len()) - 8, b' ');
    Ok(header)
}

#[cfg(test)]
mod tests {
    use ctq_model::DType;
    use safetensors::SafeTensors;

    use super::*;
    use crate::{Digest, RawVector};

    struct Full {
        room: usize,
    }

    impl Write for Full {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let written = buffer.len().min(self.room);
            self.room -= written;
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn contents() -> PartContents {
        let bytes = vec![1, 2, 3, 4, 5, 6];
        let mut contents = PartContents::default();
        contents.tensors.push(TensorRecord {
            name: "model.norm.weight".to_owned(),
            dtype: DType::BF16,
            shape: vec![3],
            sha256: Digest::of(&bytes),
            file: 0,
            origin: Origin::Stored,
        });
        let vector = RawVector { dtype: DType::BF16, bytes: bytes.into() };
        contents.tiles.vectors.insert("model.norm.weight".to_owned(), vector);
        let exceptions = vec![Exception { offset: 1 << 40, byte: 7 }, Exception { offset: 3, byte: 255 }];
        contents.exceptions.insert("a.weight_packed".to_owned(), exceptions);
        contents
    }

    #[test]
    fn any_safetensors_reader_opens_a_part_and_its_data_is_aligned() {
        let mut file = Vec::new();
        let stored = write_part(&mut file, Part::Head, &contents()).unwrap();
        assert_eq!(stored, 6 + 18);
        let tensors = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(tensors.len(), 2);
        let norm = tensors.tensor("model.norm.weight").unwrap();
        assert_eq!((norm.shape(), &norm.data()[..7]), (&[ALIGNMENT][..], &[1, 2, 3, 4, 5, 6, 0][..]));
        for name in tensors.names() {
            let start = tensors.tensor(name).unwrap().data().as_ptr() as usize - file.as_ptr() as usize;
            assert_eq!(start % ALIGNMENT, 0);
        }
    }

    #[test]
    fn a_full_disk_is_passed_on_from_wherever_it_strikes() {
        let mut file = Vec::new();
        write_part(&mut file, Part::Head, &contents()).unwrap();
        for room in [0, 7, 100, 4096, file.len() - 1] {
            let error = write_part(&mut Full { room }, Part::Head, &contents()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        }
        write_part(&mut Full { room: file.len() }, Part::Head, &contents()).unwrap();
    }
}
