//! Every negative log-likelihood of an evaluation in one safetensors file, so that any two runs can be
//! compared later.
//!
//! Four tensors of n entries, in window order, then position order: `window` I64, `position` I64 (in the
//! window), `token` I64 (in the stream), `nll` F64 (nats). Metadata: `protocol_id`, `method_id`, `preset`.
//! Knows nothing of what the ids hash. The header is written here and not by the safetensors crate, whose
//! metadata come in the order of a hash map: equal results give equal files.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use crate::statistics::{Paired, ScoredToken, paired};
use crate::{Error, Result, atomic};

/// The contents of such a file.
#[derive(Clone, Debug, PartialEq)]
pub struct NllFile {
    /// The question: [`crate::protocol::protocol_id`].
    pub protocol_id: String,
    /// The method: [`crate::record::Method::id`].
    pub method_id: String,
    /// The protocol's label, for people.
    pub preset: String,
    /// The scores.
    pub tokens: Vec<ScoredToken>,
}

/// The names of the tensors, in the order of their data.
const TENSORS: [(&str, &str); 4] = [("window", "I64"), ("position", "I64"), ("token", "I64"), ("nll", "F64")];

impl NllFile {
    /// Writes the file atomically.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut bytes = self.header();
        let index = |value: usize| (value as u64).to_le_bytes();
        bytes.extend(self.tokens.iter().flat_map(|scored| index(scored.window)));
        bytes.extend(self.tokens.iter().flat_map(|scored| index(scored.position)));
        bytes.extend(self.tokens.iter().flat_map(|scored| index(scored.token)));
        bytes.extend(self.tokens.iter().flat_map(|scored| scored.nll.to_le_bytes()));
        atomic::write(path, &bytes)
    }

    /// The safetensors header: its length in 8 bytes, then JSON padded with spaces to a multiple of 8.
    fn header(&self) -> Vec<u8> {
        let tensor_bytes = 8 * self.tokens.len();
        let mut header = serde_json::Map::new();
        let metadata = serde_json::json!({
            "protocol_id": self.protocol_id, "method_id": self.method_id, "preset": self.preset,
        });
        header.insert("__metadata__".to_owned(), metadata);
        for (place, (name, dtype)) in TENSORS.into_iter().enumerate() {
            let offsets = [place * tensor_bytes, (place + 1) * tensor_bytes];
            let entry = serde_json::json!({
                "dtype": dtype, "shape": [self.tokens.len()], "data_offsets": offsets,
            });
            header.insert(name.to_owned(), entry);
        }
        let mut json = serde_json::Value::Object(header).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut json);
        bytes
    }

    /// How these scores differ from `base`, position by position.
    ///
    /// # Errors
    /// [`Error::NotComparable`] if the protocol ids or positions differ; otherwise as [`paired`].
    pub fn paired(&self, base: &NllFile) -> Result<Paired> {
        if self.protocol_id != base.protocol_id {
            let what = format!(
                "the protocol id is {} ({}) in one file and {} ({}) in the other",
                self.protocol_id, self.preset, base.protocol_id, base.preset
            );
            return Err(Error::NotComparable { what });
        }
        paired(&self.tokens, &base.tokens)
    }

    /// Reads the file.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::BadNllFile`] for a file of another kind.
    pub fn read(path: &Path) -> Result<NllFile> {
        let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
        parse(&bytes).map_err(|what| Error::BadNllFile { path: path.to_path_buf(), what })
    }
}

fn parse(bytes: &[u8]) -> std::result::Result<NllFile, String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let text = |key: &str| {
        let found = metadata.metadata().as_ref().and_then(|map| map.get(key));
        found.cloned().ok_or_else(|| format!("its metadata have no {key}"))
    };
    let index = |name: &str| -> std::result::Result<Vec<usize>, String> {
        let words = column(&tensors, name, Dtype::I64)?;
        let index = |word: [u8; 8]| usize::try_from(i64::from_le_bytes(word)).map_err(|_| negative(name));
        words.into_iter().map(index).collect()
    };
    let (windows, positions, stream) = (index("window")?, index("position")?, index("token")?);
    let nll = column(&tensors, "nll", Dtype::F64)?;
    if [windows.len(), positions.len(), stream.len()] != [nll.len(); 3] {
        return Err("its tensors differ in length".to_owned());
    }
    let places = windows.into_iter().zip(positions).zip(stream).zip(nll);
    let tokens = places
        .map(|(((window, position), token), nll)| ScoredToken {
            window,
            position,
            token,
            nll: f64::from_le_bytes(nll),
        })
        .collect();
    Ok(NllFile {
        protocol_id: text("protocol_id")?,
        method_id: text("method_id")?,
        preset: text("preset")?,
        tokens,
    })
}

fn negative(name: &str) -> String {
    format!("tensor {name} holds a negative index")
}

/// The 8-byte words of a tensor of one dimension.
fn column(tensors: &SafeTensors<'_>, name: &str, dtype: Dtype) -> std::result::Result<Vec<[u8; 8]>, String> {
    let tensor = tensors.tensor(name).map_err(|_| format!("it has no tensor {name}"))?;
    if tensor.dtype() != dtype || tensor.shape().len() != 1 {
        return Err(format!("tensor {name} is no list of {dtype:?}"));
    }
    let (words, _) = tensor.data().as_chunks::<8>();
    Ok(words.to_vec())
}
