//! The model as a whole: embedding, blocks, head, one window at a time.
//!
//! Knows the order of the parts; what a part computes is in its own file. Holds nothing but names: each linear is
//! read when it is used and forgotten afterwards.

use std::collections::BTreeMap;

use ctq_model::inventory::{Linear, Part};
use ctq_model::{Inventory, Spec, TensorSource};
use ndarray::Array2;

use crate::linear;
use crate::norm;
use crate::operand::{OperandMatrix, Rows, decompress};
use crate::stored;
use crate::{Error, Result};

/// Whether activations, keys, values and queries are quantized as the checkpoint says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Acts {
    /// Weights only.
    Off,
    /// As compressed-tensors computes it in f32, one scale a token where the scheme is per token.
    Library,
}

/// A text model computed from its original tensors, in f64.
pub struct Reference<'a> {
    source: &'a dyn TensorSource,
    inventory: &'a Inventory,
    linears: BTreeMap<&'a str, &'a Linear>,
}

impl<'a> Reference<'a> {
    /// Prepares the model that `inventory` found in `source`. Reads no tensor.
    ///
    /// # Errors
    /// Where the inventory lists no embedding or no head.
    pub fn open(source: &'a dyn TensorSource, inventory: &'a Inventory) -> Result<Reference<'a>> {
        let linears = inventory.linears().map(|linear| (linear.module.as_str(), linear)).collect();
        let reference = Reference { source, inventory, linears };
        reference.find(&inventory.spec.embedding)?;
        reference.find(&inventory.spec.head)?;
        Ok(reference)
    }

    /// The decompressed weight of a module, [n, k], bit for bit as compressed-tensors yields it.
    ///
    /// # Errors
    /// Where there is no such module, where a tensor is missing or contradicts the scheme, and where a weight is not
    /// finite.
    pub fn weight(&self, module: &str) -> Result<OperandMatrix> {
        decompress(self.source, self.find(module)?)
    }

    /// Embeds the token ids of a window: [tokens, hidden].
    ///
    /// # Errors
    /// Names an id outside the vocabulary and its position, or what is wrong with the embedding.
    pub fn embed(&self, ids: &[u32]) -> Result<Array2<f64>> {
        let table = self.find(&self.spec().embedding)?;
        if let Some((position, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= table.n) {
            return Err(Error::TokenOutsideVocabulary { id: *id, position, vocab: table.n });
        }
        let rows = Rows::open(self.source, table)?;
        let mut hidden = Array2::zeros((ids.len(), table.k));
        let mut row = vec![0.0; table.k];
        for (id, mut out) in ids.iter().zip(hidden.rows_mut()) {
            rows.read(*id as usize, &mut row)?;
            out.iter_mut().zip(&row).for_each(|(out, value)| *out = f64::from(*value));
        }
        Ok(hidden)
    }

    /// Applies block `index` to the hidden states of one window, [tokens, hidden], whose positions start at 0.
    ///
    /// `x += attention(norm(x)); x += ffn(norm(x))`.
    ///
    /// # Errors
    /// Where there is no such layer, where the hidden states have another width, where a tensor is missing or
    /// contradicts the scheme, and where a weight or an activation is not finite.
    pub fn layer(&self, index: usize, mut hidden: Array2<f64>, acts: Acts) -> Result<Array2<f64>> {
        let layers = self.spec().blocks.len();
        let block = self.spec().blocks.get(index).ok_or_else(|| Error::NoSuchLayer {
            root: self.source.root().to_owned(),
            index,
            layers,
        })?;
        let kv = self.inventory.part(Part::Layer(index)).kv.as_ref();
        let normed = self.norm(&block.attention_norm, &hidden)?;
        hidden += &self.attention(&block.attention, kv, &normed, acts)?;
        let normed = self.norm(&block.ffn_norm, &hidden)?;
        hidden += &self.feed_forward(&block.ffn, &normed, acts)?;
        Ok(hidden)
    }

    /// Final norm and head over the hidden states after the last block, [tokens, hidden]: logits [tokens, vocab].
    ///
    /// A tied head is the embedding's weight, without activation quantization: an embedding has no inputs to quantize.
    ///
    /// # Errors
    /// As [`layer`](Reference::layer).
    pub fn logits(&self, hidden: &Array2<f64>, acts: Acts) -> Result<Array2<f64>> {
        let spec = self.spec();
        let acts = if spec.tied() { Acts::Off } else { acts };
        self.linear(&spec.head, &self.norm(&spec.final_norm, hidden)?, acts)
    }

    pub(crate) fn spec(&self) -> &'a Spec {
        &self.inventory.spec
    }

    pub(crate) fn source(&self) -> &'a dyn TensorSource {
        self.source
    }

    /// Applies the linear `module` to [tokens, k].
    pub(crate) fn linear(&self, module: &str, x: &Array2<f64>, acts: Acts) -> Result<Array2<f64>> {
        linear::forward(self.source, self.find(module)?, x, acts)
    }

    /// Applies the norm `module` to [tokens, hidden].
    fn norm(&self, module: &str, x: &Array2<f64>) -> Result<Array2<f64>> {
        let spec = self.spec();
        if x.ncols() != spec.hidden {
            return Err(Error::Width { module: module.to_owned(), expected: spec.hidden, found: x.ncols() });
        }
        let weight = stored::floats(self.source, &format!("{module}.weight"), spec.hidden)?;
        Ok(norm::rms(x.view(), &weight, spec.norm_eps))
    }

    fn find(&self, module: &str) -> Result<&'a Linear> {
        self.linears.get(module).copied().ok_or_else(|| Error::UnknownModule {
            root: self.source.root().to_owned(),
            module: module.to_owned(),
        })
    }
}
