//! The trait that a device implements, and the plain data its operations take.
//!
//! Operations are coarse and transformer-shaped, so that a device may fuse inside them. Every output is one chain of
//! sums whose order does not depend on how work was cut; that makes shards, groups and threads invisible in the bits.
//! Says what an operation is, not how it is computed: formulas and rounding points are in NUMERICS.md.

use std::ops::Range;

use ctq_container::TiledMatrix;
use ctq_model::scheme::Activation;

pub use crate::error::KernelError;
use crate::peers::{Alone, Peers};
use crate::route::{ExpertTokens, Renormalize};
use crate::{Compute, Rotation, composed};

/// Rows of the vocabulary that one partial log-sum-exp covers.
pub const VOCABULARY_TILE: usize = 128;

/// Who computed: part of a result's method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendIdentity {
    /// Kind of device: `cpu`.
    pub name: String,
    /// Instruction set.
    pub isa: String,
}

/// Parameters of one activation quantization.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantizer {
    /// How.
    pub activation: Activation,
    /// Stored scales: one, or one a head; empty where they come from the data.
    pub scales: Vec<f32>,
    /// Stored zero point of an asymmetric static scheme.
    pub zero: f32,
    /// Stored global scale of NVFP4.
    pub global_scale: f32,
}

/// Pieces that a matrix may be cut into when several devices share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pieces {
    /// 16 output rows: one atom of a tile.
    Atoms,
    /// [`VOCABULARY_TILE`] rows, so that a partial log-sum-exp is never split: embeddings and heads.
    VocabularyTiles,
    /// Query heads, so that each attends by itself. `head_dim` is a multiple of 16.
    Heads {
        /// Rows of a head.
        head_dim: usize,
    },
    /// Key-value heads, held by every rank whose query heads attend to them: what several ranks hold is not gathered.
    KvHeads {
        /// Rows of a head, a multiple of 16.
        head_dim: usize,
        /// Query heads that attend to one of them.
        group: usize,
    },
}

impl Pieces {
    /// Rows of one piece.
    pub const fn rows(self) -> usize {
        match self {
            Pieces::Atoms => 16,
            Pieces::VocabularyTiles => VOCABULARY_TILE,
            Pieces::Heads { head_dim } | Pieces::KvHeads { head_dim, .. } => head_dim,
        }
    }
}

/// What happens to the inputs of a linear.
#[derive(Clone, Debug, PartialEq)]
pub enum Treatment {
    /// Nothing but the rounding of the compute mode.
    Plain,
    /// Quantized and dequantized in f32 as compressed-tensors does, then an operand like any other.
    FakeQuantized(Quantizer),
    /// Quantized as serving kernels do: codes are multiplied exactly, scales applied to the sums.
    Exact(Quantizer),
}

/// Shape of one causal attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimension of a head.
    pub head_dim: usize,
    /// Positions seen, itself included; `None`: all before.
    pub window: Option<usize>,
}

/// Rows of one window that a buffer holds: consecutive positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Rows of the buffer.
    pub rows: Range<usize>,
    /// Position in the window of the first of them.
    pub first: usize,
}

impl Span {
    /// All rows of each of `windows`.
    pub fn whole(windows: &[Range<usize>]) -> Vec<Span> {
        windows.iter().map(|window| Span { rows: window.clone(), first: 0 }).collect()
    }

    /// Positions in the window that are held.
    pub fn positions(&self) -> Range<usize> {
        self.first..self.first + self.rows.len()
    }
}

/// The two linears of a gated feed-forward part that see the same inputs. Both matrices are [n, k].
#[derive(Debug)]
pub struct GatePair<'a, M> {
    /// What passes through the sigmoid.
    pub gate: &'a M,
    /// What it is multiplied with.
    pub up: &'a M,
    /// Of gate and up, each of the whole matrix that the one here is a range of.
    pub biases: [Option<&'a [f32]>; 2],
}

impl<M> Clone for GatePair<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for GatePair<'_, M> {}

/// Partial log-sum-exps of a run of vocabulary tiles.
#[derive(Clone, Debug, Default)]
pub struct HeadTiles {
    /// Vocabulary tiles per row of inputs.
    pub tiles: usize,
    /// [rows, tiles]: largest logit, and the f64 sum of `exp(logit - largest)` in vocabulary order.
    pub partials: Vec<(f32, f64)>,
    /// One a row of inputs: the target's logit where the target lies in these tiles.
    pub targets: Vec<Option<f32>>,
}

