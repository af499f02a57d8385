//! A model by its path: a container, or a checkpoint that is tiled on the fly.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use anyhow::Context;
use ctq_container::{Container, LayerSource, MANIFEST};
use ctq_convert::TiledCheckpoint;
use ctq_model::accounting::Accounting;
use ctq_model::config::ModelConfig;
use ctq_model::{Checkpoint, Inventory, TensorSource};
use sha2::{Digest, Sha256};

use crate::args::ModelOptions;
use crate::report::Report;

/// An opened model.
pub(crate) struct Model {
    /// Last component of the path, for people.
    pub(crate) name: String,
    /// The path as given.
    pub(crate) path: PathBuf,
    kind: Kind,
    accounting: Accounting,
}

enum Kind {
    Container(Arc<Container>),
    Checkpoint(Box<TiledCheckpoint<Checkpoint>>),
}

impl Model {
    pub(crate) fn open(path: &Path, options: &ModelOptions) -> anyhow::Result<Model> {
        let (kind, accounting) = if Container::is_container(path) {
            let container = Container::open(path)?;
            let accounting = container.manifest().accounting.clone();
            (Kind::Container(Arc::new(container)), accounting)
        } else {
            let tiled = TiledCheckpoint::open(path, &options.accept_config_key)?;
            let accounting = Accounting::of(tiled.source(), tiled.inventory())?;
            (Kind::Checkpoint(Box::new(tiled)), accounting)
        };
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let name = absolute
            .file_name()
            .map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        Ok(Model { name, path: path.to_owned(), kind, accounting })
    }

    pub(crate) fn source(&self) -> &dyn LayerSource {
        match &self.kind {
            Kind::Container(container) => container.as_ref(),
            Kind::Checkpoint(tiled) => tiled.as_ref(),
        }
    }

    /// The container, where it is one.
    pub(crate) fn container(&self) -> Option<&Arc<Container>> {
        match &self.kind {
            Kind::Container(container) => Some(container),
            Kind::Checkpoint(_) => None,
        }
    }

    /// The checkpoint, where it is one.
    pub(crate) fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.kind {
            Kind::Container(_) => None,
            Kind::Checkpoint(tiled) => Some(tiled.source()),
        }
    }

    pub(crate) fn is_container(&self) -> bool {
        self.container().is_some()
    }

    pub(crate) fn accounting(&self) -> &Accounting {
        &self.accounting
    }

    /// The beginning-of-sequence token that config.json names.
    pub(crate) fn bos_token_id(&self) -> Option<u32> {
        match &self.kind {
            Kind::Container(container) => ModelConfig::open(container.root()).ok()?.bos_token_id(),
            Kind::Checkpoint(tiled) => tiled.source().config().bos_token_id(),
        }
    }

    /// The scheme in a few words: the configuration's format, or that there is none.
    pub(crate) fn scheme_label(&self) -> String {
        self.source().inventory().format.clone().unwrap_or_else(|| "dense".to_owned())
    }

    /// Names and bytes of the weight files.
    pub(crate) fn files(&self) -> Vec<(String, u64)> {
        match &self.kind {
            Kind::Container(container) => {
                container.manifest().parts.iter().map(|part| (part.file.clone(), part.bytes)).collect()
            }
            Kind::Checkpoint(tiled) => {
                let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                tiled.source().files().into_iter().map(|(path, bytes)| (name(path), bytes)).collect()
            }
        }
    }

    /// Tells this model from others wherever a copy of it lies: 64 hexadecimal digits.
    ///
    /// Of a container, the hash of its manifest, which holds the hash of every file. Of a checkpoint, the hash of what
    /// can be read in a moment: the configuration, and of each weight file its name, length, header and samples of its
    /// data. A container and its checkpoint have different ids.
    ///
    /// # Errors
    /// Where a file can no longer be read.
    pub(crate) fn content_id(&self) -> anyhow::Result<String> {
        let mut hash = Sha256::new();
        match &self.kind {
            Kind::Container(container) => {
                hash.update(b"ctq-content-container-1\n");
                add_file(&mut hash, &container.root().join(MANIFEST))?;
            }
            Kind::Checkpoint(tiled) => {
                hash.update(b"ctq-content-checkpoint-1\n");
                add_file(&mut hash, &tiled.source().root().join("config.json"))?;
                for (path, _) in tiled.source().files() {
                    add_samples(&mut hash, path).with_context(|| unreadable(path))?;
                }
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Tells this model, as its files are now, from any other: what resume state is kept under.
    pub(crate) fn identity(&self) -> String {
        let root = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        let mut identity = root.display().to_string();
        for (name, bytes) in self.files() {
            let modified = fs::metadata(root.join(&name)).and_then(|m| m.modified()).ok();
            let stamp = modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
            identity.push_str(&format!("\n{name} {bytes} {stamp}"));
        }
        identity
    }
}

/// Bytes of one sample of a weight file.
const SAMPLE: u64 = 4096;
/// Samples of one file, the first at the start of its data and the last at the end.
const SAMPLES: u64 = 16;

fn unreadable(path: &Path) -> String {
    format!("{}: cannot be read; check that it is still there", path.display())
}

/// A small file, whole.
fn add_file(hash: &mut Sha256, path: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(path).with_context(|| unreadable(path))?;
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(&bytes);
    Ok(())
}

/// Name, length, header and samples of a safetensors file.
fn add_samples(hash: &mut Sha256, path: &Path) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name.as_bytes());
    hash.update(length.to_le_bytes());
    let mut header_length = [0; 8];
    file.read_exact(&mut header_length)?;
    let data = length.min(u64::from_le_bytes(header_length).saturating_add(8));
    hash.update(header_length);
    add_range(hash, &mut file, 8, data - 8)?;
    let room = length - data;
    if room <= SAMPLE * SAMPLES {
        return add_range(hash, &mut file, data, room);
    }
    (0..SAMPLES).try_for_each(|sample| {
        // Quotients of products that 64 bits hold: no file has 2^60 bytes.
        add_range(hash, &mut file, data + (room - SAMPLE) * sample / (SAMPLES - 1), SAMPLE)
    })
}

fn add_range(hash: &mut Sha256, file: &mut File, start: u64, length: u64) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes)?;
    hash.update(&bytes);
    Ok(())
}

/// Says so where the decoder holds tensors that its configuration does not ask for: the library does not use them
/// either, yet a wrong number of layers or a missing bias would look like this.
pub(crate) fn warn_of_unused(path: &Path, inventory: &Inventory, report: &Report) {
    let layers = inventory.spec.blocks.first().and_then(|block| block.attention.module.split_once("0."));
    let Some((prefix, _)) = layers else { return };
    let unused: Vec<&String> = inventory
        .left_out
        .iter()
        .filter(|name| name.starts_with(prefix) && !name.ends_with(".inv_freq"))
        .collect();
    if let Some(first) = unused.first() {
        report.warning(&format!(
            "{}: {} tensors of the decoder are not used, such as `{first}`: config.json asks for {} layers without them; compare it with that of the original model",
            path.display(),
            unused.len(),
            inventory.spec.blocks.len()
        ));
    }
}
