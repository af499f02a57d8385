//! The layer loop: which part is loaded when, what runs over it, what is handed out. Leaves the inside of a layer to
//! [`crate::block`], and knows nothing of text, protocols or resume files.

use std::borrow::Borrow;

use ctq_container::LayerSource;
use ctq_kernels::collective::Pipe;
use ctq_kernels::{Backend, Compute, KernelError, Rotation};
use ctq_model::Spec;
use ctq_model::inventory::Part;
use ctq_model::window::{Window, WindowScores};

use crate::block::Context;
use crate::error::{Error, Result};
use crate::head;
use crate::hidden::Hidden;
use crate::last_layer::rows_stand_alone;
use crate::observer::Observer;
use crate::parts::Parts;
use crate::rows::Rows;
use crate::schedule::{Batch, Schedule};
use crate::snapshot::Snapshot;
use crate::stage::Stage;
use crate::treatment::Acts;
use crate::watch::Watches;
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
    stage: Stage<'a>,
}

impl<'a, B: Backend> Engine<'a, B> {
    /// A model handed out by `source`, run on `backend` by the default schedule. Call its methods inside the thread
    /// pool that should do the work.
    pub fn new(backend: &'a B, source: &'a dyn LayerSource, settings: Settings) -> Engine<'a, B> {
        let parts = Parts::new(backend, source, settings.acts);
        let stage = Stage::whole(source.inventory().spec.blocks.len());
        Engine { backend, parts, settings, schedule: Schedule::default(), stage }
    }

    /// Some of the model's layers.
    #[must_use]
    pub fn with_stage(mut self, stage: Stage<'a>) -> Engine<'a, B> {
        self.stage = stage;
        self.with_schedule(Schedule::default())
    }

    /// The same model by another schedule. Layers that this one keeps stay where they are, others go.
    #[must_use]
    pub fn with_schedule(mut self, schedule: Schedule) -> Engine<'a, B> {
        self.parts.keep(&self.stage, schedule.resident_layers);
        self.schedule = schedule;
        self
    }

    pub(crate) fn spec(&self) -> &'a Spec {
        self.parts.spec()
    }

    /// Scores the windows of one group: each layer is loaded once for all of them. `vocabulary`: rows of the head that
    /// the softmax runs over. A stage that hands its hidden states on has no scores.
    ///
    /// `resume` continues from a snapshot of the same group, whatever schedule it was taken in. Ranks that share the
    /// model give the same one, and interrupt together where one of their observers wants to.
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
        let mut batches = self.batches(&ids);
        if self.stage.outgoing.is_none()
            && !self.stage.layers.is_empty()
            && rows_stand_alone(self.parts.inventory(), self.settings.acts)
        {
            batches = batches.into_iter().map(|batch| batch.only_predicting(windows)).collect();
        }
        let hidden = self.run(&ids, &batches, resume, observer).map_err(|error| of_all(error, windows))?;
        if let Some(outgoing) = self.stage.outgoing {
            let elements = self.elements_before(self.stage.layers.end, &batches);
            outgoing.send(self.on_host(hidden, elements)?)?;
            return Ok(Vec::new());
        }
        let (head, rotation) = (self.parts.head()?, self.rotation(0));
        let vocabulary = vocabulary.min(self.spec().vocab);
        let mut scores = Vec::with_capacity(windows.len());
        for (batch, hidden) in batches.iter().zip(hidden) {
            let hidden = hidden.into_buffer(self.backend)?;
            let context = Context { rows: batch.last(), ..self.context(&rotation, batch) };
            let windows = &windows[batch.windows.clone()];
            scores.extend(head::score_windows(&context, &head, windows, &hidden, vocabulary)?);
        }
        observer.advanced(self.stage.steps());
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
            left_by: &self.spec().embedding,
            rows: &batch.rows,
        }
    }

    /// The module whose hidden states go into layer `layer`.
    pub(crate) fn before(&self, layer: usize) -> &'a str {
        match layer.checked_sub(1) {
            Some(last) => self.spec().blocks[last].ffn_module(),
            None => &self.spec().embedding,
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
        let layers = self.stage.layers.clone();
        let rotation = self.rotation(sequences.iter().map(|ids| ids.len()).max().unwrap_or(0));
        let contexts: Vec<_> = batches.iter().map(|batch| self.context(&rotation, batch)).collect();
        let usable = resume.filter(|snapshot| {
            let elements = self.elements_before(snapshot.layer, batches);
            snapshot.layer <= layers.end && snapshot.hidden.len() == elements
        });
        let first = usable.as_ref().map_or(layers.start, |snapshot| snapshot.layer);
        let mut watches = Watches::new(self.backend);
        let mut hidden = self.begin(sequences, batches, &contexts, usable, &mut watches)?;
        observer.advanced(first - layers.start);
        if self.any(observer.interrupted())? {
            return Err(Error::Interrupted);
        }
        let mut next = if first < layers.end { Some(self.parts.layer(first)?) } else { None };
        for index in first..layers.end {
            let weights = next.take().expect("loaded in the round before");
            // The next layer is read and handed over while this one runs; the disk begins before a worker is free.
            self.prefetch_after(index);
            let load = || (index + 1 < layers.end).then(|| self.parts.layer(index + 1)).transpose();
            let run = || self.run_layer(index, &weights, batches, &contexts, &mut hidden, &mut watches);
            let (done, loaded) = rayon::join(run, load);
            done?;
            next = loaded?;
            if !self.parts.keeps(index) {
                // Its weights go now, and the device must be done with them before others take their room.
                watches.settle()?;
            }
            observer.advanced(index + 1 - layers.start);
            // One rank that is told to stop stops all, and what is done is kept before.
            let stops = self.any(observer.interrupted())?;
            let keeps = self.any(stops || observer.wants_snapshot())?;
            if keeps {
                // What is kept is known to be finite.
                self.ask_about(index + 1, batches, &contexts, &hidden, &mut watches)?;
                watches.settle()?;
            }
            // Between two stages the windows of a group are in several places at a time.
            if keeps && self.stage.is_whole() && self.backend.peers().rank() == 0 {
                let elements = self.elements_before(index + 1, batches);
                let hidden = self.on_host(&hidden, elements)?;
                observer.snapshot(Snapshot { layer: index + 1, hidden })?;
            }
            if stops {
                return Err(Error::Interrupted);
            }
        }
        self.ask_about(layers.end, batches, &contexts, &hidden, &mut watches)?;
        watches.settle()?;
        Ok(hidden)
    }

    /// Asks whether the hidden states of all batches before layer `layer` are finite.
    fn ask_about(
        &self,
        layer: usize,
        batches: &[Batch],
        contexts: &[Context<'_, B>],
        hidden: &[Hidden<B>],
        watches: &mut Watches<'_, B>,
    ) -> Result<()> {
        for ((batch, context), hidden) in batches.iter().zip(contexts).zip(hidden) {
            let context = Context { rows: self.rows_before(layer, batch), ..*context };
            hidden.look(self.backend, |hidden| watches.ask(&context, self.before(layer), hidden))?;
        }
        Ok(())
    }

    /// Has the part after a layer read from the disk meanwhile.
    fn prefetch_after(&self, index: usize) {
        if index + 1 < self.stage.layers.end {
            self.parts.prefetch(Part::Layer(index + 1));
        } else if self.stage.outgoing.is_none() {
            self.parts.prefetch(if self.spec().tied() { Part::Embedding } else { Part::Head });
        }
    }

    /// Rows of a batch whose hidden states there are before layer `layer`.
    fn rows_before<'b>(&self, layer: usize, batch: &'b Batch) -> &'b Rows {
        if layer == self.stage.layers.end { batch.last() } else { &batch.rows }
    }

    /// Elements of the hidden states of all batches before layer `layer`.
    fn elements_before(&self, layer: usize, batches: &[Batch]) -> usize {
        let rows = batches.iter().map(|batch| self.rows_before(layer, batch).len());
        rows.sum::<usize>() * self.spec().hidden
    }

    /// Whether any of the ranks that share the model says so.
    fn any(&self, own: bool) -> Result<bool> {
        let peers = self.backend.peers();
        let said = peers.exchange(vec![vec![u8::from(own)]; peers.ranks()])?;
        Ok(said.iter().any(|said| said == &[1]))
    }

    /// Hidden states before the first layer to run: those of a snapshot or of the stage before, or embeddings.
    fn begin(
        &self,
        sequences: &[&[u32]],
        batches: &[Batch],
        contexts: &[Context<'_, B>],
        resume: Option<Snapshot>,
        watches: &mut Watches<'_, B>,
    ) -> Result<Vec<Hidden<B>>> {
        let width = self.spec().hidden;
        let layer = resume.as_ref().map_or(self.stage.layers.start, |snapshot| snapshot.layer);
        let ready = match (resume, self.stage.incoming) {
            (Some(Snapshot { hidden, .. }), _) => Some(hidden),
            (None, Some(incoming)) => Some(self.received(incoming, batches)?),
            (None, None) => None,
        };
        let table = if ready.is_none() { Some(self.parts.embedding()?) } else { None };
        let mut row = 0;
        let begin = |(batch, context): (&Batch, &Context<'_, B>)| {
            let held = self.rows_before(layer, batch);
            let rows = row..row + held.len();
            row = rows.end;
            let buffer = match (&table, &ready) {
                (_, Some(hidden)) => {
                    self.backend.upload(width, &hidden[rows.start * width..rows.end * width])?
                }
                (Some(table), None) => {
                    self.embed_batch(table, &sequences[batch.windows.clone()], batch.windows.start)?
                }
                (None, None) => unreachable!("hidden states that are not there are embedded"),
            };
            watches.ask(&Context { rows: held, ..*context }, &self.spec().embedding, &buffer)?;
            Hidden::put(self.backend, width, buffer, self.schedule.hidden)
        };
        batches.iter().zip(contexts).map(begin).collect()
    }

    /// Hidden states of the stage before.
    fn received(&self, incoming: &dyn Pipe, batches: &[Batch]) -> Result<Vec<f32>> {
        let hidden = incoming.receive()?;
        let elements = batches.iter().map(Batch::len).sum::<usize>() * self.spec().hidden;
        if hidden.len() == elements {
            return Ok(hidden);
        }
        let what = format!(
            "the stage before layer {} handed on {} elements where {elements} were due: it runs other windows, or another model; start all ranks with the same command",
            self.stage.layers.start,
            hidden.len()
        );
        Err(KernelError::Lost { what }.into())
    }

    /// One layer over all batches, one after the other. What a batch leaves is known to be finite when the next has been
    /// handed to the device, so that the device never waits for this thread, nor has more than one batch ahead of it.
    fn run_layer(
        &self,
        index: usize,
        weights: &BlockWeights<B>,
        batches: &[Batch],
        contexts: &[Context<'_, B>],
        hidden: &mut [Hidden<B>],
        watches: &mut Watches<'_, B>,
    ) -> Result<()> {
        let block = &self.spec().blocks[index];
        for ((batch, context), hidden) in batches.iter().zip(contexts).zip(hidden) {
            let context = Context { left_by: self.before(index), ..*context };
            let leaving = batch.last.as_ref().filter(|_| index + 1 == self.stage.layers.end);
            let earlier = watches.asked();
            hidden.update(self.backend, |hidden| context.block(block, weights, hidden, leaving, watches))?;
            watches.settle_first(earlier)?;
        }
        Ok(())
    }

    /// The `elements` hidden states of all batches, in the order of the group's windows; each batch that is given away goes as soon as
    /// it is copied.
    fn on_host(
        &self,
        hidden: impl IntoIterator<Item = impl Borrow<Hidden<B>>>,
        elements: usize,
    ) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(elements);
        for batch in hidden {
            batch.borrow().append_to(self.backend, &mut all)?;
        }
        Ok(all)
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
        | Error::Scores(_)
        | Error::Snapshot { .. }) => other,
    }
}