/// A device that multiplies packed weights with activations.
///
/// Buffers are [rows, width] f32; a row is a token. `windows` are the ranges of rows that belong together.
///
/// A device may work behind its caller: what an operation returns may still be under way, and an operation that waits
/// may tell of a failure of one before it.
///
/// # Errors
/// Every operation that allocates, copies or computes fails with [`KernelError::OutOfMemory`] where the device has no
/// room, and with [`KernelError::Device`] where it fails. Then buffers given as `&mut` hold anything.
pub trait Backend: Send + Sync {
    /// A packed matrix, or a range of its rows.
    type Matrix: Send + Sync;
    /// Activations.
    type Buffer: Send + Sync;
    /// Inputs of linears after their [`Treatment`].
    type Operand: Send + Sync;
    /// A question about activations whose answer a device may still be working out: see [`Backend::watch`].
    type Watch: Send + Sync;

    /// Who computes.
    fn identity(&self) -> BackendIdentity;

    /// Takes rows `rows` of a packed matrix, which may be cut further into `pieces`. Weights stay packed.
    fn matrix(
        &self,
        matrix: &TiledMatrix,
        rows: Range<usize>,
        pieces: Pieces,
    ) -> Result<Self::Matrix, KernelError>;

    /// Output rows of a matrix.
    fn rows(&self, matrix: &Self::Matrix) -> usize;

    /// The ranks that this one shares its model with, and those that call its operations in the same order.
    fn peers(&self) -> &dyn Peers {
        &Alone
    }

    /// Rows of a matrix that are here and not with another rank, counted from its first.
    fn held(&self, matrix: &Self::Matrix) -> Range<usize> {
        0..self.rows(matrix)
    }

    /// Elements of activations that are here.
    fn elements(&self, buffer: &Self::Buffer) -> usize;

    /// Copies host activations, [rows, width] row-major, to the device.
    fn upload(&self, width: usize, values: &[f32]) -> Result<Self::Buffer, KernelError>;

    /// Activations that are all zero, [rows, width].
    ///
    /// # Errors
    /// Where the device has no room, or fails.
    fn zeros(&self, rows: usize, width: usize) -> Result<Self::Buffer, KernelError>;

    /// Copies activations to the host.
    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<f32>, KernelError>;

    /// Rows `ids` of a matrix as f32, counted from its own first row: [ids, k]. What an embedding looks up, and the
    /// decompressed bits of any weight.
    fn embed(&self, table: &Self::Matrix, ids: &[u32]) -> Result<Self::Buffer, KernelError>;

    /// `x / rms(x) * weight` over each run of `weight.len()` elements of a row: [rows, width].
    fn norm(&self, x: &Self::Buffer, weight: &[f32], epsilon: f32) -> Result<Self::Buffer, KernelError>;

