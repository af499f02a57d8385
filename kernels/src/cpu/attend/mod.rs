//! Causal attention. Cuts heads and windows into blocks of queries, packs keys and values once for all query heads that
//! share them, and writes what a block has summed to where it belongs.
//!
//! With bf16 compute the softmax keeps a running maximum over tiles of keys ([`running`]), with f32 it sees whole rows
//! of scores ([`whole`]). Both products of both go through the same register-blocked kernel as linears.
#![expect(unsafe_code, reason = "tasks write columns of outputs that lie between one another")]

mod pack;
mod running;
mod tile;
mod whole;

#[cfg(test)]
mod tests;

use std::ops::Range;

use rayon::prelude::*;

use self::pack::Values;
use crate::Compute;
use crate::backend::{AttentionShape, Span};
use crate::cpu::math::tanh_fast;
use crate::cpu::product::Unit;
use crate::cpu::{CpuBuffer, Isa};

/// Keys of one tile; tiles begin at a window's first key.
const KEYS: usize = 64;

/// What some models add to the softmax.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extras<'a> {
    /// Scores become `softcap * tanh(score / softcap)`.
    pub(crate) softcap: Option<f32>,
    /// One logit for each of the model's query heads, which takes part in the softmax without a value.
    pub(crate) sinks: Option<&'a [f32]>,
}

/// What is computed of which rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    /// Rows of queries, and of the output: one span a window.
    pub(crate) queries: &'a [Span],
    /// Rows of keys and values of each window.
    pub(crate) windows: &'a [Range<usize>],
    pub(crate) extras: Extras<'a>,
}

/// Attention of the query heads `heads`, whose columns are all that `q` holds, each window by itself and for the
/// positions that `queries` says: [rows of q, heads.len() * head_dim].
pub(crate) fn attend(
    isa: Isa,
    inputs: [&CpuBuffer; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    compute: Compute,
    queries: &[Span],
    windows: &[Range<usize>],
) -> CpuBuffer {
    attend_with(isa, inputs, shape, heads, compute, Asked { queries, windows, extras: Extras::default() })
}

/// [`attend`] with extras.
pub(crate) fn attend_with(
    isa: Isa,
    inputs: [&CpuBuffer; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    compute: Compute,
    asked: Asked<'_>,
) -> CpuBuffer {
    let job = Job { isa, unit: Unit::floats(isa, compute), inputs, shape, heads, asked };
    match compute {
        Compute::Bf16 => job.run::<running::Running>(),
        Compute::F32 => job.run::<whole::Whole>(),
    }
}

/// How a block of queries is computed.
trait Method {
    /// Queries of a block; blocks begin at multiples of it, counted from the window's first position.
    const QUERIES: usize;
    /// Packed keys of one head of a window.
    type Keys: Send + Sync;
    /// Buffers of one thread.
    type Scratch: Default;

    /// Packs keys, `size` of them and dimensions; `key` says each.
    fn pack<'a>(
        isa: Isa,
        unit: Unit,
        size: (usize, usize),
        key: impl Fn(usize) -> &'a [f32] + Sync,
    ) -> Self::Keys;

    /// Outputs of a block, [`Method::QUERIES`] rows every [`Values::width`]; those of queries that are not there are
    /// anything.
    fn block<'a>(block: &Block<'_, Self::Keys>, scratch: &'a mut Self::Scratch) -> &'a [f32];
}

/// All that is asked for.
struct Job<'a> {
    isa: Isa,
    unit: Unit,
    /// Queries, keys, values.
    inputs: [&'a CpuBuffer; 3],
    shape: &'a AttentionShape,
    heads: Range<usize>,
    asked: Asked<'a>,
}

impl Job<'_> {
    fn run<M: Method>(&self) -> CpuBuffer {
        let dim = self.shape.head_dim;
        let width = self.heads.len() * dim;
        let mut values = vec![0.0_f32; self.inputs[0].rows() * width];
        if values.is_empty() {
            return CpuBuffer { width, values };
        }
        let group = self.shape.heads / self.shape.kv_heads;
        let kv_heads = self.heads.start / group..(self.heads.end - 1) / group + 1;
        let packed = self.pack::<M>(&kv_heads);
        let tasks = self.tasks(M::QUERIES);
        let out = Base(values.as_mut_ptr());
        tasks.par_iter().for_each_init(M::Scratch::default, |scratch, task| {
            let out = &out;
            let (keys, values) = &packed[task.window * kv_heads.len() + task.head / group - kv_heads.start];
            let block = self.block(task, M::QUERIES, keys, values);
            let outputs = M::block(&block, scratch);
            let span = &self.asked.queries[task.window];
            for position in block.there.clone() {
                let from = &outputs[(position - block.first) * values.width()..][..dim];
                let row = span.rows.start + position - span.first;
                assert!(row < self.inputs[0].rows());
                // SAFETY: this row's columns of this head are inside the outputs, and no other task has both.
                unsafe {
                    let to = out.0.add(row * width + (task.head - self.heads.start) * dim);
                    to.copy_from_nonoverlapping(from.as_ptr(), dim);
                }
            }
        });
        CpuBuffer { width, values }
    }

    /// Keys and values, [window][key head].
    fn pack<M: Method>(&self, kv_heads: &Range<usize>) -> Vec<(M::Keys, Values)> {
        let dim = self.shape.head_dim;
        let [_, keys, values] = self.inputs;
        let head = |(window, head): (&Range<usize>, usize)| {
            let row = |x: &'_ CpuBuffer, row: usize| (window.start + row) * x.width + head * dim;
            let size = (window.len(), dim);
            let key = |index: usize| &keys.values[row(keys, index)..][..dim];
            let value = |index: usize| &values.values[row(values, index)..][..dim];
            (M::pack(self.isa, self.unit, size, key), Values::pack(self.isa, self.unit, size, value))
        };
        let heads: Vec<(&Range<usize>, usize)> = self
            .asked
            .windows
            .iter()
            .flat_map(|window| kv_heads.clone().map(move |at| (window, at)))
            .collect();
        heads.into_par_iter().map(head).collect()
    }

    /// Blocks of queries. Heads that share keys are neighbours in memory: one after the other for each block.
    fn tasks(&self, queries: usize) -> Vec<Task> {
        let group = self.shape.heads / self.shape.kv_heads;
        let heads: Vec<usize> = self.heads.clone().collect();
        let mut tasks = Vec::new();
        for (window, span) in self.asked.queries.iter().enumerate() {
            let there = span.positions();
            let firsts = if there.is_empty() { 0..0 } else { there.start / queries * queries..there.end };
            for group in heads.chunk_by(|a, b| a / group == b / group) {
                // Those that see most keys first.
                for first in firsts.clone().step_by(queries).rev() {
                    tasks.extend(group.iter().map(|head| Task { window, head: *head, first }));
                }
            }
        }
        tasks
    }

    fn block<'a, K>(&'a self, task: &Task, queries: usize, keys: &'a K, values: &'a Values) -> Block<'a, K> {
        let (q, dim) = (self.inputs[0], self.shape.head_dim);
        let span = &self.asked.queries[task.window];
        let positions = span.positions();
        let there = task.first.max(positions.start)..positions.end.min(task.first + queries);
        let row = span.rows.start + there.start - span.first;
        Block {
            isa: self.isa,
            unit: self.unit,
            shape: self.shape,
            softcap: self.asked.extras.softcap,
            sink: self.asked.extras.sinks.map(|sinks| sinks[task.head]),
            rows: self.asked.windows[task.window].len(),
            first: task.first,
            there,
            queries: &q.values[row * q.width + (task.head - self.heads.start) * dim..],
            stride: q.width,
            keys,
            values,
        }
    }
}

