//! From the last hidden states to negative log-likelihoods, without ever holding the vocabulary.

use std::ops::Range;

use ctq_kernels::collective::Peers;
use ctq_kernels::{Backend, HeadTiles, VOCABULARY_TILE};
use rayon::prelude::*;

use crate::block::Context;
use crate::error::{Error, Result};
use crate::weights::LinearWeights;

/// Bytes of logits that are looked at together; changes nothing but memory.
const LOGITS_BYTES: usize = 128 << 20;

/// Rows of the head that are looked at together, at most.
pub const HEAD_ROWS: usize = 32 * VOCABULARY_TILE;

/// `-ln p(target)` of each row of normed hidden states, softmax over the first `vocabulary` rows of the head.
///
/// Partial sums of 128 logits are folded in vocabulary order, in f64.
pub(crate) fn score<B: Backend>(
    context: &Context<'_, B>,
    head: &LinearWeights<B>,
    operand: &B::Operand,
    targets: &[u32],
    vocabulary: usize,
) -> Result<Vec<f64>> {
    let backend = context.backend;
    let rows = targets.len();
    let targets: Vec<Option<u32>> = targets.iter().map(|target| Some(*target)).collect();
    let block = (LOGITS_BYTES / 4 / rows.max(1)) / VOCABULARY_TILE * VOCABULARY_TILE;
    let block = block.clamp(VOCABULARY_TILE, HEAD_ROWS);
    let held = backend.held(&head.matrix);
    let held = held.start.min(vocabulary)..held.end.min(vocabulary);
    let mut blocks = held.clone().step_by(block).map(|start| {
        let vocabulary = start..held.end.min(start + block);
        let tiles = backend.head(operand, &head.matrix, vocabulary, &targets, context.compute);
        tiles.map_err(|source| Error::Kernel { module: head.module.clone(), source })
    });
    if backend.peers().ranks() > 1 {
        return across(backend.peers(), &blocks.collect::<Result<Vec<_>>>()?, rows);
    }
    // While a device makes the tiles of one block, those of the block before are folded.
    let mut folds = vec![Fold::default(); rows];
    let mut made = blocks.next().transpose()?;
    while let Some(tiles) = made {
        let (next, ()) = rayon::join(|| blocks.next().transpose(), || fold(&mut folds, &tiles));
        made = next?;
    }
    Ok(folds.iter().map(Fold::nll).collect())
}

/// The same where each rank has tiles of its own part of the vocabulary: each folds some of the rows over all tiles, and
/// all get all results.
fn across(peers: &dyn Peers, own: &[HeadTiles], rows: usize) -> Result<Vec<f64>> {
    let rows_of = |rank: usize| rank * rows / peers.ranks()..(rank + 1) * rows / peers.ranks();
    let parts = (0..peers.ranks()).map(|rank| to_bytes(own, rows_of(rank))).collect();
    let own_rows = rows_of(peers.rank()).len();
    let mut folds = vec![Fold::default(); own_rows];
    for part in peers.exchange(parts)? {
        fold(&mut folds, &from_bytes(&part, own_rows));
    }
    let nll: Vec<u8> = folds.iter().flat_map(|fold| fold.nll().to_le_bytes()).collect();
    let all = peers.exchange(vec![nll; peers.ranks()])?.concat();
    Ok(all.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes"))).collect())
}

/// Rows `rows` of several runs of tiles, one after the other: of each row its target's logit where it is
/// here, then largest logit and sum of every tile.
fn to_bytes(runs: &[HeadTiles], rows: Range<usize>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for row in rows {
        let target = runs.iter().find_map(|tiles| tiles.targets[row]);
        bytes.push(u8::from(target.is_some()));
        bytes.extend(target.unwrap_or_default().to_le_bytes());
        for tiles in runs {
            for (largest, sum) in &tiles.partials[row * tiles.tiles..(row + 1) * tiles.tiles] {
                bytes.extend(largest.to_le_bytes());
                bytes.extend(sum.to_le_bytes());
            }
        }
    }
    bytes
}

fn from_bytes(bytes: &[u8], rows: usize) -> HeadTiles {
    const TARGET: usize = 5;
    const TILE: usize = 12;
    let row_bytes = bytes.len().checked_div(rows).unwrap_or(0);
    let mut all = HeadTiles { tiles: row_bytes.saturating_sub(TARGET) / TILE, ..HeadTiles::default() };
    let float = |b: &[u8]| f32::from_le_bytes(b[..4].try_into().expect("four bytes"));
    for row in bytes.chunks_exact(row_bytes.max(1)) {
        let (target, tiles) = row.split_at(TARGET);
        all.targets.push((target[0] == 1).then(|| float(&target[1..])));
        all.partials.extend(
            tiles
                .chunks_exact(TILE)
                .map(|tile| (float(tile), f64::from_le_bytes(tile[4..].try_into().expect("eight bytes")))),
        );
    }
    all
}

/// Rows worth a task of their own: a hundred exponentials and more take microseconds.
const FOLDED_ROWS: usize = 64;

/// Adds tiles to each row, in order.
fn fold(folds: &mut [Fold], tiles: &HeadTiles) {
    folds.par_iter_mut().with_min_len(FOLDED_ROWS).enumerate().for_each(|(row, fold)| {
        for (largest, sum) in &tiles.partials[row * tiles.tiles..(row + 1) * tiles.tiles] {
            fold.add(*largest, *sum);
        }
        if let Some(target) = tiles.targets[row] {
            fold.target = f64::from(target);
        }
    });
}

/// Running log-sum-exp of one row.
#[derive(Clone, Copy, Debug)]
struct Fold {
    largest: f64,
    sum: f64,
    target: f64,
}

impl Default for Fold {
    fn default() -> Fold {
        Fold { largest: f64::NEG_INFINITY, sum: 0.0, target: f64::NAN }
    }
}

impl Fold {
    fn add(&mut self, largest: f32, sum: f64) {
        let largest = f64::from(largest);
        if largest > self.largest || largest.is_nan() {
            self.sum = self.sum * libm::exp(self.largest - largest) + sum;
            self.largest = largest;
        } else {
            self.sum += sum * libm::exp(largest - self.largest);
        }
    }

    fn nll(&self) -> f64 {
        self.largest + libm::log(self.sum) - self.target
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folding_tiles_is_the_log_sum_exp_of_all() {
        let mut fold = Fold::default();
        // Logits ln 1, ln 3 | ln 4, ln 8: the sum of exponentials is 16.
        let ln = |x: f64| libm::log(x) as f32;
        fold.add(ln(3.0), 1.0 / 3.0 + 1.0);
        fold.add(ln(8.0), 1.5);
        fold.target = f64::from(ln(4.0));
        assert!((fold.nll() - libm::log(4.0)).abs() < 1e-6, "{}", fold.nll());
    }

    #[test]
    fn a_nan_reaches_the_score() {
        let mut fold = Fold { target: 0.0, ..Fold::default() };
        fold.add(1.0, 1.0);
        fold.add(f32::NAN, f64::NAN);
        fold.add(2.0, 1.0);
        assert!(fold.nll().is_nan());
    }
}
