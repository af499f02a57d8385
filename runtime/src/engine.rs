//! The layer loop: which part is loaded when, what runs over it, what is handed out. Leaves the inside of a layer to
//! [`crate::block`], and knows nothing of text, protocols or resume files.

use ctq_container::LayerSource;
use ctq_kernels::{Backend, Compute, Rotation};
use ctq_model::Spec;
use ctq_model::window::{Window, WindowScores};

use crate::block::Context;
use crate::error::{Error, Result};
use crate::head;
use crate::hidden::Hidden;
use crate::observer::Observer;
use crate::parts::Parts;
use crate::schedule::{Batch, Schedule};
use crate::snapshot::Snapshot;
use crate::treatment::Acts;
use crate::weights::{BlockWeights, LinearWeights};

/// Arithmetic of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Quantization of activations.
    pub acts: Acts,
    /// Precision of operands.
    pub compute: Compute,
}

/// A model on a backend.
pub struct Engine<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) parts: Parts<'a, B>,
    settings: Settings,
    schedule: Schedule,
}

impl<'a, B: Backend> Engine<'a, B> {
    /// A model handed out by `source`, run on `backend` by the default schedule. Call its methods inside the thread
    /// pool that should do the work.
    pub fn new(backend: &'a B, source: &'a dyn LayerSource, settings: Settings) -> Engine<'a, B> {
        let parts = Parts::new(backend, source, settings.acts);
        Engine { backend, parts, settings, schedule: Schedule::default() }
    }

    /// The same model by another schedule. Layers that this one keeps stay where they are, others go.
    #[must_use]
    pub fn with_schedule(mut self, schedule: Schedule) -> Engine<'a, B> {
        self.reschedule(schedule);
        self
    }

    /// As [`Engine::with_schedule`], in place.
    pub(crate) fn reschedule(&mut self, schedule: Schedule) {
        self.parts.keep(schedule.resident_layers);
        self.schedule = schedule;
    }

    pub(crate) fn spec(&self) -> &'a Spec {
        self.parts.spec()
    }

    /// Scores the windows of one group: each layer is loaded once for all of them. `vocabulary`: rows of the head that
    /// the softmax runs over.
    ///
    /// `resume` continues from a snapshot of the same group, whatever schedule it was taken in.
    ///
    /// # Errors
    /// Where a part cannot be read, a hidden state is not finite, the device fails or has no room, or the observer
    /// interrupts.
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
        let batches = self.batches(&ids);
        let hidden = self.run(&ids, &batches, resume, observer).map_err(|error| of_all(error, windows))?;
        let (head, rotation) = (self.parts.head()?, self.rotation(0));
        let vocabulary = vocabulary.min(self.spec().vocab);
        let mut scores = Vec::with_capacity(windows.len());
        for (batch, hidden) in batches.iter().zip(hidden) {
            let hidden = hidden.into_buffer(self.backend)?;
            let (context, windows) = (self.context(&rotation, batch), &windows[batch.windows.clone()]);
            scores.extend(head::score_windows(&context, &head, windows, &hidden, vocabulary)?);
        }
        observer.advanced(self.spec().blocks.len() + 1);
        Ok(scores)
    }

    /// Hands the logits of sequences, which are one group, to `sink`, rows in order, [rows, vocab] at a time.
    ///
    /// # Errors
    /// As [`Engine::score`], and whatever `sink` fails with.
    pub fn logits<E: From<Error>>(
        &self,
        sequences: &[&[u32]],
        observer: &dyn Observer,
        mut sink: impl FnMut(&[f32]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let batches = self.batches(sequences);
        let hidden = self.run(sequences, &batches, None, observer)?;
        let (head, rotation) = (self.parts.head()?, self.rotation(0));
        for (batch, hidden) in batches.iter().zip(hidden) {
            let hidden = hidden.into_buffer(self.backend)?;
            head::logits(&self.context(&rotation, batch), &head, &hidden, &mut sink)?;
        }
        Ok(())
    }

    fn batches(&self, sequences: &[&[u32]]) -> Vec<Batch> {
        let lengths: Vec<usize> = sequences.iter().map(|ids| ids.len()).collect();
        Batch::cut(&lengths, self.schedule.batch_tokens)
    }

    /// Embeddings of sequences, side by side. `first`: the first of them in the group.
    pub(crate) fn embed_batch(
        &self,
        table: &LinearWeights<B>,
        sequences: &[&[u32]],
        first: usize,
    ) -> Result<B::Buffer> {
        let vocabulary = self.spec().vocab;
        for (window, ids) in sequences.iter().enumerate() {
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
                return Err(Error::TokenOutOfRange { id: *id, window: first + window, vocabulary });
            }
        }
        Ok(self.backend.embed(&table.matrix, &sequences.concat())?)
    }

    pub(crate) fn rotation(&self, positions: usize) -> Rotation {
        let head_dim = self.spec().blocks.first().map_or(2, |block| block.attention.head_dim);
        Rotation::new(&self.spec().rope, head_dim, positions)
    }

    pub(crate) fn context<'c>(&'c self, rotation: &'c Rotation, batch: &'c Batch) -> Context<'c, B> {
        Context {
            backend: self.backend,
            compute: self.settings.compute,
            epsilon: self.spec().norm_eps as f32,
            rotation,
            first_window: batch.windows.start,
            windows: &batch.rows,
        }
    }

    /// All layers: the hidden states of each batch after the last.
    fn run(
        &self,
        sequences: &[&[u32]],
        batches: &[Batch],
        resume: Option<Snapshot>,
        observer: &dyn Observer,
    ) -> Result<Vec<Hidden<B>>> {
        let layers = self.spec().blocks.len();
        let rotation = self.rotation(sequences.iter().map(|ids| ids.len()).max().unwrap_or(0));
        let contexts: Vec<_> = batches.iter().map(|batch| self.context(&rotation, batch)).collect();
        let elements: usize = batches.iter().map(Batch::len).sum::<usize>() * self.spec().hidden;
        let usable = resume.filter(|s| s.hidden.len() == elements && s.layer <= layers);
        let first = usable.as_ref().map_or(0, |snapshot| snapshot.layer);
        let mut hidden = self.begin(sequences, batches, &contexts, usable)?;
        observer.advanced(first);
        let mut next = if first < layers { Some(self.parts.layer(first)?) } else { None };
        for index in first..layers {
            if observer.interrupted() {
                return Err(Error::Interrupted);
            }
            let weights = next.take().expect("loaded in the round before");
            // The next layer is read and handed over while this one runs.
            let load = || (index + 1 < layers).then(|| self.parts.layer(index + 1)).transpose();
            let (done, loaded) =
                rayon::join(|| self.run_layer(index, &weights, &contexts, &mut hidden), load);
            done?;
            next = loaded?;
            observer.advanced(index + 1);
            if observer.wants_snapshot() {
                observer.snapshot(self.snapshot(index + 1, elements, &hidden)?)?;
            }
        }
        if observer.interrupted() {
            return Err(Error::Interrupted);
        }
        Ok(hidden)
    }

    /// Hidden states before the first layer to run: those of a snapshot, or embeddings.
    fn begin(
        &self,
        sequences: &[&[u32]],
        batches: &[Batch],
        contexts: &[Context<'_, B>],
        resume: Option<Snapshot>,
    ) -> Result<Vec<Hidden<B>>> {
        let width = self.spec().hidden;
        let table = if resume.is_none() { Some(self.parts.embedding()?) } else { None };
        let mut row = 0;
        let begin = |(batch, context): (&Batch, &Context<'_, B>)| {
            let rows = row..row + batch.len();
            row = rows.end;
            let buffer = match (&table, &resume) {
                (Some(table), _) => {
                    self.embed_batch(table, &sequences[batch.windows.clone()], batch.windows.start)?
                }
                (None, Some(Snapshot { hidden, .. })) => {
                    self.backend.upload(width, &hidden[rows.start * width..rows.end * width])?
                }
                (None, None) => unreachable!("without a snapshot there is an embedding"),
            };
            context.check(&self.spec().embedding, &buffer)?;
            Hidden::put(self.backend, width, buffer, self.schedule.hidden)
        };
        batches.iter().zip(contexts).map(begin).collect()
    }

    /// One layer over all batches, one after the other.
    fn run_layer(
        &self,
        index: usize,
        weights: &BlockWeights<B>,
        contexts: &[Context<'_, B>],
        hidden: &mut [Hidden<B>],
    ) -> Result<()> {
        let block = &self.spec().blocks[index];
        for (context, hidden) in contexts.iter().zip(hidden) {
            hidden.update(self.backend, |hidden| context.block(block, weights, hidden))?;
        }
        Ok(())
    }

    /// The hidden states of all batches, `elements` in all, in the order of the group's windows.
    fn snapshot(&self, layer: usize, elements: usize, hidden: &[Hidden<B>]) -> Result<Snapshot> {
        let mut all = Vec::with_capacity(elements);
        for batch in hidden {
            batch.append_to(self.backend, &mut all)?;
        }
        Ok(Snapshot { layer, hidden: all })
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
        | Error::Device(_)
        | Error::TooSmall(_)
        | Error::NoRoom { .. }
        | Error::Interrupted
        | Error::Snapshot { .. }) => other,
    }
}
