//! The layer loop: which part is loaded when, what runs over it, what is handed out. Leaves the inside of a layer to
//! [`crate::block`], and knows nothing of text, protocols or resume files.

use std::ops::Range;

use ctq_container::{LayerSource, PartTiles};
use ctq_kernels::{Backend, Compute, Rotation, Treatment};
use ctq_model::Spec;
use ctq_model::inventory::Part;
use ctq_model::scheme::{ActivationScale, ActivationSharing};
use ctq_model::window::{Window, WindowScores};

use crate::block::Context;
use crate::error::{Error, Result};
use crate::score::score;
use crate::snapshot::Snapshot;
use crate::treatment::Acts;
use crate::weights::{BlockWeights, LinearWeights, Loader};

/// Arithmetic of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Quantization of activations.
    pub acts: Acts,
    /// Precision of operands.
    pub compute: Compute,
}

/// Watches a run from outside. Every method has a default that does nothing.
pub trait Observer: Sync {
    /// `layers` of the group's layers are done (the head counts as one more).
    fn advanced(&self, layers: usize) {
        let _ = layers;
    }

    /// Whether the run should stop at the next layer.
    fn interrupted(&self) -> bool {
        false
    }

    /// Whether the hidden states after this layer are wanted; asked once a layer.
    fn wants_snapshot(&self) -> bool {
        false
    }

    /// Takes the hidden states that were asked for.
    ///
    /// # Errors
    /// Where they cannot be kept; the run stops.
    fn snapshot(&self, snapshot: Snapshot) -> Result<()> {
        let _ = snapshot;
        Ok(())
    }
}

/// An observer that watches nothing.
impl Observer for () {}

/// A model that runs one step at a time on one window: what a comparison in lockstep needs.
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

/// A model on a backend.
pub struct Engine<'a, B> {
    backend: &'a B,
    source: &'a dyn LayerSource,
    settings: Settings,
}

