//! Writing the original tensors of a container as a checkpoint again: the same files, every tensor byte for byte, built
//! beside and renamed. Tensors that were left out of the container do not come back; the caller is given their names.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ctq_container::{Container, Digest, PartRecord, TensorRecord, check_space};
use ctq_model::DType;
use serde_json::{Map, Value, json};

use crate::original::Cache;
use crate::{Error, Result};

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Files written, in the order of their names.
    pub files: Vec<String>,
    /// Tensors written.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Tensors of the original checkpoint that the container does not hold.
    pub left_out: Vec<String>,
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Writes the checkpoint that `container` was made from into `directory`, which must be new or empty. The safetensors
/// files have the names of the original ones and hold the same tensors; their headers may differ.
///
/// # Errors
/// Where the directory is in use, the disk is full, or a tensor does not come back with the hash that was taken of it.
/// Nothing is left behind then.
pub fn restore(container: &Container, directory: &Path) -> Result<Restored> {
    let parent = check_output(directory)?;
    let beside = tempfile::Builder::new().prefix(".ctq-restore-").tempdir_in(parent);
    let beside = beside.map_err(|e| Error::write(directory, e))?;
    let layout = Layout::of(container);
    check_space(parent, layout.bytes(), 0, container.manifest().parts.len())?;
    let mut files = write(container, &layout, beside.path()).map_err(|error| named(error, directory))?;
    take_place(&beside.keep(), directory)?;
    files.sort();
    let manifest = container.manifest();
    Ok(Restored {
        files,
        tensors: manifest.parts.iter().map(|part| part.tensors.len()).sum(),
        bytes: layout.bytes(),
        left_out: manifest.left_out.iter().map(|record| record.name.clone()).collect(),
    })
}

/// Writes all files and gives their names.
fn write(container: &Container, layout: &Layout<'_>, directory: &Path) -> Result<Vec<String>> {
    layout.write_shards(container, directory)?;
    let mut files: Vec<String> = layout.shards.iter().map(|shard| shard.name.clone()).collect();
    files.extend(layout.write_index(directory)?);
    for copy in &container.manifest().copies {
        let (from, to) = (container.root().join(&copy.name), directory.join(&copy.name));
        fs::copy(from, &to).map_err(|e| Error::write(&to, e))?;
        files.push(copy.name.clone());
    }
    Ok(files)
}

/// A failure names the file that was asked for, not the temporary one beside it.
fn named(error: Error, directory: &Path) -> Error {
    match error {
        Error::Write { path, source } => {
            Error::Write { path: directory.join(path.file_name().unwrap_or_default()), source }
        }
        other => other,
    }
}

fn check_output(directory: &Path) -> Result<&Path> {
    let bad = |what: &str, next: &str| Error::BadOutput {
        path: directory.to_owned(),
        what: what.to_owned(),
        next: next.to_owned(),
    };
    if directory.exists() {
        let entries = fs::read_dir(directory)
            .map_err(|_| bad("it is not a folder that can be read", "choose another path"))?;
        if entries.count() > 0 {
            return Err(bad("it is not empty", "choose a new or an empty folder"));
        }
    }
    let parent = match directory.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) | None => Path::new("."),
    };
    if !parent.is_dir() {
        return Err(bad("its parent is not a folder", "create it first, or choose another path"));
    }
    Ok(parent)
}

/// Renames the finished checkpoint; an empty directory gives way.
fn take_place(beside: &Path, directory: &Path) -> Result<()> {
    let renamed = || -> io::Result<()> {
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // A temporary directory is private; a checkpoint is readable like any other folder.
            fs::set_permissions(beside, fs::Permissions::from_mode(0o755))?;
        }
        if directory.exists() {
            fs::remove_dir(directory)?;
        }
        fs::rename(beside, directory)
    };
    renamed().map_err(|e| {
        let _ = fs::remove_dir_all(beside);
        Error::write(directory, e)
    })
}

/// Which tensor goes where.
struct Layout<'a> {
    shards: Vec<Shard<'a>>,
}

struct Shard<'a> {
    name: String,
    /// In the order of the file, each with its offset in the data.
    tensors: Vec<(u64, &'a TensorRecord)>,
    bytes: u64,
}

