//! `ctq.json`: what a container holds and what it was made from. Plain data; FORMAT.md describes each field.

use std::path::{Path, PathBuf};

use ctq_model::DType;
use ctq_model::accounting::Accounting;
use ctq_model::inventory::{Inventory, Part};
use serde::{Deserialize, Serialize};

use crate::geometry;
use crate::{Digest, Error, Result};

/// Name of the manifest in a container.
pub const MANIFEST: &str = "ctq.json";

pub(crate) const FORMAT: &str = "ctq-container";
pub(crate) const FORMAT_VERSION: u32 = 1;

/// The manifest. It is written last, so a directory with a manifest is a complete container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `ctq-container`.
    pub format: String,
    /// Version of the format; readers refuse others.
    pub format_version: u32,
    /// The ctq that wrote it.
    pub ctq_version: String,
    /// Name of the model, for people.
    pub name: String,
    /// The checkpoint it was made from.
    pub source: SourceRecord,
    /// Bits per weight of checkpoint and container. The container's bits are all stored bytes: tiles with their
    /// padding to 64 x 64, scales, zero points, small tensors and exceptions, without the alignment of files to 4096.
    pub accounting: Accounting,
    /// The text model: shapes, schemes, tensor names.
    pub inventory: Inventory,
    /// Copies of the checkpoint's other files: configuration and tokenizer.
    pub copies: Vec<FileRecord>,
    /// The part files, in the order of a forward pass.
    pub parts: Vec<PartRecord>,
    /// Tensors of the checkpoint that scoring text does not use: not in the container.
    pub left_out: Vec<LeftOutRecord>,
}

/// The checkpoint that a container was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Its directory, absolute, as it was given.
    pub path: PathBuf,
    /// Its safetensors files in the order of their names.
    pub files: Vec<SourceFile>,
    /// SHA-256 over `config.json` and each file's name, length and header: cheap, and different for any checkpoint
    /// whose tensors differ in name, dtype, shape or place.
    pub fingerprint: Digest,
}

/// A safetensors file of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// File name inside the checkpoint.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
}

/// A file of the container that is byte for byte one of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// File name.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Of the file.
    pub sha256: Digest,
}

/// One part file and the original tensors that it regenerates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRecord {
    /// Which part.
    pub part: Part,
    /// File name.
    pub file: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Of the file.
    pub sha256: Digest,
    /// Bytes of its tensors without alignment: what [`Manifest::accounting`] counts.
    pub stored_bytes: u64,
    /// The original tensors of this part.
    pub tensors: Vec<TensorRecord>,
}

/// One tensor of the checkpoint and how to get it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Of its bytes in the checkpoint.
    pub sha256: Digest,
    /// Index in [`SourceRecord::files`] of the file it came from.
    pub file: usize,
    /// Where its bytes are.
    pub origin: Origin,
}

/// Where the bytes of an original tensor are in a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// As they were, under the tensor's own name: norm weights, biases, activation scales.
    Stored,
    /// As they were, under `<tensor>.original`: on the weight's side, and the tiles do not hold them.
    Original,
    /// In its module's tiles.
    Tiles,
    /// In its module's tiles, but for the bytes listed in `<tensor>.exceptions`.
    TilesWithExceptions,
}

/// A tensor of the checkpoint that is not in the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOutRecord {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Of its bytes in the checkpoint.
    pub sha256: Digest,
    /// Index in [`SourceRecord::files`] of the file it is in.
    pub file: usize,
}

impl TensorRecord {
    /// Bytes of the original tensor.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bytes() as u64
    }
}

/// File name of a part: `embedding.safetensors`, `layer-00000.safetensors`, ..., `head.safetensors`.
pub fn part_file_name(part: Part) -> String {
    match part {
        Part::Embedding => "embedding.safetensors".to_owned(),
        Part::Layer(index) => format!("layer-{index:05}.safetensors"),
        Part::Head => "head.safetensors".to_owned(),
    }
}

/// The first thing to read: whether the rest can be understood.
#[derive(Deserialize)]
struct Head {
    format: Option<String>,
    format_version: Option<u64>,
}

impl Manifest {
    /// Reads and checks the manifest of the container at `root`.
    pub(crate) fn read(root: &Path) -> Result<Manifest> {
        let path = root.join(MANIFEST);
        let text = std::fs::read(&path).map_err(|e| Error::io(&path, e, "check the permissions"))?;
        let foreign = |what: String| Error::NotAContainer { path: root.to_owned(), what };
        let head: Head = serde_json::from_slice(&text)
            .map_err(|e| foreign(format!("its {MANIFEST} is not a JSON object ({e})")))?;
        match (head.format.as_deref(), head.format_version) {
            (Some(FORMAT), Some(version)) if version == u64::from(FORMAT_VERSION) => {}
            (Some(FORMAT), Some(found)) => {
                return Err(Error::ForeignVersion { path, found, known: FORMAT_VERSION });
            }
            _ => return Err(foreign(format!("its {MANIFEST} does not say `format: {FORMAT}`"))),
        }
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|e| Error::part(&path, format!("the manifest is damaged ({e})")))?;
        manifest.check(&path)?;
        Ok(manifest)
    }

    /// What later code relies on: the parts are those of the inventory, and every length can be computed.
    fn check(&self, path: &Path) -> Result<()> {
        let expected: Vec<Part> = self.inventory.parts().map(|(part, _)| part).collect();
        let found: Vec<Part> = self.parts.iter().map(|record| record.part).collect();
        if expected != found {
            return Err(Error::part(path, "its list of parts is not that of its own inventory"));
        }
        if let Some(record) = self.parts.iter().find(|record| record.file != part_file_name(record.part)) {
            return Err(Error::part(path, format!("names `{}` as the file of {}", record.file, record.part)));
        }
        for record in &self.parts {
            let due = &self.inventory.part(record.part).tensors;
            if !due.iter().eq(record.tensors.iter().map(|tensor| &tensor.name)) {
                let what = format!("the tensors of {} are not those of its own inventory", record.part);
                return Err(Error::part(path, what));
            }
        }
        for linear in self.inventory.linears() {
            geometry::check_linear(linear).map_err(|what| Error::part(path, what))?;
        }
        let tensors = self.parts.iter().flat_map(|part| &part.tensors);
        let sizes = tensors.map(|tensor| (&tensor.name, &tensor.shape, tensor.file));
        for (name, shape, file) in
            sizes.chain(self.left_out.iter().map(|tensor| (&tensor.name, &tensor.shape, tensor.file)))
        {
            let elements = shape.iter().try_fold(8_usize, |product, n| product.checked_mul(*n));
            if elements.is_none() || file >= self.source.files.len() {
                return Err(Error::part(path, format!("the record of tensor `{name}` is impossible")));
            }
        }
        let inside = |name: &str| {
            !name.is_empty() && Path::new(name).file_name().is_some_and(|file| file == Path::new(name))
        };
        let names =
            self.copies.iter().map(|copy| &copy.name).chain(self.source.files.iter().map(|f| &f.name));
        match names.into_iter().find(|name| !inside(name)) {
            Some(name) => Err(Error::part(path, format!("names the file `{name}`, outside its folder"))),
            None => Ok(()),
        }
    }
}