impl<'a, B: Backend> Engine<'a, B> {
    /// A model handed out by `source`, run on `backend`. Call its methods inside the thread pool that should do the
    /// work.
    pub fn new(backend: &'a B, source: &'a dyn LayerSource, settings: Settings) -> Engine<'a, B> {
        Engine { backend, source, settings }
    }

    fn spec(&self) -> &Spec {
        &self.source.inventory().spec
    }

    fn part(&self, part: Part) -> Result<PartTiles> {
        self.source.part(part).map_err(|source| Error::Source { part, source })
    }

    /// Scores the windows of one group together. `vocabulary`: rows of the head that the softmax runs over.
    ///
    /// `resume` continues from a snapshot of the same group.
    ///
    /// # Errors
    /// Where a part cannot be read, a hidden state is not finite, or the observer interrupts.
    pub fn score(
        &self,
        windows: &[Window],
        vocabulary: usize,
        resume: Option<Snapshot>,
        observer: &dyn Observer,
    ) -> Result<Vec<WindowScores>> {
        if windows.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<&[u32]> = windows.iter().map(|window| window.ids.as_slice()).collect();
        let layout = Layout::new(&ids);
        let hidden = self.run(&ids, &layout, resume, observer).map_err(|error| of_all(error, windows))?;
        let scores = self.score_hidden(windows, &layout, &hidden, vocabulary)?;
        observer.advanced(self.spec().blocks.len() + 1);
        Ok(scores)
    }

    /// Hands the logits of sequences to `sink`, rows in order, [rows, vocab] at a time.
    ///
    /// # Errors
    /// As [`Engine::score`], and whatever `sink` fails with.
    pub fn logits<E: From<Error>>(
        &self,
        sequences: &[&[u32]],
        observer: &dyn Observer,
        mut sink: impl FnMut(&[f32]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let layout = Layout::new(sequences);
        let hidden = self.run(sequences, &layout, None, observer)?;
        self.head_logits(&layout, &hidden, &mut sink)
    }

    fn embed_buffer(&self, sequences: &[&[u32]]) -> Result<B::Buffer> {
        let vocabulary = self.spec().vocab;
        for (window, ids) in sequences.iter().enumerate() {
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
                return Err(Error::TokenOutOfRange { id: *id, window, vocabulary });
            }
        }
        let tiles = self.part(Part::Embedding)?;
        let part = self.source.inventory().part(Part::Embedding);
        let table =
            Loader::new(self.backend, self.settings.acts, part, &tiles).linear(&self.spec().embedding);
        Ok(self.backend.embed(&table.matrix, &sequences.concat()))
    }

    fn rotation(&self, positions: usize) -> Rotation {
        let head_dim = self.spec().blocks.first().map_or(2, |block| block.attention.head_dim);
        Rotation::new(&self.spec().rope, head_dim, positions)
    }

    fn context<'c>(&'c self, rotation: &'c Rotation, windows: &'c [Range<usize>]) -> Context<'c, B> {
        Context {
            backend: self.backend,
            compute: self.settings.compute,
            epsilon: self.spec().norm_eps as f32,
            rotation,
            windows,
        }
    }

    fn block_weights(&self, index: usize, tiles: &PartTiles) -> BlockWeights<B> {
        let part = self.source.inventory().part(Part::Layer(index));
        Loader::new(self.backend, self.settings.acts, part, tiles).block(&self.spec().blocks[index])
    }

    /// All layers: the hidden states after the last, [rows, hidden].
    fn run(
        &self,
        sequences: &[&[u32]],
        layout: &Layout,
        resume: Option<Snapshot>,
        observer: &dyn Observer,
    ) -> Result<B::Buffer> {
        let spec = self.spec();
        let rotation = self.rotation(layout.longest());
        let context = self.context(&rotation, &layout.windows);
        let elements = layout.rows() * spec.hidden;
        let usable = resume.filter(|s| s.hidden.len() == elements && s.layer <= spec.blocks.len());
        let (first, mut hidden) = match usable {
            Some(snapshot) => (snapshot.layer, self.backend.upload(spec.hidden, &snapshot.hidden)),
            None => (0, self.embed_buffer(sequences)?),
        };
        context.check(&spec.embedding, &hidden)?;
        observer.advanced(first);
        let mut next = if first < spec.blocks.len() { Some(self.part(Part::Layer(first))?) } else { None };
        for (index, block) in spec.blocks.iter().enumerate().skip(first) {
            if observer.interrupted() {
                return Err(Error::Interrupted);
            }
            let weights = self.block_weights(index, next.as_ref().expect("read in the round before"));
            // The next layer is read while this one runs.
            let read =
                || (index + 1 < spec.blocks.len()).then(|| self.part(Part::Layer(index + 1))).transpose();
            let (done, read) = rayon::join(|| context.block(block, &weights, &mut hidden), read);
            done?;
            next = read?;
            observer.advanced(index + 1);
            if observer.wants_snapshot() {
                let hidden = self.backend.download(&hidden);
                observer.snapshot(Snapshot { layer: index + 1, hidden })?;
            }
        }
        if observer.interrupted() {
            return Err(Error::Interrupted);
        }
        Ok(hidden)
    }

    /// Loads the final norm and the head and hands them to `run`.
    fn with_head<T>(&self, run: impl FnOnce(&[f32], &LinearWeights<B>) -> T) -> Result<T> {
        let inventory = self.source.inventory();
        let tiles = self.part(Part::Head)?;
        let loader = Loader::new(self.backend, self.settings.acts, inventory.part(Part::Head), &tiles);
        let norm = loader.norm(&self.spec().final_norm);
        if self.spec().tied() {
            let tiles = self.part(Part::Embedding)?;
            let part = inventory.part(Part::Embedding);
            // An embedding has no inputs to quantize, and so neither has a head tied to it.
            let head = Loader::new(self.backend, Acts::Off, part, &tiles).linear(&self.spec().head);
            return Ok(run(&norm, &head));
        }
        Ok(run(&norm, &loader.linear(&self.spec().head)))
    }

    /// Head and log-likelihoods of the windows' scored positions.
    fn score_hidden(
        &self,
        windows: &[Window],
        layout: &Layout,
        hidden: &B::Buffer,
        vocabulary: usize,
    ) -> Result<Vec<WindowScores>> {
        let backend = self.backend;
        let rotation = self.rotation(0);
        let (ranges, whole, nll) = self.with_head(|norm, head| {
            // Only the rows that predict a scored token need logits, unless a scale is shared by the whole window.
            let whole = shares_scale(&head.input);
            let mut rows = Vec::new();
            let mut targets = Vec::new();
            let mut ranges = Vec::new();
            for (window, range) in windows.iter().zip(&layout.windows) {
                let first = rows.len();
                let predicted = if whole { 1..window.ids.len() + 1 } else { window.scored.clone() };
                for position in predicted {
                    rows.push((range.start + position - 1) as u32);
                    // The last row has no target; it is here for its part in a shared scale.
                    targets.push(window.ids.get(position).copied().unwrap_or(0));
                }
                ranges.push(first..rows.len());
            }
            let normed = backend.norm(&backend.gather(hidden, &rows), norm, self.spec().norm_eps as f32);
            let context = self.context(&rotation, &ranges);
            let nll = score(&context, head, &normed, &targets, vocabulary.min(self.spec().vocab))?;
            Ok::<_, Error>((ranges, whole, nll))
        })??;
        // Position of the first row of a window that has logits.
        let first_position = |window: &Window| if whole { 0 } else { window.scored.start - 1 };
        if let Some(row) = nll.iter().position(|nll| !nll.is_finite())
            && let Some((range, window)) = ranges.iter().zip(windows).find(|(range, _)| range.contains(&row))
        {
            let (module, position) = (self.spec().head.clone(), first_position(window) + row - range.start);
            return Err(Error::NonFinite { module, window: window.index, position });
        }
        let scores = windows.iter().zip(ranges).map(|(window, range)| {
            let first = range.start + window.scored.start - 1 - first_position(window);
            WindowScores {
                window: window.index,
                first: window.scored.start,
                nll: nll[first..first + window.scored.len()].to_vec(),
            }
        });
        Ok(scores.collect())
    }

    /// Hands all logits to `sink`, rows in order, [rows, vocab] at a time.
    fn head_logits<E: From<Error>>(
        &self,
        layout: &Layout,
        hidden: &B::Buffer,
        sink: &mut impl FnMut(&[f32]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let rotation = self.rotation(0);
        self.with_head(|norm, head| {
            for window in &layout.windows {
                // Some rows at a time: a whole window of a large vocabulary would be gigabytes.
                let step = if shares_scale(&head.input) { window.len() } else { 256 };
                for start in window.clone().step_by(step.max(1)) {
                    let rows: Vec<u32> =
                        (start..window.end.min(start + step)).map(|row| row as u32).collect();
                    let range = 0..rows.len();
                    let normed = self.backend.norm(
                        &self.backend.gather(hidden, &rows),
                        norm,
                        self.spec().norm_eps as f32,
                    );
                    let ranges = [range];
                    let context = self.context(&rotation, &ranges);
                    let logits = context.linear(head, &normed, &ranges)?;
                    sink(&self.backend.download(&logits))?;
                }
            }
            Ok(())
        })?
    }
}

