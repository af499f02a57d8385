//! Parts of the model on a backend: read from the source and handed over, each time anew or once and kept. Runs nothing.

use std::sync::{Arc, OnceLock};

use ctq_container::{LayerSource, PartTiles};
use ctq_kernels::Backend;
use ctq_model::Spec;
use ctq_model::inventory::{Inventory, Part};

use crate::error::{Error, Result};
use crate::stage::Stage;
use crate::treatment::Acts;
use crate::weights::{BlockWeights, LinearWeights, Loader};

/// The final norm and the head.
pub(crate) struct HeadWeights<B: Backend> {
    pub(crate) norm: Vec<f32>,
    pub(crate) linear: Arc<LinearWeights<B>>,
}

/// A part that is loaded once.
type Kept<T> = OnceLock<Arc<T>>;

/// What stands before and after the layers.
struct Ends<B: Backend> {
    embedding: Kept<LinearWeights<B>>,
    head: Kept<HeadWeights<B>>,
}

/// Loads parts; keeps the first layers of a stage, and with all of them what stands before and after them.
pub(crate) struct Parts<'a, B: Backend> {
    backend: &'a B,
    source: &'a dyn LayerSource,
    acts: Acts,
    /// The first layer that is kept.
    first: usize,
    layers: Vec<Kept<BlockWeights<B>>>,
    ends: Option<Ends<B>>,
}

impl<'a, B: Backend> Parts<'a, B> {
    /// Keeps nothing yet.
    pub(crate) fn new(backend: &'a B, source: &'a dyn LayerSource, acts: Acts) -> Parts<'a, B> {
        Parts { backend, source, acts, first: 0, layers: Vec::new(), ends: None }
    }

    /// Keeps the first `layers` layers of a stage from now on, and nothing that was kept before.
    pub(crate) fn keep(&mut self, stage: &Stage<'_>, layers: usize) {
        let all = stage.layers.len();
        self.first = stage.layers.start;
        self.layers = std::iter::repeat_with(OnceLock::new).take(layers.min(all)).collect();
        self.ends = (layers >= all).then(|| Ends { embedding: OnceLock::new(), head: OnceLock::new() });
    }

    pub(crate) fn spec(&self) -> &'a Spec {
        &self.inventory().spec
    }

    pub(crate) fn inventory(&self) -> &'a Inventory {
        self.source.inventory()
    }

    /// A layer.
    pub(crate) fn layer(&self, index: usize) -> Result<Arc<BlockWeights<B>>> {
        kept(self.slot(index), || {
            self.load(Part::Layer(index), self.acts, |loader| loader.block(&self.spec().blocks[index]))
        })
    }

    /// Has what a part is made of read from the disk meanwhile, unless it is kept and here.
    pub(crate) fn prefetch(&self, part: Part) {
        let is_here = match part {
            Part::Layer(index) => self.slot(index).is_some_and(|slot| slot.get().is_some()),
            Part::Embedding => self.ends.as_ref().is_some_and(|ends| ends.embedding.get().is_some()),
            Part::Head => self.ends.as_ref().is_some_and(|ends| ends.head.get().is_some()),
        };
        if !is_here {
            self.source.prefetch(part);
        }
    }

    /// Whether a layer stays from one group to the next.
    pub(crate) fn keeps(&self, layer: usize) -> bool {
        self.slot(layer).is_some()
    }

    fn slot(&self, layer: usize) -> Option<&Kept<BlockWeights<B>>> {
        layer.checked_sub(self.first).and_then(|index| self.layers.get(index))
    }

    /// The embedding. It has no inputs to quantize, and so neither has a head tied to it.
    pub(crate) fn embedding(&self) -> Result<Arc<LinearWeights<B>>> {
        kept(self.ends.as_ref().map(|ends| &ends.embedding), || {
            self.load(Part::Embedding, Acts::Off, |loader| loader.linear(&self.spec().embedding))
        })
    }

    /// The final norm and the head.
    pub(crate) fn head(&self) -> Result<Arc<HeadWeights<B>>> {
        kept(self.ends.as_ref().map(|ends| &ends.head), || {
            self.load(Part::Head, self.acts, |loader| {
                let norm = loader.norm(&self.spec().final_norm);
                let linear = if self.spec().tied() {
                    self.embedding()?
                } else {
                    Arc::new(loader.linear(&self.spec().head)?)
                };
                Ok(HeadWeights { norm, linear })
            })
        })
    }

    /// One linear of a part by itself.
    pub(crate) fn linear(&self, part: Part, module: &str) -> Result<LinearWeights<B>> {
        self.load(part, self.acts, |loader| loader.linear(module))
    }

    fn load<T>(&self, part: Part, acts: Acts, take: impl FnOnce(&Loader<'_, B>) -> Result<T>) -> Result<T> {
        let tiles: PartTiles = self.source.part(part).map_err(|source| Error::Source { part, source })?;
        take(&Loader::new(self.backend, acts, self.source.inventory().part(part), &tiles))
    }
}

/// What is in `slot`, loaded where it is not there yet; no slot keeps nothing.
fn kept<T>(slot: Option<&Kept<T>>, load: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
    let Some(slot) = slot else { return Ok(Arc::new(load()?)) };
    if let Some(kept) = slot.get() {
        return Ok(Arc::clone(kept));
    }
    let loaded = Arc::new(load()?);
    Ok(Arc::clone(slot.get_or_init(|| loaded)))
}
