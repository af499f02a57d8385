//! What the ranks of a model hand one another, and how many bytes that is: columns of activations, host bytes, hidden
//! states between stages. Numbers only; measures nothing.

use serde::Serialize;

use crate::backend::{Pieces, VOCABULARY_TILE};
use crate::collective::Cut;

/// Bytes of a partial log-sum-exp: the largest logit and the sum.
const PARTIAL: usize = 12;

/// Sizes of a model that decide what its ranks hand each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// What it is called.
    pub name: &'static str,
    /// Width of hidden states.
    pub hidden: usize,
    /// Width between gate and down projection.
    pub inner: usize,
    /// Query heads of 128.
    pub heads: usize,
    /// Rows of the head.
    pub vocabulary: usize,
}

/// Models whose sizes are measured: Llama 3 8B and 70B, and Mistral Large 2.
pub const MODELS: [Model; 3] = [
    Model { name: "Llama 8B", hidden: 4096, inner: 14_336, heads: 32, vocabulary: 128_256 },
    Model { name: "Llama 70B", hidden: 8192, inner: 28_672, heads: 64, vocabulary: 128_256 },
    Model { name: "Mistral 123B", hidden: 12_288, inner: 28_672, heads: 96, vocabulary: 32_768 },
];

const HEAD_DIM: usize = 128;

/// Columns that are gathered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// Outputs of attention, cut between heads.
    Heads,
    /// Hidden states.
    Hidden,
    /// Those between gate and down projection.
    Inner,
}

/// What ranks of a model hand one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// All-gather.
    Columns(Columns),
    /// Exchange of partial log-sum-exps, each rank's of its own tiles to those who fold the rows.
    LogSumExps,
    /// Embeddings of tokens, each from the rank that holds its row.
    Embeddings,
    /// Hidden states from rank 0 to rank 1, as from one stage to the next: off the device, over, and onto the device.
    HandOver,
}

impl Carried {
    /// All of it.
    pub const ALL: [Carried; 6] = [
        Carried::Columns(Columns::Heads),
        Carried::Columns(Columns::Hidden),
        Carried::Columns(Columns::Inner),
        Carried::LogSumExps,
        Carried::Embeddings,
        Carried::HandOver,
    ];

    /// The operation, and what goes through it.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Carried::Columns(Columns::Heads) => ("all-gather", "heads"),
            Carried::Columns(Columns::Hidden) => ("all-gather", "hidden"),
            Carried::Columns(Columns::Inner) => ("all-gather", "inner"),
            Carried::LogSumExps => ("exchange", "log-sum-exps"),
            Carried::Embeddings => ("embed", "embeddings"),
            Carried::HandOver => ("hand over", "hidden"),
        }
    }
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// Exchange of a byte: what it takes to meet at all.
    Byte,
    /// What a model needs for so many tokens.
    OfModel {
        /// What is carried.
        carried: Carried,
        /// Of which model.
        model: Model,
        /// For so many tokens.
        tokens: usize,
    },
}

impl Case {
    /// The operation, and what goes through it.
    pub(super) fn names(&self) -> (&'static str, &'static str) {
        match self {
            Case::Byte => ("exchange", "a byte"),
            Case::OfModel { carried, .. } => carried.names(),
        }
    }

    /// Whose sizes these are.
    pub(super) fn model(&self) -> Option<&'static str> {
        match self {
            Case::Byte => None,
            Case::OfModel { model, .. } => Some(model.name),
        }
    }

    /// Tokens at a time.
    pub(super) fn tokens(&self) -> usize {
        match self {
            Case::Byte => 0,
            Case::OfModel { tokens, .. } => *tokens,
        }
    }
}

/// Everything to measure, for each of these numbers of tokens.
pub fn cases(tokens: &[usize]) -> Vec<Case> {
    let mut cases = vec![Case::Byte];
    for model in MODELS {
        for carried in Carried::ALL {
            cases.extend(tokens.iter().map(|tokens| Case::OfModel { carried, model, tokens: *tokens }));
        }
    }
    cases
}

/// One measured collective.
#[derive(Clone, Debug, Serialize)]
pub struct CollectiveTiming {
    /// `exchange`, `all-gather`, `embed` or `hand over`.
    pub operation: String,
    /// What is carried.
    pub what: String,
    /// The model whose sizes these are, where it matters.
    pub model: Option<String>,
    /// Tokens at a time; 0 where they do not matter.
    pub tokens: usize,
    /// Ranks that take part; of a hand-over, those that are there.
    pub ranks: usize,
    /// Bytes that come to a rank from others: to the one that gets most.
    pub bytes: usize,
    /// Seconds until all ranks have what they get: the median of several rounds.
    pub seconds: f64,
    /// Seconds of the fastest round.
    pub fastest_seconds: f64,
    /// Seconds of the slowest round.
    pub slowest_seconds: f64,
    /// Median seconds of a plain copy of as many bytes by every rank at a time; `None` where there is nothing to copy.
    pub floor_seconds: Option<f64>,
}

/// Width of gathered activations, and how their columns are cut.
pub(super) fn width_of(columns: Columns, model: &Model) -> (usize, Pieces) {
    match columns {
        Columns::Heads => (model.heads * HEAD_DIM, Pieces::Heads { head_dim: HEAD_DIM }),
        Columns::Hidden => (model.hidden, Pieces::Atoms),
        Columns::Inner => (model.inner, Pieces::Atoms),
    }
}

/// Token ids all over a table of `rows` rows.
pub(super) fn ids(tokens: usize, rows: usize) -> Vec<u32> {
    (0..tokens).map(|token| (token * rows / tokens) as u32).collect()
}

/// Bytes of the partial log-sum-exps that rank `from` hands to rank `to`: of its tiles, for the rows that the other folds.
pub(super) fn partial_bytes(model: &Model, tokens: usize, ranks: usize, from: usize, to: usize) -> usize {
    let tiles = Cut::of(Pieces::VocabularyTiles, model.vocabulary, ranks).range(from).len();
    let rows = (to + 1) * tokens / ranks - to * tokens / ranks;
    PARTIAL * tiles.div_ceil(VOCABULARY_TILE) * rows
}

/// Bytes that come from others to the rank that gets most.
pub(super) fn bytes_received(case: &Case, ranks: usize) -> usize {
    let Case::OfModel { carried, model, tokens } = case else { return ranks - 1 };
    let row = model.hidden * size_of::<f32>();
    let received = |rank: usize| match carried {
        Carried::Columns(columns) => {
            let (width, pieces) = width_of(*columns, model);
            let own = Cut::of(pieces, width, ranks).range(rank).len();
            tokens * (width - own) * size_of::<f32>()
        }
        Carried::LogSumExps => {
            let others = (0..ranks).filter(|from| *from != rank);
            others.map(|from| partial_bytes(model, *tokens, ranks, from, rank)).sum()
        }
        Carried::Embeddings => {
            let rows = ranks * VOCABULARY_TILE;
            let held = Cut::of(Pieces::VocabularyTiles, rows, ranks).range(rank);
            ids(*tokens, rows).iter().filter(|id| !held.contains(&(**id as usize))).count() * row
        }
        Carried::HandOver => tokens * row,
    };
    (0..ranks).map(received).max().unwrap_or(0)
}