impl<B: Backend> Lockstep for Engine<'_, B> {
    fn embed(&self, ids: &[u32]) -> Result<Vec<f32>> {
        Ok(self.backend.download(&self.embed_buffer(&[ids])?))
    }

    fn layer(&self, index: usize, hidden: &[f32]) -> Result<Vec<f32>> {
        let rows = hidden.len() / self.spec().hidden;
        let layout = Layout::of_lengths(&[rows]);
        let rotation = self.rotation(rows);
        let weights = self.block_weights(index, &self.part(Part::Layer(index))?);
        let mut hidden = self.backend.upload(self.spec().hidden, hidden);
        self.context(&rotation, &layout.windows).block(&self.spec().blocks[index], &weights, &mut hidden)?;
        Ok(self.backend.download(&hidden))
    }

    fn head(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        let layout = Layout::of_lengths(&[hidden.len() / self.spec().hidden]);
        let hidden = self.backend.upload(self.spec().hidden, hidden);
        let mut logits = Vec::new();
        self.head_logits(&layout, &hidden, &mut |rows: &[f32]| {
            logits.extend_from_slice(rows);
            Ok::<(), Error>(())
        })?;
        Ok(logits)
    }

    fn operands(&self, part: Part, module: &str) -> Result<Vec<f32>> {
        let tiles = self.part(part)?;
        let loader =
            Loader::new(self.backend, self.settings.acts, self.source.inventory().part(part), &tiles);
        let matrix = loader.linear(module).matrix;
        let rows: Vec<u32> = (0..self.backend.rows(&matrix) as u32).collect();
        Ok(self.backend.download(&self.backend.embed(&matrix, &rows)))
    }
}

/// An error that names a window of the group, naming it among all windows.
fn of_all(error: Error, group: &[Window]) -> Error {
    let index = |window: usize| group.get(window).map_or(window, |window| window.index);
    match error {
        Error::NonFinite { module, window, position } => {
            Error::NonFinite { module, window: index(window), position }
        }
        Error::TokenOutOfRange { id, window, vocabulary } => {
            Error::TokenOutOfRange { id, window: index(window), vocabulary }
        }
        other @ (Error::Source { .. }
        | Error::Kernel { .. }
        | Error::Interrupted
        | Error::Snapshot { .. }) => other,
    }
}

/// True where one scale, found from the data, covers all rows of a window.
fn shares_scale(treatment: &Treatment) -> bool {
    match treatment {
        Treatment::Plain => false,
        Treatment::FakeQuantized(quantizer) | Treatment::Exact(quantizer) => {
            quantizer.activation.sharing == ActivationSharing::Tensor
                && quantizer.activation.scale != ActivationScale::Static
        }
    }
}

/// Where the rows of each sequence are in a group's buffers.
struct Layout {
    windows: Vec<Range<usize>>,
}

impl Layout {
    fn new(sequences: &[&[u32]]) -> Layout {
        Layout::of_lengths(&sequences.iter().map(|ids| ids.len()).collect::<Vec<_>>())
    }

    fn of_lengths(lengths: &[usize]) -> Layout {
        let mut end = 0;
        let windows = lengths.iter().map(|length| {
            let start = end;
            end += length;
            start..end
        });
        Layout { windows: windows.collect() }
    }

    fn rows(&self) -> usize {
        self.windows.last().map_or(0, |window| window.end)
    }

    fn longest(&self) -> usize {
        self.windows.iter().map(Range::len).max().unwrap_or(0)
    }
}
