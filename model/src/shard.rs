//! One safetensors file, mapped and checked. Knows its header; knows nothing of other files or of schemes.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use crate::{DType, Error, Result};

/// Where one tensor lies in its shard.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) begin: usize,
    pub(crate) end: usize,
}

/// A mapped safetensors file whose header has been checked against its length.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    map: Mmap,
    data: usize,
}

const DOWNLOAD: &str = "the file is damaged or incomplete: download or write it again";

impl Shard {
    /// Maps `path` and returns the file with its entries in header order.
    pub(crate) fn open(path: &Path) -> Result<(Shard, Vec<(String, Entry)>)> {
        let file =
            File::open(path).map_err(|e| Error::io(path, e, "check that the file exists and can be read"))?;
        let length = file.metadata().map_err(|e| Error::io(path, e, "check the file system"))?.len();
        let broken = |what: String| Error::Shard { path: path.to_owned(), what, next: DOWNLOAD.to_owned() };
        if length < 8 {
            return Err(broken(format!("{length} bytes are too few for a safetensors file")));
        }
        // SAFETY: the map is read-only and private to this process's view; like every mapping reader we rely on
        // nobody truncating the file while it is open (documented in FORMAT.md).
        #[expect(unsafe_code, reason = "mapping a file is how a 100 GB checkpoint is read in bounded memory")]
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e, "check the file system"))?;
        let header_length = u64::from_le_bytes(map[..8].try_into().expect("eight bytes"));
        if header_length > length - 8 {
            return Err(broken(format!(
                "its header claims {header_length} bytes, past the end of a file of {length} bytes"
            )));
        }
        let (header_end, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| broken(explain(&map, header_length, &e)))?;
        let entries = entries(path, &metadata)?;
        Ok((Shard { path: path.to_owned(), map, data: 8 + header_end }, entries))
    }

    pub(crate) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[self.data + entry.begin..self.data + entry.end]
    }

    /// Has a tensor's pages read from the disk meanwhile; where the advice is not taken, reading is only slower.
    pub(crate) fn prefetch(&self, entry: &Entry) {
        #[cfg(unix)]
        let _ = self.map.advise_range(
            memmap2::Advice::WillNeed,
            self.data + entry.begin,
            entry.end - entry.begin,
        );
    }

    pub(crate) fn length(&self) -> u64 {
        self.map.len() as u64
    }
}

fn entries(path: &Path, metadata: &Metadata) -> Result<Vec<(String, Entry)>> {
    let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    tensors
        .into_iter()
        .map(|(name, info)| {
            let dtype = DType::from_safetensors(info.dtype).ok_or_else(|| {
                Error::tensor(
                    path,
                    &name,
                    format!("element type {:?} is not known to ctq", info.dtype),
                    "write the checkpoint with one of the compressed-tensors formats",
                )
            })?;
            let (begin, end) = info.data_offsets;
            Ok((name, Entry { dtype, shape: info.shape.clone(), begin, end }))
        })
        .collect()
}

/// Turns the parser's verdict into a sentence, naming the tensor where the header lets us find it.
fn explain(map: &[u8], header_length: u64, error: &safetensors::SafeTensorError) -> String {
    use safetensors::SafeTensorError as E;
    match error {
        E::InvalidOffset(name) => {
            format!("tensor `{name}`: its data offsets overlap another tensor's or leave a gap")
        }
        E::MetadataIncompleteBuffer => {
            let have = map.len() as u64 - 8 - header_length;
            match furthest_tensor(map, header_length) {
                Some((name, end)) => {
                    format!(
                        "truncated: tensor `{name}` ends at byte {end} of the data, {have} bytes are there"
                    )
                }
                None => format!("the data part is {have} bytes, not what the header describes"),
            }
        }
        E::TensorInvalidInfo => "a tensor's shape, dtype and data offsets contradict one another".to_owned(),
        other => format!("not a valid safetensors header ({other})"),
    }
}

fn furthest_tensor(map: &[u8], header_length: u64) -> Option<(String, u64)> {
    let header = map.get(8..8 + header_length as usize)?;
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    header
        .iter()
        .filter_map(|(name, info)| Some((name.clone(), info.get("data_offsets")?.get(1)?.as_u64()?)))
        .max_by_key(|(_, end)| *end)
}
