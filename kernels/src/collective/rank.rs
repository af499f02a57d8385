//! One of several ranks that share a model: a backend among others.
//!
//! Every rank holds a range of the output rows of each matrix and computes those columns of its outputs. What may go on
//! by columns does: heads through rotation and attention, gate and up through their product, sums of experts. The rest
//! wants whole rows, which are gathered then and once. No sum crosses a rank, so one rank and many give the same bits.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ctq_container::TiledMatrix;
use ctq_model::scheme::ActivationScale;

use super::cut::Cut;
use super::{Alone, Collective, Peers};
use crate::backend::{
    AttentionShape, Backend, BackendIdentity, GatePair, HeadTiles, KernelError, Pieces, Quantizer, Span,
    Treatment,
};
use crate::route::{ExpertTokens, Renormalize};
use crate::{Compute, Rotation, composed};

/// Ids whose embeddings cross between ranks at a time.
const IDS_AT_ONCE: usize = 1024;

/// A backend that is one of several ranks.
///
/// All ranks make the same calls in the same order.
pub struct Rank<B: Backend> {
    backend: B,
    collective: Box<dyn Collective<B>>,
    received: AtomicU64,
}

impl<B: Backend> fmt::Debug for Rank<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rank, ranks) = (self.collective.rank(), self.collective.ranks());
        f.debug_struct("Rank").field("rank", &rank).field("ranks", &ranks).finish_non_exhaustive()
    }
}

/// This rank's rows of a matrix.
#[derive(Debug)]
pub struct RankMatrix<M> {
    held: M,
    cut: Arc<Cut>,
}

/// Activations of which this rank has some columns, or all.
#[derive(Debug)]
pub struct RankBuffer<T> {
    /// How columns are cut, and this rank's; gone once they are gathered.
    columns: Option<(Arc<Cut>, Mutex<Option<T>>)>,
    whole: OnceLock<T>,
}

impl<T> RankBuffer<T> {
    fn whole(buffer: T) -> RankBuffer<T> {
        RankBuffer { columns: None, whole: OnceLock::from(buffer) }
    }

    fn part(cut: &Arc<Cut>, buffer: T) -> RankBuffer<T> {
        RankBuffer { columns: Some((Arc::clone(cut), Mutex::new(Some(buffer)))), whole: OnceLock::new() }
    }

    /// How columns are cut, while they are.
    fn cut(&self) -> Option<&Arc<Cut>> {
        if self.whole.get().is_some() {
            return None;
        }
        self.columns.as_ref().map(|(cut, _)| cut)
    }

    /// This rank's columns. Only while they are cut.
    fn held(&self) -> Held<'_, T> {
        let (_, part) = self.columns.as_ref().expect("columns are cut");
        Held(part.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// This rank's columns, to change. Only while they are cut.
    fn held_mut(&mut self) -> &mut T {
        let (_, part) = self.columns.as_mut().expect("columns are cut");
        part.get_mut().unwrap_or_else(PoisonError::into_inner).as_mut().expect("not gathered yet")
    }

    /// This rank's columns for good, and how columns are cut. Only while they are.
    fn into_part(self) -> (Arc<Cut>, T) {
        let (cut, part) = self.columns.expect("columns are cut");
        (cut, part.into_inner().unwrap_or_else(PoisonError::into_inner).expect("not gathered yet"))
    }

    /// All columns for good. Only once they are gathered.
    fn into_whole(self) -> T {
        self.whole.into_inner().expect("gathered before")
    }
}

/// A loan of a rank's columns.
struct Held<'a, T>(MutexGuard<'a, Option<T>>);

impl<T> std::ops::Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("not gathered yet")
    }
}

/// Whether both are cut, and alike.
fn alike<T>(x: &RankBuffer<T>, y: &RankBuffer<T>) -> bool {
    matches!((x.cut(), y.cut()), (Some(x), Some(y)) if x == y)
}

