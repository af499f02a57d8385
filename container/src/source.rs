//! Whatever can hand out the packed parts of a model: a container, or a checkpoint tiled on the fly.

use std::collections::BTreeMap;

use ctq_model::DType;
use ctq_model::inventory::{Inventory, Part};

use crate::{Bytes, TiledMatrix};

/// A dense vector or scalar as stored: norm weights, biases, static scales.
#[derive(Clone, Debug)]
pub struct RawVector {
    /// Element type.
    pub dtype: DType,
    /// Little-endian elements.
    pub bytes: Bytes,
}

/// One part of a model, packed.
#[derive(Clone, Debug, Default)]
pub struct PartTiles {
    /// Matrices by module name.
    pub matrices: BTreeMap<String, TiledMatrix>,
    /// Everything small, by its original tensor name: norm weights, biases, activation and key-value scales.
    pub vectors: BTreeMap<String, RawVector>,
}

/// An error of whatever stands behind a source, already told as what, where and what to do next.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// A model handed out part by part, weights packed.
pub trait LayerSource: Send + Sync {
    /// What the model consists of.
    fn inventory(&self) -> &Inventory;

    /// One part. The same bits however often and in whatever order parts are asked for.
    ///
    /// # Errors
    /// Where the part cannot be read or its tensors contradict their scheme.
    fn part(&self, part: Part) -> Result<PartTiles, SourceError>;

    /// Says that a part is wanted soon, so that its bytes may be read from the disk meanwhile. Does not wait for them, and
    /// leaves what is wrong with them to [`LayerSource::part`].
    fn prefetch(&self, part: Part) {
        let _ = part;
    }
}
