//! A model one step at a time: what a comparison with another implementation needs. The same steps as the layer loop.

use ctq_kernels::Backend;
use ctq_model::inventory::Part;

use crate::block::Context;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::head;
use crate::schedule::Batch;
use crate::watch::Watches;

/// A model that runs one step at a time on one window.
///
/// Hidden states are [tokens, hidden] f32, positions start at 0.
pub trait Lockstep {
    /// Embeds token ids: [tokens, hidden].
    ///
    /// # Errors
    /// Where a token has no embedding.
    fn embed(&self, ids: &[u32]) -> Result<Vec<f32>>;

    /// Runs layer `index`.
    ///
    /// # Errors
    /// As [`Engine::score`].
    fn layer(&self, index: usize, hidden: &[f32]) -> Result<Vec<f32>>;

    /// Logits of the hidden states after the last layer: [tokens, vocab].
    ///
    /// # Errors
    /// As [`Engine::score`].
    fn head(&self, hidden: &[f32]) -> Result<Vec<f32>>;

    /// The decompressed weight of a module, [n, k] row-major: the operand bits before the compute mode rounds them.
    ///
    /// # Errors
    /// Where the part cannot be read.
    fn operands(&self, part: Part, module: &str) -> Result<Vec<f32>>;
}

/// The one window, of as many tokens as `hidden` has rows.
fn one_window(hidden: &[f32], width: usize) -> Batch {
    Batch::cut(&[hidden.len() / width], usize::MAX).remove(0)
}

impl<B: Backend> Lockstep for Engine<'_, B> {
    fn embed(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let table = self.parts.embedding()?;
        Ok(self.backend.download(&self.embed_batch(&table, &[ids], 0)?)?)
    }

    fn layer(&self, index: usize, hidden: &[f32]) -> Result<Vec<f32>> {
        let batch = one_window(hidden, self.spec().hidden);
        let rotation = self.rotation(batch.len());
        let weights = self.parts.layer(index)?;
        let mut hidden = self.backend.upload(self.spec().hidden, hidden)?;
        let mut watches = Watches::new(self.backend);
        let context = Context { left_by: self.before(index), ..self.context(&rotation, &batch) };
        context.block(&self.spec().blocks[index], &weights, &mut hidden, None, &mut watches)?;
        watches.ask(&context, self.before(index + 1), &hidden)?;
        watches.settle()?;
        Ok(self.backend.download(&hidden)?)
    }

    fn head(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        let batch = one_window(hidden, self.spec().hidden);
        let rotation = self.rotation(0);
        let weights = self.parts.head()?;
        let hidden = self.backend.upload(self.spec().hidden, hidden)?;
        let mut logits = Vec::new();
        head::logits(&self.context(&rotation, &batch), &weights, &hidden, &mut |rows: &[f32]| {
            logits.extend_from_slice(rows);
            Ok::<(), Error>(())
        })?;
        Ok(logits)
    }

    fn operands(&self, part: Part, module: &str) -> Result<Vec<f32>> {
        let matrix = self.parts.linear(part, module)?.matrix;
        let rows: Vec<u32> = (0..self.backend.rows(&matrix) as u32).collect();
        Ok(self.backend.download(&self.backend.embed(&matrix, &rows)?)?)
    }
}
