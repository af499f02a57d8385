//! A checkpoint handed to a runtime without writing anything: each part is tiled in memory when it is asked for.

use std::path::Path;

use ctq_container::{LayerSource, PartTiles, SourceError};
use ctq_model::inventory::Part;
use ctq_model::{Checkpoint, Inventory, TensorSource};

use crate::{Result, part};

/// A checkpoint seen as packed parts. The same bits as a container made from it.
#[derive(Debug)]
pub struct TiledCheckpoint<S = Checkpoint> {
    source: S,
    inventory: Inventory,
}

impl TiledCheckpoint<Checkpoint> {
    /// Opens the checkpoint in a directory. `accepted_keys`: see [`Inventory::read`].
    ///
    /// # Errors
    /// Where the checkpoint cannot be read or contradicts itself.
    pub fn open(root: &Path, accepted_keys: &[String]) -> Result<TiledCheckpoint> {
        let source = Checkpoint::open(root)?;
        let inventory = Inventory::read(&source, accepted_keys)?;
        Ok(TiledCheckpoint::new(source, inventory))
    }
}

impl<S: TensorSource> TiledCheckpoint<S> {
    /// Tiles the tensors of `source`, whose text model is `inventory`.
    pub fn new(source: S, inventory: Inventory) -> TiledCheckpoint<S> {
        TiledCheckpoint { source, inventory }
    }

    /// The original tensors.
    pub fn source(&self) -> &S {
        &self.source
    }
}

impl<S: TensorSource> LayerSource for TiledCheckpoint<S> {
    fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    fn part(&self, part: Part) -> std::result::Result<PartTiles, SourceError> {
        Ok(part::tiles(&self.source, self.inventory.part(part))?)
    }

    fn prefetch(&self, part: Part) {
        self.inventory.part(part).tensors.iter().for_each(|tensor| self.source.prefetch(tensor));
    }
}
