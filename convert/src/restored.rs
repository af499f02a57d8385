//! A container seen as the checkpoint it was made from: original tensors, regenerated one at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use ctq_container::{Container, TensorRecord};
use ctq_model::checkpoint::TensorInfo;
use ctq_model::config::ModelConfig;
use ctq_model::{Tensor, TensorSource};

use crate::original::Cache;
use crate::{Error, Result};

/// The original tensors of a container, without those that were left out.
#[derive(Debug)]
pub struct RestoredSource {
    container: Arc<Container>,
    config: ModelConfig,
    /// Tensor name to (part, tensor) in the manifest.
    places: BTreeMap<String, (usize, usize)>,
    files: Vec<PathBuf>,
    cache: Mutex<Cache>,
}

impl RestoredSource {
    /// Prepares to regenerate the tensors of `container`.
    ///
    /// # Errors
    /// Where its copy of `config.json` cannot be read.
    pub fn new(container: Arc<Container>) -> Result<RestoredSource> {
        let config = ModelConfig::open(container.root())?;
        let parts = &container.manifest().parts;
        let mut places = BTreeMap::new();
        for (part, record) in parts.iter().enumerate() {
            for (index, tensor) in record.tensors.iter().enumerate() {
                places.insert(tensor.name.clone(), (part, index));
            }
        }
        let files = parts.iter().map(|record| container.root().join(&record.file)).collect();
        Ok(RestoredSource { container, config, places, files, cache: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().expect("nothing panics while it is held")
    }

    fn record(&self, name: &str) -> Option<(usize, &TensorRecord)> {
        let (part, index) = *self.places.get(name)?;
        Some((part, &self.container.manifest().parts[part].tensors[index]))
    }
}

impl TensorSource for RestoredSource {
    fn root(&self) -> &Path {
        self.container.root()
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn names(&self) -> Vec<&str> {
        self.places.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (_, record) = self.record(name)?;
        Some(TensorInfo { dtype: record.dtype, shape: record.shape.clone() })
    }

    fn file_of(&self, name: &str) -> &Path {
        self.record(name).map_or(self.container.root(), |(part, _)| &self.files[part])
    }

    fn tensor(&self, name: &str) -> ctq_model::Result<Option<Tensor<'_>>> {
        let Some((part, record)) = self.record(name) else { return Ok(None) };
        // The lock is not held while regenerating: that uses the thread pool, whose threads may come back here.
        let mut cache = self.lock().clone();
        let bytes = cache.tensor(&self.container, self.container.manifest().parts[part].part, record);
        *self.lock() = cache;
        let file = &self.files[part];
        match bytes {
            Ok(bytes) => Ok(Some(Tensor {
                dtype: record.dtype,
                shape: record.shape.clone(),
                bytes: Cow::Owned(bytes),
                file,
            })),
            Err(Error::Checkpoint(error)) => Err(error),
            Err(error) => Err(ctq_model::Error::tensor(
                file,
                name,
                format!("cannot be regenerated: {error}"),
                "check the container with `ctq verify`",
            )),
        }
    }
}