impl<'a> Layout<'a> {
    fn of(container: &'a Container) -> Layout<'a> {
        let manifest = container.manifest();
        let mut by_file: BTreeMap<usize, Vec<&TensorRecord>> = BTreeMap::new();
        for record in manifest.parts.iter().flat_map(|part| &part.tensors) {
            by_file.entry(record.file).or_default().push(record);
        }
        let shards = by_file.into_iter().map(|(file, mut records)| {
            // Wide elements first, as the safetensors library does it: every tensor is aligned to its element.
            records.sort_by_key(|record| (Reverse(record.dtype.bytes()), &record.name));
            let mut bytes = 0;
            let mut tensors = Vec::with_capacity(records.len());
            for record in records {
                tensors.push((bytes, record));
                bytes += record.bytes();
            }
            Shard { name: manifest.source.files[file].name.clone(), tensors, bytes }
        });
        Layout { shards: shards.collect() }
    }

    fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }

    /// Writes all shards, part by part, so that no more than one matrix is unpacked at a time.
    fn write_shards(&self, container: &Container, root: &Path) -> Result<()> {
        let mut files = Vec::with_capacity(self.shards.len());
        let mut places = BTreeMap::new();
        for (index, shard) in self.shards.iter().enumerate() {
            let path = root.join(&shard.name);
            let (file, data) = shard.begin(&path).map_err(|e| Error::write(&path, e))?;
            files.push((path, file));
            places
                .extend(shard.tensors.iter().map(|(at, record)| (record.name.as_str(), (index, data + at))));
        }
        for part in &container.manifest().parts {
            write_part(container, part, &places, &mut files)?;
        }
        for (path, file) in files {
            file.sync_all().map_err(|e| Error::write(&path, e))?;
        }
        Ok(())
    }

    /// Writes the index of several files; a single one needs none.
    fn write_index(&self, root: &Path) -> Result<Option<String>> {
        if let [shard] = &self.shards[..]
            && shard.name == SINGLE
        {
            return Ok(None);
        }
        let mut places: Vec<(&str, &str)> = Vec::new();
        for shard in &self.shards {
            places
                .extend(shard.tensors.iter().map(|(_, record)| (record.name.as_str(), shard.name.as_str())));
        }
        places.sort_unstable();
        let map: Map<String, Value> =
            places.into_iter().map(|(name, file)| (name.to_owned(), Value::from(file))).collect();
        let index = json!({ "metadata": { "total_size": self.bytes() }, "weight_map": map });
        let path = root.join(INDEX);
        fs::write(&path, format!("{index:#}\n")).map_err(|e| Error::write(&path, e))?;
        Ok(Some(INDEX.to_owned()))
    }
}

fn write_part(
    container: &Container,
    part: &PartRecord,
    places: &BTreeMap<&str, (usize, u64)>,
    files: &mut [(PathBuf, File)],
) -> Result<()> {
    let mut cache = Cache::default();
    for record in &part.tensors {
        let bytes = cache.tensor(container, part.part, record)?;
        if Digest::of(&bytes) != record.sha256 {
            let path = container.root().join(&part.file);
            return Err(Error::not_restored(&path, &record.name, "its hash is not that of the original"));
        }
        let (shard, at) = places[record.name.as_str()];
        let (path, file) = &mut files[shard];
        let written = file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(&bytes));
        written.map_err(|e| Error::write(path, e))?;
    }
    Ok(())
}

impl Shard<'_> {
    /// Creates the file with its header; returns it with the place where its data begins.
    fn begin(&self, path: &Path) -> io::Result<(File, u64)> {
        let mut header = Map::new();
        // Loaders of transformers insist on this key.
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        for (at, record) in &self.tensors {
            let dtype: DType = record.dtype;
            let offsets = [*at, at + record.bytes()];
            let info = json!({ "dtype": dtype.name(), "shape": record.shape, "data_offsets": offsets });
            header.insert(record.name.clone(), info);
        }
        let mut header = serde_json::to_vec(&Value::Object(header))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let data = 8 + header.len() as u64;
        let mut file = File::create(path)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        file.set_len(data + self.bytes)?;
        Ok((file, data))
    }
}
