//! Several backends that look like one: tensor parallelism by output rows.
//!
//! Every matrix is cut along its output rows at multiples of 16, attention along its heads; what each rank computed
//! is gathered side by side and every rank goes on with a whole copy. No sum crosses a rank, so one rank and many
//! give the same bits.

use std::ops::Range;

use ctq_container::TiledMatrix;
use rayon::prelude::*;

use crate::backend::{
    AttentionShape, Backend, BackendIdentity, HeadTiles, KernelError, Pieces, Quantizer, Treatment,
};
use crate::route::{ExpertTokens, Renormalize};
use crate::{Compute, Rotation};

/// Ranks of one model, in one process.
#[derive(Clone, Debug)]
pub struct Sharded<B> {
    ranks: Vec<B>,
}

/// A matrix cut by rows: what each rank holds, and where its rows begin.
#[derive(Debug)]
pub struct ShardedMatrix<M> {
    shards: Vec<(usize, M)>,
    rows: usize,
}

impl<B: Backend> Sharded<B> {
    /// One rank for each backend.
    ///
    /// # Panics
    /// If there is none.
    pub fn new(ranks: Vec<B>) -> Sharded<B> {
        assert!(!ranks.is_empty(), "a model needs at least one rank");
        Sharded { ranks }
    }

    /// What `run` makes on every rank; the error of the first rank that fails.
    fn each<T: Send>(
        &self,
        run: impl Fn(usize, &B) -> Result<T, KernelError> + Sync,
    ) -> Result<Vec<T>, KernelError> {
        self.ranks
            .par_iter()
            .enumerate()
            .map(|(index, rank)| run(index, rank))
            .collect::<Vec<_>>()
            .into_iter()
            .collect()
    }

    /// Puts the ranks' columns side by side, a copy for every rank.
    fn all_gather(&self, parts: &[B::Buffer]) -> Result<Vec<B::Buffer>, KernelError> {
        let parts: Vec<&B::Buffer> = parts.iter().collect();
        self.each(|_, rank| rank.concatenate(&parts))
    }
}

/// Rank `index`'s part of `count` things in pieces of `piece`: contiguous, as even as pieces allow.
fn share(count: usize, piece: usize, index: usize, ranks: usize) -> Range<usize> {
    let pieces = count.div_ceil(piece);
    let cut = |index: usize| (index * pieces / ranks * piece).min(count);
    cut(index)..cut(index + 1)
}

impl<B: Backend> Backend for Sharded<B> {
    type Matrix = ShardedMatrix<B::Matrix>;
    type Buffer = Vec<B::Buffer>;
    type Operand = Vec<B::Operand>;

    fn identity(&self) -> BackendIdentity {
        self.ranks[0].identity()
    }

    fn matrix(
        &self,
        matrix: &TiledMatrix,
        rows: Range<usize>,
        pieces: Pieces,
    ) -> Result<Self::Matrix, KernelError> {
        let shards = self.each(|index, rank| {
            let part = share(rows.len(), pieces.rows(), index, self.ranks.len());
            let shard = rank.matrix(matrix, rows.start + part.start..rows.start + part.end, pieces)?;
            Ok((part.start, shard))
        })?;
        Ok(ShardedMatrix { shards, rows: rows.len() })
    }

    fn rows(&self, matrix: &Self::Matrix) -> usize {
        matrix.rows
    }

    fn upload(&self, width: usize, values: &[f32]) -> Result<Self::Buffer, KernelError> {
        self.each(|_, rank| rank.upload(width, values))
    }

    fn zeros(&self, rows: usize, width: usize) -> Result<Self::Buffer, KernelError> {
        self.each(|_, rank| rank.zeros(rows, width))
    }

    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<f32>, KernelError> {
        self.ranks[0].download(&buffer[0])
    }

    fn embed(&self, table: &Self::Matrix, ids: &[u32]) -> Result<Self::Buffer, KernelError> {
        // Each rank looks up the ids it holds; a row comes whole from one rank.
        let mut width = 0;
        let mut rows = vec![Vec::new(); ids.len()];
        for (index, (rank, (first, shard))) in self.ranks.iter().zip(&table.shards).enumerate() {
            let end = table.shards.get(index + 1).map_or(table.rows, |(next, _)| *next);
            let held: Vec<usize> =
                (0..ids.len()).filter(|i| (*first..end).contains(&(ids[*i] as usize))).collect();
            if held.is_empty() {
                continue;
            }
            let wanted: Vec<u32> = held.iter().map(|i| ids[*i] - *first as u32).collect();
            let values = rank.download(&rank.embed(shard, &wanted)?)?;
            width = values.len() / wanted.len();
            for (index, row) in held.into_iter().zip(values.chunks_exact(width)) {
                rows[index] = row.to_vec();
            }
        }
        self.upload(width, &rows.concat())
    }

    fn norm(&self, x: &Self::Buffer, weight: &[f32], epsilon: f32) -> Result<Self::Buffer, KernelError> {
        self.each(|index, rank| rank.norm(&x[index], weight, epsilon))
    }

