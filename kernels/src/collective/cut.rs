//! Which rows of a matrix each rank holds. Numbers in, numbers out.

use std::ops::Range;

use crate::backend::Pieces;

/// Rows of one matrix, or columns of what it makes, by rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    ranges: Vec<Range<usize>>,
    total: usize,
}

impl Cut {
    /// `rows` rows in pieces: contiguous, as even as pieces allow. A rank may hold nothing.
    pub fn of(pieces: Pieces, rows: usize, ranks: usize) -> Cut {
        let range = |rank: usize| match pieces {
            Pieces::Atoms | Pieces::VocabularyTiles | Pieces::Heads { .. } => {
                share(rows, pieces.rows(), rank, ranks)
            }
            Pieces::KvHeads { head_dim, group } => {
                // The heads that this rank's share of the query heads attends to.
                let queries = share(rows / head_dim * group, 1, rank, ranks);
                if queries.is_empty() {
                    return 0..0;
                }
                queries.start / group * head_dim..queries.end.div_ceil(group) * head_dim
            }
        };
        Cut { ranges: (0..ranks).map(range).collect(), total: rows }
    }

    /// What rank `rank` holds.
    pub fn range(&self, rank: usize) -> Range<usize> {
        self.ranges[rank].clone()
    }

    /// All rows.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Rows of each rank.
    pub fn widths(&self) -> Vec<usize> {
        self.ranges.iter().map(ExactSizeIterator::len).collect()
    }

    /// Whether what the ranks hold makes the whole side by side.
    pub(super) fn is_partition(&self) -> bool {
        let mut end = 0;
        let follows = |range: &Range<usize>| std::mem::replace(&mut end, range.end) == range.start;
        self.ranges.iter().all(follows) && end == self.total
    }

    /// Whether every rank holds whole runs of `length`.
    pub(super) fn keeps_runs(&self, length: usize) -> bool {
        self.ranges.iter().all(|range| range.start % length == 0 && range.end % length == 0)
    }
}

/// Rank `rank`'s part of `count` things in pieces of `piece`: contiguous, as even as pieces allow.
pub(crate) fn share(count: usize, piece: usize, rank: usize, ranks: usize) -> Range<usize> {
    let pieces = count.div_ceil(piece);
    let cut = |rank: usize| (rank * pieces / ranks * piece).min(count);
    cut(rank)..cut(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_between_pieces_and_each_belongs_to_one_rank() {
        assert_eq!(Cut::of(Pieces::Atoms, 100, 3).ranges, [0..32, 32..64, 64..100]);
        assert_eq!(Cut::of(Pieces::VocabularyTiles, 300, 2).ranges, [0..128, 128..300]);
        for ranks in 1..9 {
            for pieces in [Pieces::Atoms, Pieces::VocabularyTiles, Pieces::Heads { head_dim: 64 }] {
                assert!(Cut::of(pieces, 448, ranks).is_partition(), "{pieces:?} {ranks}");
            }
        }
        assert_eq!(Cut::of(Pieces::Atoms, 16, 4).widths(), [0, 0, 0, 16]);
    }

    /// 8 query heads over 2 key-value heads of 64.
    #[test]
    fn key_value_heads_are_held_by_every_rank_that_needs_them() {
        let of = |ranks| Cut::of(Pieces::KvHeads { head_dim: 64, group: 4 }, 128, ranks);
        assert_eq!(of(2).ranges, [0..64, 64..128]);
        assert_eq!(of(4).ranges, [0..64, 0..64, 64..128, 64..128]);
        // 2, 3 and 3 query heads: the second rank's are 2..5.
        assert_eq!(of(3).ranges, [0..64, 0..128, 64..128]);
        assert!(of(2).is_partition() && !of(4).is_partition() && !of(3).is_partition());
        assert!(of(3).keeps_runs(64));
        // More ranks than query heads.
        assert_eq!(of(9).range(0), 0..0);
    }
}