    /// Prepares inputs of linears, [rows, k]; reductions beyond a row stay inside each of `windows`.
    fn prepare(
        &self,
        x: &Self::Buffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError>;

    /// [`Backend::norm`] over whole rows, then [`Backend::prepare`]: with their bits, but a device may leave out what is
    /// between. And [`Backend::watch`] of `x`, which is looked at anyway.
    fn norm_operand(
        &self,
        x: &Self::Buffer,
        weight: &[f32],
        epsilon: f32,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<(Self::Operand, Self::Watch), KernelError> {
        composed::norm_operand(self, x, weight, epsilon, treatment, compute, windows)
    }

    /// [`Backend::gate`], then [`Backend::prepare`], in the same manner.
    fn gate_operand(
        &self,
        gate: Self::Buffer,
        up: &Self::Buffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError> {
        composed::gate_operand(self, gate, up, treatment, compute, windows)
    }

    /// `x * W^T + bias`: [rows, n]. `bias` is of the whole matrix that `weight` is a range of.
    ///
    /// # Errors
    /// Also where no exact product is defined for the operand's codes and these weights.
    fn linear(
        &self,
        x: &Self::Operand,
        weight: &Self::Matrix,
        bias: Option<&[f32]>,
        compute: Compute,
    ) -> Result<Self::Buffer, KernelError>;

    /// `sum += x * W^T + bias`, each sum rounded: [`Backend::linear`], then [`Backend::add`].
    ///
    /// # Errors
    /// As [`Backend::linear`].
    fn linear_add(
        &self,
        sum: &mut Self::Buffer,
        x: &Self::Operand,
        weight: &Self::Matrix,
        bias: Option<&[f32]>,
        compute: Compute,
    ) -> Result<(), KernelError> {
        composed::linear_add(self, sum, x, weight, bias, compute)
    }

    /// Both linears of `pair`, then [`Backend::gate_operand`]: the prepared inputs of the linear that follows a gate.
    ///
    /// # Errors
    /// As [`Backend::linear`].
    fn gated(
        &self,
        x: &Self::Operand,
        pair: GatePair<'_, Self::Matrix>,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError> {
        composed::gated(self, x, pair, treatment, compute, windows)
    }

    /// Several linears of different inputs, one an expert: `x[i] * W[i]^T + bias[i]` for each `i`, of as many rows as
    /// `x[i]`. All weights are [n, k]; their schemes may differ. A device may run them as one grouped product, with the
    /// bits of one [`Backend::linear`] each.
    ///
    /// # Errors
    /// As [`Backend::linear`].
    fn linear_experts(
        &self,
        x: &[&Self::Operand],
        weights: &[&Self::Matrix],
        biases: &[Option<&[f32]>],
        compute: Compute,
    ) -> Result<Vec<Self::Buffer>, KernelError> {
        let experts = x.iter().zip(weights).zip(biases);
        experts.map(|((x, weight), bias)| self.linear(x, weight, *bias, compute)).collect()
    }

    /// Quantizes and dequantizes in place; where scales are per head, each run of `head_dim` elements has its own.
    fn fake_quantize(
        &self,
        x: &mut Self::Buffer,
        quantizer: &Quantizer,
        head_dim: usize,
        windows: &[Range<usize>],
    ) -> Result<(), KernelError>;

    /// Rotates the heads of each row by its position inside its window; `spans` say which rows are which positions.
    fn rotate(&self, x: &mut Self::Buffer, rotation: &Rotation, spans: &[Span]) -> Result<(), KernelError>;

    /// Causal attention of the query heads `heads`, each window by itself: [query rows, heads.len() * head_dim]. `q`
    /// holds the columns of these heads alone, of the rows that `queries` says, one span a window; `k` and `v` are
    /// [rows, kv_heads * head_dim] with the rows of all positions, `windows`. Heads are counted in `shape`: head h sees
    /// key head h / (heads / kv_heads). A query has the same bits whichever others are asked for.
    #[expect(clippy::too_many_arguments, reason = "query, key and value are three things")]
    fn attend(
        &self,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        shape: &AttentionShape,
        heads: Range<usize>,
        compute: Compute,
        queries: &[Span],
        windows: &[Range<usize>],
    ) -> Result<Self::Buffer, KernelError>;

    /// `silu(gate) * up`, element by element: [rows, width]. Takes the gate for good, so that a device may write the
    /// product over it.
    fn gate(&self, gate: Self::Buffer, up: &Self::Buffer) -> Result<Self::Buffer, KernelError>;

    /// `x += y`, element by element.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<(), KernelError>;

    /// Asks for the first row that holds a NaN or an infinity, as `x` is now. Does not wait for the answer.
    fn watch(&self, x: &Self::Buffer) -> Result<Self::Watch, KernelError>;

    /// The answer to a question, once it is known.
    fn seen(&self, watch: Self::Watch) -> Result<Option<usize>, KernelError>;

    /// First row that holds a NaN or an infinity.
    fn first_non_finite(&self, x: &Self::Buffer) -> Result<Option<usize>, KernelError> {
        self.seen(self.watch(x)?)
    }

    /// The tokens of each expert, in the order of the experts: of each row of `logits`, [tokens, experts], the `top_k`
    /// largest, the lower index of equals. Weights are those of a softmax in f64.
    fn route(
        &self,
        logits: &Self::Buffer,
        top_k: usize,
        renormalize: Renormalize,
    ) -> Result<Vec<ExpertTokens>, KernelError>;

    /// Rows `rows` of `x`, in that order: [rows.len(), width].
    fn gather(&self, x: &Self::Buffer, rows: &[u32]) -> Result<Self::Buffer, KernelError>;

    /// `x[rows[i]] += weights[i] * y[i]`, product and sum rounded one after the other.
    fn scatter_add(
        &self,
        x: &mut Self::Buffer,
        y: &Self::Buffer,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<(), KernelError>;

    /// Columns of several buffers side by side, [rows, sum of widths]: what an all-gather leaves behind.
    fn concatenate(&self, parts: &[&Self::Buffer]) -> Result<Self::Buffer, KernelError>;

    /// Partial log-sum-exps of the logits over vocabulary rows `vocabulary` (starting at a multiple of
    /// [`VOCABULARY_TILE`] from the matrix's own first row), which are among those [held](Backend::held) here. `targets`
    /// count from the matrix's first row too.
    ///
    /// # Errors
    /// As [`Backend::linear`].
    fn head(
        &self,
        x: &Self::Operand,
        head: &Self::Matrix,
        vocabulary: Range<usize>,
        targets: &[Option<u32>],
        compute: Compute,
    ) -> Result<HeadTiles, KernelError>;
}