    fn prepare(
        &self,
        x: &Self::Buffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError> {
        self.each(|index, rank| rank.prepare(&x[index], treatment, compute, windows))
    }

    fn linear(
        &self,
        x: &Self::Operand,
        weight: &Self::Matrix,
        bias: Option<&[f32]>,
        compute: Compute,
    ) -> Result<Self::Buffer, KernelError> {
        let parts =
            self.each(|index, rank| rank.linear(&x[index], &weight.shards[index].1, bias, compute))?;
        self.all_gather(&parts)
    }

    fn linear_experts(
        &self,
        x: &[&Self::Operand],
        weights: &[&Self::Matrix],
        biases: &[Option<&[f32]>],
        compute: Compute,
    ) -> Result<Vec<Self::Buffer>, KernelError> {
        let parts = self.each(|index, rank| {
            let x: Vec<&B::Operand> = x.iter().map(|x| &x[index]).collect();
            let weights: Vec<&B::Matrix> = weights.iter().map(|weight| &weight.shards[index].1).collect();
            rank.linear_experts(&x, &weights, biases, compute)
        })?;
        let mut ranks: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
        let expert = |_| self.all_gather(&ranks.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>());
        (0..x.len()).map(expert).collect()
    }

    fn fake_quantize(
        &self,
        x: &mut Self::Buffer,
        quantizer: &Quantizer,
        head_dim: usize,
        windows: &[Range<usize>],
    ) -> Result<(), KernelError> {
        for (rank, x) in self.ranks.iter().zip(x) {
            rank.fake_quantize(x, quantizer, head_dim, windows)?;
        }
        Ok(())
    }

    fn rotate(
        &self,
        x: &mut Self::Buffer,
        rotation: &Rotation,
        windows: &[Range<usize>],
    ) -> Result<(), KernelError> {
        for (rank, x) in self.ranks.iter().zip(x) {
            rank.rotate(x, rotation, windows)?;
        }
        Ok(())
    }

    fn attend(
        &self,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        shape: &AttentionShape,
        heads: Range<usize>,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Buffer, KernelError> {
        let parts = self.each(|index, rank| {
            let part = share(heads.len(), 1, index, self.ranks.len());
            let part = heads.start + part.start..heads.start + part.end;
            rank.attend(&q[index], &k[index], &v[index], shape, part, compute, windows)
        })?;
        self.all_gather(&parts)
    }

    fn gate(&self, gate: &Self::Buffer, up: &Self::Buffer) -> Result<Self::Buffer, KernelError> {
        self.each(|index, rank| rank.gate(&gate[index], &up[index]))
    }

    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<(), KernelError> {
        for (index, (rank, x)) in self.ranks.iter().zip(x).enumerate() {
            rank.add(x, &y[index])?;
        }
        Ok(())
    }

    fn first_non_finite(&self, x: &Self::Buffer) -> Result<Option<usize>, KernelError> {
        self.ranks[0].first_non_finite(&x[0])
    }

    fn route(
        &self,
        logits: &Self::Buffer,
        top_k: usize,
        renormalize: Renormalize,
    ) -> Result<Vec<ExpertTokens>, KernelError> {
        self.ranks[0].route(&logits[0], top_k, renormalize)
    }

    fn gather(&self, x: &Self::Buffer, rows: &[u32]) -> Result<Self::Buffer, KernelError> {
        self.each(|index, rank| rank.gather(&x[index], rows))
    }

    fn scatter_add(
        &self,
        x: &mut Self::Buffer,
        y: &Self::Buffer,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<(), KernelError> {
        for (index, (rank, x)) in self.ranks.iter().zip(x).enumerate() {
            rank.scatter_add(x, &y[index], rows, weights)?;
        }
        Ok(())
    }

    fn concatenate(&self, parts: &[&Self::Buffer]) -> Result<Self::Buffer, KernelError> {
        self.each(|index, rank| rank.concatenate(&parts.iter().map(|part| &part[index]).collect::<Vec<_>>()))
    }

    fn head(
        &self,
        x: &Self::Operand,
        head: &Self::Matrix,
        vocabulary: Range<usize>,
        targets: &[Option<u32>],
        compute: Compute,
    ) -> Result<HeadTiles, KernelError> {
        let parts = self.each(|index, rank| {
            let (first, shard) = &head.shards[index];
            let end = first + rank.rows(shard);
            let part = vocabulary.start.clamp(*first, end)..vocabulary.end.clamp(*first, end);
            let local = part.start - first..part.end - first;
            let targets: Vec<Option<u32>> =
                targets.iter().map(|t| t.and_then(|t| t.checked_sub(*first as u32))).collect();
            rank.head(&x[index], shard, local, &targets, compute)
        })?;
        let tiles = parts.iter().map(|part| part.tiles).sum();
        let mut all = HeadTiles { tiles, partials: Vec::new(), targets: Vec::new() };
        for row in 0..targets.len() {
            for part in &parts {
                all.partials.extend(&part.partials[row * part.tiles..(row + 1) * part.tiles]);
            }
            all.targets.push(parts.iter().find_map(|part| part.targets.get(row).copied().flatten()));
        }
        Ok(all)
    }
}