impl<B: Backend> Rank<B> {
    /// The rank that `collective` says.
    pub fn new(backend: B, collective: Box<dyn Collective<B>>) -> Rank<B> {
        Rank { backend, collective, received: AtomicU64::new(0) }
    }

    /// A rank that shares with nobody.
    pub fn alone(backend: B) -> Rank<B> {
        Rank::new(backend, Box::new(Alone))
    }

    /// Bytes of activations that other ranks have handed to this one so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    fn rank(&self) -> usize {
        self.collective.rank()
    }

    /// Whether all columns of everything are here.
    fn is_alone(&self) -> bool {
        self.collective.ranks() == 1
    }

    fn is_empty(&self, cut: &Cut) -> bool {
        cut.range(self.rank()).is_empty()
    }

    /// All columns, gathered where they are not here yet.
    fn gathered<'b>(&self, x: &'b RankBuffer<B::Buffer>) -> Result<&'b B::Buffer, KernelError> {
        if let Some(whole) = x.whole.get() {
            return Ok(whole);
        }
        let (cut, part) = x.columns.as_ref().expect("a buffer is cut or whole");
        assert!(cut.is_partition(), "heads that several ranks hold are not gathered");
        let part = part.lock().unwrap_or_else(PoisonError::into_inner).take().expect("gathered once");
        let widths = cut.widths();
        let whole = match self.collective.ranks() {
            1 => part,
            _ => self.collective.all_gather(&self.backend, part, &widths)?,
        };
        let rows = self.backend.elements(&whole) / cut.total().max(1);
        let foreign = cut.total() - widths[self.rank()];
        self.received.fetch_add((rows * foreign * size_of::<f32>()) as u64, Ordering::Relaxed);
        Ok(x.whole.get_or_init(|| whole))
    }

    fn gathered_mut<'b>(&self, x: &'b mut RankBuffer<B::Buffer>) -> Result<&'b mut B::Buffer, KernelError> {
        self.gathered(x)?;
        Ok(x.whole.get_mut().expect("gathered above"))
    }

    /// Something done to all columns, or to this rank's where that comes to the same.
    fn change(
        &self,
        x: &mut RankBuffer<B::Buffer>,
        by_columns: impl FnOnce(&Cut) -> bool,
        change: impl FnOnce(&mut B::Buffer, Range<usize>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        match x.cut().cloned() {
            Some(cut) if by_columns(&cut) => {
                if self.is_empty(&cut) {
                    Ok(())
                } else {
                    change(x.held_mut(), cut.range(self.rank()))
                }
            }
            Some(cut) => change(self.gathered_mut(x)?, 0..cut.total()),
            None => change(self.gathered_mut(x)?, 0..usize::MAX),
        }
    }
}

impl<B: Backend> Backend for Rank<B> {
    type Matrix = RankMatrix<B::Matrix>;
    type Buffer = RankBuffer<B::Buffer>;
    type Operand = B::Operand;
    type Watch = B::Watch;

    fn identity(&self) -> BackendIdentity {
        self.backend.identity()
    }

    fn peers(&self) -> &dyn Peers {
        &*self.collective
    }

    fn matrix(
        &self,
        matrix: &TiledMatrix,
        rows: Range<usize>,
        pieces: Pieces,
    ) -> Result<Self::Matrix, KernelError> {
        let cut = Cut::of(pieces, rows.len(), self.collective.ranks());
        let part = cut.range(self.rank());
        let held = self.backend.matrix(matrix, rows.start + part.start..rows.start + part.end, pieces)?;
        Ok(RankMatrix { held, cut: Arc::new(cut) })
    }

    fn rows(&self, matrix: &Self::Matrix) -> usize {
        matrix.cut.total()
    }

    fn held(&self, matrix: &Self::Matrix) -> Range<usize> {
        matrix.cut.range(self.rank())
    }

    fn elements(&self, buffer: &Self::Buffer) -> usize {
        match (buffer.whole.get(), &buffer.columns) {
            (Some(whole), _) => self.backend.elements(whole),
            (None, Some(_)) => self.backend.elements(&buffer.held()),
            (None, None) => 0,
        }
    }

