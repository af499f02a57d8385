//! Writing one part file: a safetensors file of bytes, every tensor and the header padded so that each tensor starts
//! on a multiple of 4096; true lengths and geometry are in the metadata.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};

use ctq_model::inventory::Part;
use rayon::ThreadPool;
use serde_json::{Map, Value, json};

use crate::manifest::FORMAT_VERSION;
use crate::part_metadata::{
    ALIGNMENT, EXCEPTION_BYTES, Exception, METADATA_KEY, PartMetadata, StoredRecord, padded,
};
use crate::streamed::{self, PartTensor, Section, StreamedMatrix};
use crate::{Bytes, Digest, MatrixRecord, Origin, RawVector, TensorRecord};

/// Everything that goes into one part file.
#[derive(Default)]
pub struct PartContents<'a> {
    /// Matrices by module name.
    pub matrices: BTreeMap<String, StreamedMatrix<'a>>,
    /// Everything small, by its original tensor name.
    pub vectors: BTreeMap<String, RawVector>,
    /// Weight-side tensors that the tiles do not regenerate, by name.
    pub originals: BTreeMap<String, Bytes>,
    /// Exceptions of original tensors, by name; empty lists are not stored.
    pub exceptions: BTreeMap<String, Vec<Exception>>,
    /// The original tensors of this part, in the order of the inventory.
    pub tensors: Vec<PartTensor>,
}

/// What [`write_part`] wrote.
#[derive(Debug)]
pub(crate) struct Written {
    /// Length of the file.
    pub(crate) bytes: u64,
    /// Digest of the file.
    pub(crate) sha256: Digest,
    /// Bytes of its tensors without padding.
    pub(crate) stored_bytes: u64,
    /// The original tensors.
    pub(crate) tensors: Vec<TensorRecord>,
}

/// Writes the file; what can be done at once is done by `pool`.
pub(crate) fn write_part(
    out: &mut (impl Write + Send),
    part: Part,
    contents: &PartContents<'_>,
    pool: &ThreadPool,
) -> io::Result<Written> {
    let blobs = blobs(contents);
    let header = header(&metadata(part, contents)?, &blobs)?;
    let length = (header.len() as u64).to_le_bytes();
    let zeros = [0; ALIGNMENT];
    let mut sections = vec![Section::Bytes(&length), Section::Bytes(&header)];
    for blob in &blobs {
        sections.push(match &blob.content {
            Content::Bytes(bytes) => Section::Bytes(bytes),
            Content::Codes(module, matrix) => Section::Codes { module, codes: &*matrix.codes },
        });
        sections.push(Section::Bytes(&zeros[..padded(blob.length()) - blob.length()]));
    }
    let streamed = streamed::write(out, &sections, pool)?;
    let tensors = contents.tensors.iter().map(|tensor| {
        let missing = || io::Error::other(format!("the codes of `{}` were not handed over", tensor.name));
        tensor.record(&streamed.of_codes).ok_or_else(missing)
    });
    Ok(Written {
        bytes: streamed.bytes,
        sha256: streamed.sha256,
        stored_bytes: blobs.iter().map(|blob| blob.length() as u64).sum(),
        tensors: tensors.collect::<io::Result<_>>()?,
    })
}

struct Blob<'a> {
    name: String,
    content: Content<'a>,
}

enum Content<'a> {
    Bytes(Cow<'a, [u8]>),
    /// The codes of a module.
    Codes(&'a str, &'a StreamedMatrix<'a>),
}

impl Blob<'_> {
    fn length(&self) -> usize {
        match &self.content {
            Content::Bytes(bytes) => bytes.len(),
            Content::Codes(_, matrix) => matrix.code_bytes(),
        }
    }
}

/// The file's tensors: matrices first, each with its scales behind it, in the order of their names.
fn blobs<'a>(contents: &'a PartContents<'_>) -> Vec<Blob<'a>> {
    let mut blobs = Vec::new();
    let borrowed = |bytes: &'a Bytes| Content::Bytes(Cow::Borrowed(&**bytes));
    for (module, streamed) in &contents.matrices {
        let matrix = &streamed.matrix;
        blobs.push(Blob { name: format!("{module}.codes"), content: Content::Codes(module, streamed) });
        let leaves = [
            ("scales", matrix.scales.as_ref().map(|scales| &scales.bytes)),
            ("zeros", matrix.zeros.as_ref()),
            ("permutation", matrix.permutation.as_ref()),
        ];
        for (leaf, bytes) in leaves {
            if let Some(bytes) = bytes {
                blobs.push(Blob { name: format!("{module}.{leaf}"), content: borrowed(bytes) });
            }
        }
    }
    for (name, vector) in &contents.vectors {
        blobs.push(Blob { name: name.clone(), content: borrowed(&vector.bytes) });
    }
    for (tensor, bytes) in &contents.originals {
        blobs.push(Blob { name: format!("{tensor}.original"), content: borrowed(bytes) });
    }
    for (tensor, exceptions) in contents.exceptions.iter().filter(|(_, list)| !list.is_empty()) {
        let mut bytes = Vec::with_capacity(exceptions.len() * EXCEPTION_BYTES);
        exceptions.iter().for_each(|exception| exception.write(&mut bytes));
        let content = Content::Bytes(Cow::Owned(bytes));
        blobs.push(Blob { name: format!("{tensor}.exceptions"), content });
    }
    blobs
}

fn metadata(part: Part, contents: &PartContents<'_>) -> io::Result<PartMetadata> {
    let record = |streamed: &StreamedMatrix<'_>| MatrixRecord {
        codes: streamed.code_bytes(),
        ..MatrixRecord::of_matrix(&streamed.matrix)
    };
    let matrices =
        contents.matrices.iter().map(|(module, matrix)| (module.clone(), record(matrix))).collect();
    let mut tensors = BTreeMap::new();
    for record in contents.tensors.iter().filter(|record| record.origin == Origin::Stored) {
        let Some(vector) = contents.vectors.get(&record.name) else {
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
        let end = offset + padded(blob.length());
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
    use crate::TensorDigest;

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

    fn pool() -> ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap()
    }

    fn contents() -> PartContents<'static> {
        let bytes = vec![1, 2, 3, 4, 5, 6];
        let mut contents = PartContents::default();
        contents.tensors.push(PartTensor {
            name: "model.norm.weight".to_owned(),
            dtype: DType::BF16,
            shape: vec![3],
            sha256: TensorDigest::Known(Digest::of(&bytes)),
            file: 0,
            origin: Origin::Stored,
        });
        let vector = RawVector { dtype: DType::BF16, bytes: bytes.into() };
        contents.vectors.insert("model.norm.weight".to_owned(), vector);
        let exceptions = vec![Exception { offset: 1 << 40, byte: 7 }, Exception { offset: 3, byte: 255 }];
        contents.exceptions.insert("a.weight_packed".to_owned(), exceptions);
        contents
    }

    #[test]
    fn any_safetensors_reader_opens_a_part_and_its_data_is_aligned() {
        let mut file = Vec::new();
        let written = write_part(&mut file, Part::Head, &contents(), &pool()).unwrap();
        assert_eq!(written.stored_bytes, 6 + 18);
        assert_eq!((written.bytes, written.sha256), (file.len() as u64, Digest::of(&file)));
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
        write_part(&mut file, Part::Head, &contents(), &pool()).unwrap();
        for room in [0, 7, 100, 4096, file.len() - 1] {
            let error = write_part(&mut Full { room }, Part::Head, &contents(), &pool()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        }
        write_part(&mut Full { room: file.len() }, Part::Head, &contents(), &pool()).unwrap();
    }
}
