//! A checkpoint directory: one safetensors file, or several behind an index, mapped and looked up by tensor name.
//!
//! Knows files and names; does not know what a tensor means.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::ModelConfig;
use crate::shard::{Entry, Shard};
use crate::{DType, Error, Result};

/// A stored tensor: little-endian bytes, row-major.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// `product(shape) * dtype.bytes()` bytes.
    pub bytes: Cow<'a, [u8]>,
    /// The file it came from, for messages.
    pub file: &'a Path,
}

impl Tensor<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Shape and place of a tensor, without its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Stored bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bytes() as u64
    }
}

/// Whatever can hand out the original tensors of a checkpoint: the checkpoint itself, or a container's inverse.
///
/// The oracle reads through this trait, so that it can check a container whose source is gone.
pub trait TensorSource: Send + Sync {
    /// Where the tensors come from, for messages.
    fn root(&self) -> &Path;
    /// The parsed `config.json`.
    fn config(&self) -> &ModelConfig;
    /// All tensor names, sorted.
    fn names(&self) -> Vec<&str>;
    /// Dtype and shape of a tensor, `None` if there is none of that name.
    fn info(&self, name: &str) -> Option<TensorInfo>;
    /// The file that holds the tensor, for messages; the root where there is none.
    fn file_of(&self, name: &str) -> &Path;
    /// The tensor itself, `None` if there is none of that name.
    ///
    /// # Errors
    /// Where the bytes must be regenerated and cannot be.
    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>>;

    /// Says that a tensor is wanted soon, so that its bytes may be read from the disk meanwhile. Does not wait for them.
    fn prefetch(&self, name: &str) {
        let _ = name;
    }
}

/// A compressed-tensors (or dense) checkpoint on disk.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    config: ModelConfig,
    shards: Vec<Shard>,
    /// Tensor name to (shard, entry). Ordered, because order reaches output.
    tensors: BTreeMap<String, (usize, Entry)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

impl Checkpoint {
    /// Opens the directory: parses `config.json`, maps every shard, checks headers against file lengths.
    ///
    /// # Errors
    /// Names the file and tensor that are missing, truncated, overlapping, or not safetensors at all.
    pub fn open(root: &Path) -> Result<Checkpoint> {
        if !root.is_dir() {
            let what = if root.exists() { "it is a file" } else { "there is no such directory" };
            return Err(Error::NotACheckpoint {
                path: root.to_owned(),
                what: what.to_owned(),
                next: "give the folder that holds config.json and model.safetensors".to_owned(),
            });
        }
        let config = ModelConfig::open(root)?;
        let files = shard_files(root)?;
        let mut shards = Vec::with_capacity(files.len());
        let mut tensors = BTreeMap::new();
        for path in &files {
            let (shard, entries) = Shard::open(path)?;
            for (name, entry) in entries {
                if let Some((other, _)) = tensors.insert(name.clone(), (shards.len(), entry)) {
                    let first: &Shard = shards.get(other).unwrap_or(&shard);
                    return Err(Error::tensor(
                        path,
                        &name,
                        format!("stored twice, also in {}", first.path.display()),
                        "remove the shard that does not belong to this checkpoint",
                    ));
                }
            }
            shards.push(shard);
        }
        check_index(root, &tensors)?;
        Ok(Checkpoint { root: root.to_owned(), config, shards, tensors })
    }

    /// Paths and lengths in bytes of the safetensors files.
    pub fn files(&self) -> Vec<(&Path, u64)> {
        self.shards.iter().map(|shard| (shard.path.as_path(), shard.length())).collect()
    }
}

impl TensorSource for Checkpoint {
    fn root(&self) -> &Path {
        &self.root
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (_, entry) = self.tensors.get(name)?;
        Some(TensorInfo { dtype: entry.dtype, shape: entry.shape.clone() })
    }

    fn file_of(&self, name: &str) -> &Path {
        match self.tensors.get(name) {
            Some((shard, _)) => &self.shards[*shard].path,
            None => &self.root,
        }
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>> {
        Ok(self.tensors.get(name).map(|(shard, entry)| {
            let shard = &self.shards[*shard];
            Tensor {
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                bytes: Cow::Borrowed(shard.bytes(entry)),
                file: &shard.path,
            }
        }))
    }

    fn prefetch(&self, name: &str) {
        if let Some((shard, entry)) = self.tensors.get(name) {
            self.shards[*shard].prefetch(entry);
        }
    }
}

/// The shards of a checkpoint: those the index names, else `model.safetensors`.
fn shard_files(root: &Path) -> Result<Vec<PathBuf>> {
    if let Some(index) = read_index(root)? {
        let mut files: Vec<PathBuf> = index.weight_map.values().map(|file| root.join(file)).collect();
        files.sort();
        files.dedup();
        for path in &files {
            if !path.is_file() {
                let tensor = index.weight_map.iter().find(|(_, file)| root.join(file) == *path);
                let tensor = tensor.map_or("", |(name, _)| name.as_str());
                return Err(Error::Shard {
                    path: path.clone(),
                    what: format!("this shard is missing; {INDEX} places `{tensor}` in it"),
                    next: "download the missing shard into the checkpoint".to_owned(),
                });
            }
        }
        return Ok(files);
    }
    let single = root.join(SINGLE);
    if single.is_file() {
        return Ok(vec![single]);
    }
    Err(Error::NotACheckpoint {
        path: root.to_owned(),
        what: format!("it has neither {SINGLE} nor {INDEX}"),
        next: "give the folder that holds the safetensors files of the model".to_owned(),
    })
}

fn read_index(root: &Path) -> Result<Option<Index>> {
    let path = root.join(INDEX);
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read(&path).map_err(|e| Error::io(&path, e, "check the permissions"))?;
    let broken =
        |what: String| Error::Shard { path: path.clone(), what, next: "download the index again".to_owned() };
    let index: Index =
        serde_json::from_slice(&text).map_err(|e| broken(format!("not a safetensors index ({e})")))?;
    // A shard lives beside its index: a path that climbs out of the folder is not a shard of this checkpoint.
    for (tensor, file) in &index.weight_map {
        let plain = Path::new(file).components().all(|c| matches!(c, std::path::Component::Normal(_)));
        if !plain {
            return Err(broken(format!("places `{tensor}` in `{file}`, outside the checkpoint")));
        }
    }
    Ok(Some(index))
}

/// Every tensor of the index must be in the shards.
fn check_index(root: &Path, tensors: &BTreeMap<String, (usize, Entry)>) -> Result<()> {
    let Some(index) = read_index(root)? else { return Ok(()) };
    for (name, file) in &index.weight_map {
        if !tensors.contains_key(name) {
            return Err(Error::MissingTensor {
                path: root.join(file),
                tensor: name.clone(),
                what: format!("{INDEX} places it in this shard"),
                next: "download this shard again: it does not belong to this index".to_owned(),
            });
        }
    }
    Ok(())
}