    fn upload(&self, width: usize, values: &[f32]) -> Result<Self::Buffer, KernelError> {
        self.backend.upload(width, values).map(RankBuffer::whole)
    }

    fn zeros(&self, rows: usize, width: usize) -> Result<Self::Buffer, KernelError> {
        // Cut as the outputs of a linear are, which may be added to it then.
        let cut = Cut::of(Pieces::Atoms, width, self.collective.ranks());
        let held = self.backend.zeros(rows, cut.range(self.rank()).len())?;
        Ok(RankBuffer::part(&Arc::new(cut), held))
    }

    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<f32>, KernelError> {
        self.backend.download(self.gathered(buffer)?)
    }

    fn embed(&self, table: &Self::Matrix, ids: &[u32]) -> Result<Self::Buffer, KernelError> {
        // A row comes whole from the one rank that holds it.
        let ranks = self.collective.ranks();
        if ranks == 1 {
            return self.backend.embed(&table.held, ids).map(RankBuffer::whole);
        }
        let first = table.cut.range(self.rank()).start as u32;
        let holder = |id: &u32| (0..ranks).find(|rank| table.cut.range(*rank).contains(&(*id as usize)));
        let (mut width, mut values) = (0, Vec::new());
        for ids in ids.chunks(IDS_AT_ONCE) {
            let holders: Vec<usize> =
                ids.iter().map(|id| holder(id).expect("ids are in the table")).collect();
            let own: Vec<u32> = ids
                .iter()
                .zip(&holders)
                .filter(|(_, rank)| **rank == self.rank())
                .map(|(id, _)| id - first)
                .collect();
            let rows = if own.is_empty() {
                Vec::new()
            } else {
                self.backend.download(&self.backend.embed(&table.held, &own)?)?
            };
            let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
            let from = self.collective.exchange(vec![bytes; ranks])?;
            let row_bytes = from.iter().map(Vec::len).sum::<usize>() / ids.len();
            width = row_bytes / size_of::<f32>();
            let mut rows: Vec<_> = from.iter().map(|rows| rows.chunks_exact(row_bytes.max(1))).collect();
            for rank in holders {
                let row = rows[rank].next().expect("a row for every id that a rank holds");
                values.extend(row.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            }
        }
        self.upload(width, &values)
    }

    fn norm(&self, x: &Self::Buffer, weight: &[f32], epsilon: f32) -> Result<Self::Buffer, KernelError> {
        match x.cut() {
            Some(cut) if cut.keeps_runs(weight.len()) => {
                let held = x.held();
                let part = if self.is_empty(cut) {
                    self.backend.gather(&held, &[])?
                } else {
                    self.backend.norm(&held, weight, epsilon)?
                };
                Ok(RankBuffer::part(cut, part))
            }
            Some(_) | None => self.backend.norm(self.gathered(x)?, weight, epsilon).map(RankBuffer::whole),
        }
    }

    fn prepare(
        &self,
        x: &Self::Buffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError> {
        self.backend.prepare(self.gathered(x)?, treatment, compute, windows)
    }

    fn norm_operand(
        &self,
        x: &Self::Buffer,
        weight: &[f32],
        epsilon: f32,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<(Self::Operand, Self::Watch), KernelError> {
        self.backend.norm_operand(self.gathered(x)?, weight, epsilon, treatment, compute, windows)
    }

    fn gate_operand(
        &self,
        gate: Self::Buffer,
        up: &Self::Buffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError> {
        if !self.is_alone() {
            // Only the product is gathered.
            return composed::gate_operand(self, gate, up, treatment, compute, windows);
        }
        self.gathered(&gate)?;
        let (gate, up) = (gate.into_whole(), self.gathered(up)?);
        self.backend.gate_operand(gate, up, treatment, compute, windows)
    }

    fn linear(
        &self,
        x: &Self::Operand,
        weight: &Self::Matrix,
        bias: Option<&[f32]>,
        compute: Compute,
    ) -> Result<Self::Buffer, KernelError> {
        let part = self.backend.linear(x, &weight.held, bias, compute)?;
        Ok(RankBuffer::part(&weight.cut, part))
    }

    fn linear_add(
        &self,
        sum: &mut Self::Buffer,
        x: &Self::Operand,
        weight: &Self::Matrix,
        bias: Option<&[f32]>,
        compute: Compute,
    ) -> Result<(), KernelError> {
        if self.is_alone() {
            return self.backend.linear_add(self.gathered_mut(sum)?, x, &weight.held, bias, compute);
        }
        composed::linear_add(self, sum, x, weight, bias, compute)
    }

    fn gated(
        &self,
        x: &Self::Operand,
        pair: GatePair<'_, Self::Matrix>,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError> {
        if self.is_alone() {
            let pair = GatePair { gate: &pair.gate.held, up: &pair.up.held, biases: pair.biases };
            return self.backend.gated(x, pair, treatment, compute, windows);
        }
        composed::gated(self, x, pair, treatment, compute, windows)
    }

    fn linear_experts(
        &self,
        x: &[&Self::Operand],
        weights: &[&Self::Matrix],
        biases: &[Option<&[f32]>],
        compute: Compute,
    ) -> Result<Vec<Self::Buffer>, KernelError> {
        let held: Vec<&B::Matrix> = weights.iter().map(|weight| &weight.held).collect();
        let parts = self.backend.linear_experts(x, &held, biases, compute)?;
        Ok(parts.into_iter().zip(weights).map(|(part, weight)| RankBuffer::part(&weight.cut, part)).collect())
    }

    fn fake_quantize(
        &self,
        x: &mut Self::Buffer,
        quantizer: &Quantizer,
        head_dim: usize,
        windows: &[Range<usize>],
    ) -> Result<(), KernelError> {
        // A stored scale asks for no other column; a scale of a head, for those of the head.
        let stored = quantizer.activation.scale == ActivationScale::Static;
        let of_heads = quantizer.scales.len() > 1;
        let by_columns = |cut: &Cut| stored && (!of_heads || cut.keeps_runs(head_dim));
        self.change(x, by_columns, |x, columns| {
            let heads = columns.start / head_dim..(columns.end / head_dim).min(quantizer.scales.len());
            if of_heads && heads != (0..quantizer.scales.len()) {
                let scales = quantizer.scales[heads].to_vec();
                let quantizer = Quantizer { scales, ..quantizer.clone() };
                return self.backend.fake_quantize(x, &quantizer, head_dim, windows);
            }
            self.backend.fake_quantize(x, quantizer, head_dim, windows)
        })
    }

    fn rotate(&self, x: &mut Self::Buffer, rotation: &Rotation, spans: &[Span]) -> Result<(), KernelError> {
        let by_columns = |cut: &Cut| cut.keeps_runs(rotation.head_dim());
        self.change(x, by_columns, |x, _| self.backend.rotate(x, rotation, spans))
    }

    fn attend(
        &self,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        shape: &AttentionShape,
        heads: Range<usize>,
        compute: Compute,
        asked: &[Span],
        windows: &[Range<usize>],
    ) -> Result<Self::Buffer, KernelError> {
        let cuts = (q.cut(), k.cut(), v.cut());
        let (Some(queries), Some(keys), Some(_)) = cuts else {
            let (q, k, v) = (self.gathered(q)?, self.gathered(k)?, self.gathered(v)?);
            let whole = self.backend.attend(q, k, v, shape, heads, compute, asked, windows)?;
            return Ok(RankBuffer::whole(whole));
        };
        let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        if !alike(k, v) || !queries.keeps_runs(dim) || !keys.keeps_runs(dim) {
            // Cut within a head: every rank computes all of them.
            let (q, k, v) = (self.gathered(q)?, self.gathered(k)?, self.gathered(v)?);
            let whole = self.backend.attend(q, k, v, shape, heads, compute, asked, windows)?;
            return Ok(RankBuffer::whole(whole));
        }
        let (columns, keys) = (queries.range(self.rank()), keys.range(self.rank()));
        let held = q.held();
        if columns.is_empty() {
            return Ok(RankBuffer::part(queries, self.backend.gather(&held, &[])?));
        }
        // Counted from the first query head of the first key-value head that is here.
        let first = keys.start / dim * group;
        let here = columns.start / dim - first..columns.end / dim - first;
        let kv_heads = keys.len() / dim;
        let shape = AttentionShape { heads: kv_heads * group, kv_heads, ..*shape };
        let part = self.backend.attend(&held, &k.held(), &v.held(), &shape, here, compute, asked, windows)?;
        Ok(RankBuffer::part(queries, part))
    }

    fn gate(&self, gate: Self::Buffer, up: &Self::Buffer) -> Result<Self::Buffer, KernelError> {
        if alike(&gate, up) {
            let (cut, gate) = gate.into_part();
            return Ok(RankBuffer::part(&cut, self.backend.gate(gate, &up.held())?));
        }
        self.gathered(&gate)?;
        self.backend.gate(gate.into_whole(), self.gathered(up)?).map(RankBuffer::whole)
    }

    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<(), KernelError> {
        if alike(x, y) {
            return self.backend.add(x.held_mut(), &y.held());
        }
        let y = self.gathered(y)?;
        self.backend.add(self.gathered_mut(x)?, y)
    }

    fn watch(&self, x: &Self::Buffer) -> Result<Self::Watch, KernelError> {
        // Every rank looks at all columns, so that all are told the same.
        self.backend.watch(self.gathered(x)?)
    }

    fn seen(&self, watch: Self::Watch) -> Result<Option<usize>, KernelError> {
        self.backend.seen(watch)
    }

    fn route(
        &self,
        logits: &Self::Buffer,
        top_k: usize,
        renormalize: Renormalize,
    ) -> Result<Vec<ExpertTokens>, KernelError> {
        self.backend.route(self.gathered(logits)?, top_k, renormalize)
    }

    fn gather(&self, x: &Self::Buffer, rows: &[u32]) -> Result<Self::Buffer, KernelError> {
        match x.cut() {
            Some(cut) => Ok(RankBuffer::part(cut, self.backend.gather(&x.held(), rows)?)),
            None => self.backend.gather(self.gathered(x)?, rows).map(RankBuffer::whole),
        }
    }

    fn scatter_add(
        &self,
        x: &mut Self::Buffer,
        y: &Self::Buffer,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<(), KernelError> {
        if alike(x, y) {
            let is_empty = x.cut().is_some_and(|cut| self.is_empty(cut));
            let scatter = |x, y: &B::Buffer| self.backend.scatter_add(x, y, rows, weights);
            return if is_empty { Ok(()) } else { scatter(x.held_mut(), &y.held()) };
        }
        let y = self.gathered(y)?;
        self.backend.scatter_add(self.gathered_mut(x)?, y, rows, weights)
    }

    fn concatenate(&self, parts: &[&Self::Buffer]) -> Result<Self::Buffer, KernelError> {
        let parts = parts.iter().map(|part| self.gathered(part)).collect::<Result<Vec<_>, _>>()?;
        self.backend.concatenate(&parts).map(RankBuffer::whole)
    }

    fn head(
        &self,
        x: &Self::Operand,
        head: &Self::Matrix,
        vocabulary: Range<usize>,
        targets: &[Option<u32>],
        compute: Compute,
    ) -> Result<HeadTiles, KernelError> {
        let held = self.held(head);
        assert!(held.start <= vocabulary.start && vocabulary.end <= held.end, "rows that this rank holds");
        let first = held.start as u32;
        let targets: Vec<Option<u32>> =
            targets.iter().map(|id| id.and_then(|id| id.checked_sub(first))).collect();
        let local = vocabulary.start - held.start..vocabulary.end - held.start;
        self.backend.head(x, &head.held, local, &targets, compute)
    }
}