/// One block of queries.
struct Task {
    window: usize,
    /// Query head, counted in the shape.
    head: usize,
    /// Position of the block's first query, whether or not it is there.
    first: usize,
}

/// The first of all outputs.
struct Base(*mut f32);

// SAFETY: tasks write disjoint elements behind it, and `Job::run` waits for all of them.
unsafe impl Sync for Base {}

/// One block of queries of one head of a window, and what it sees.
///
/// Which keys are multiplied with zeros depends on the block's place in the window alone, not on which of its queries
/// are there: that keeps even the bits of what is not finite.
struct Block<'a, K> {
    isa: Isa,
    unit: Unit,
    shape: &'a AttentionShape,
    softcap: Option<f32>,
    sink: Option<f32>,
    /// Keys of the window.
    rows: usize,
    /// Position of the first query.
    first: usize,
    /// Positions whose queries are there.
    there: Range<usize>,
    /// The first query that is there, and every `stride` another.
    queries: &'a [f32],
    stride: usize,
    keys: &'a K,
    values: &'a Values,
}

impl<K> Block<'_, K> {
    /// Positions that `position` sees.
    fn seen(&self, position: usize) -> Range<usize> {
        let window = self.shape.window.unwrap_or(usize::MAX);
        (position + 1).saturating_sub(window)..position + 1
    }

    /// Keys that any of the queries of some positions of the window sees.
    fn seen_by(&self, positions: Range<usize>) -> Range<usize> {
        let end = positions.end.min(self.rows);
        self.seen(positions.start).start.min(end)..end
    }

    /// Whether any query of some positions is there.
    fn any(&self, positions: &Range<usize>) -> bool {
        positions.start < self.there.end && self.there.start < positions.end
    }

    /// Queries of some positions, [positions, dim], zeros for those that are not there.
    fn copy_queries(&self, positions: Range<usize>, to: &mut [f32]) {
        let dim = self.shape.head_dim;
        for (position, to) in positions.zip(to.chunks_exact_mut(dim)) {
            if self.there.contains(&position) {
                to.copy_from_slice(&self.queries[(position - self.there.start) * self.stride..][..dim]);
            } else {
                to.fill(0.0);
            }
        }
    }

    /// `1 / sqrt(head_dim)`.
    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }
}

/// `cap * tanh(score / cap)`.
fn cap_scores(scores: &mut [f32], cap: f32) {
    let inverse = 1.0 / cap;
    scores.iter_mut().for_each(|score| *score = cap * tanh_fast(*score * inverse));
}
