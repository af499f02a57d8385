//! Large products through the device's library: the matrix is decoded to bf16 beside the product before it, then
//! multiplied in chunks of one size.
//!
//! A library chooses its order of sums by the shape it is given. It is always given the same: whole chunks, padded
//! with zeros, of a k that belongs to the matrix. Bits of an output then depend on its row of the matrix and of the
//! input alone, not on how many rows the batch has or which rows of the matrix a rank holds.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;

use crate::KernelError;
use crate::cuda::device::{Address, Arguments, DenseProduct, Device, Queue, Store};
use crate::cuda::linear::{Input, Output};
use crate::cuda::matrix::CudaMatrix;
use crate::cuda::{Cuda, decode};
use bytemuck::NoUninit;

/// Shape that every product has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunks {
    /// Tokens.
    pub(super) tokens: usize,
    /// Rows of the matrix.
    pub(super) rows: usize,
}

/// Large enough that a library comes near its best, small enough that padding costs little: changing either may change
/// bits.
pub(super) const CHUNKS: Chunks = Chunks { tokens: 2048, rows: 2048 };

/// Smallest whole matrix that is worth decoding: below, half a chunk is padding. Of the whole matrix and never of a
/// shard or a batch, so that every rank and every group of windows takes the same path.
const LARGE_N: usize = 2048;
const LARGE_K: usize = 1024;

/// Bytes that the scratches and the padded chunks grow to for matrices of these (n, k).
pub(crate) fn scratch_bytes(matrices: impl Iterator<Item = (usize, usize)>) -> u64 {
    let bytes = |(n, k): (usize, usize)| {
        if n < LARGE_N || k < LARGE_K {
            return 0;
        }
        let decoded = 2 * n.next_multiple_of(CHUNKS.rows) * k * 2;
        let chunks = CHUNKS.tokens * k * 2 + CHUNKS.tokens * CHUNKS.rows * 4;
        (decoded + chunks) as u64
    };
    matrices.map(bytes).max().unwrap_or(0)
}

/// `CopyColumnsArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct CopyColumnsArgs {
    from: Address,
    to: Address,
    columns: u32,
    from_stride: u32,
    to_stride: u32,
    store: Store,
}

// SAFETY: as the structure of that name in linear_bf16.cu.
unsafe impl Arguments for CopyColumnsArgs {}

/// `PadRowsArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct PadRowsArgs {
    from: Address,
    to: Address,
    rows: u32,
    row_bytes: u32,
}

// SAFETY: as the structure of that name in linear_bf16.cu.
unsafe impl Arguments for PadRowsArgs {}

/// Two places that matrices are decoded to in turn: one is written while the other is read. Grown on demand.
#[derive(Debug)]
pub(crate) struct Scratches<M> {
    places: [Option<(M, usize)>; 2],
    next: usize,
}

impl<M> Scratches<M> {
    pub(crate) fn new() -> Scratches<M> {
        Scratches { places: [None, None], next: 0 }
    }

    /// The place whose turn it is, of at least `bytes`.
    fn take<D: Device<Memory = M>>(&mut self, device: &D, bytes: usize) -> Result<Address, KernelError> {
        let place = &mut self.places[self.next];
        if place.as_ref().is_none_or(|(_, held)| *held < bytes) {
            // Freed first: there may not be room for both.
            *place = None;
            *place = Some((device.allocate(bytes)?, bytes));
            // Memory belongs to the results' queue until told otherwise.
            device.follow(Queue::Decode, Queue::Compute)?;
        }
        self.next = 1 - self.next;
        let (memory, _) = place.as_ref().expect("there is a place now");
        Ok(D::address(memory))
    }
}

/// Whether a matrix is worth decoding whole.
pub(super) fn is_large<M>(weight: &CudaMatrix<M>) -> bool {
    weight.n >= LARGE_N && weight.k >= LARGE_K
}

/// Rows `rows` of `weight` for `tokens` of a bf16 operand.
pub(super) fn product<D: Device>(
    cuda: &Cuda<D>,
    x: &Input<'_, D::Memory>,
    tokens: Range<usize>,
    weight: &CudaMatrix<D::Memory>,
    rows: Range<usize>,
    (y, store): (Output, Store),
    chunks: Chunks,
) -> Result<(), KernelError> {
    let device = cuda.device();
    let k = weight.stride();
    let padded = rows.len().next_multiple_of(chunks.rows);
    let mut scratches = cuda.scratches.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let decoded = scratches.take(device, padded * k * 2)?;
    decode::operand_rows(device, Queue::Decode, weight, rows.clone(), padded, decoded)?;
    device.follow(Queue::Compute, Queue::Decode)?;
    // What is decoded from now on, into the other place, waits for the product before this one, which read it.
    device.follow(Queue::Decode, Queue::Compute)?;
    for token in tokens.clone().step_by(chunks.tokens) {
        let count = chunks.tokens.min(tokens.end - token);
        let run = TokenRun { device, x: x.values::<D>(token), count, k, chunks, store };
        run.product(decoded, rows.len(), y.from(token - tokens.start, 0))?;
    }
    Ok(())
}

/// At most one chunk of tokens.
struct TokenRun<'a, D> {
    device: &'a D,
    x: Address,
    count: usize,
    k: usize,
    chunks: Chunks,
    store: Store,
}

impl<D: Device> TokenRun<'_, D> {
    fn product(&self, decoded: Address, n: usize, y: Output) -> Result<(), KernelError> {
        let Chunks { tokens, rows } = self.chunks;
        let padded = if self.count < tokens { Some(self.pad()?) } else { None };
        let x = padded.as_ref().map_or(self.x, D::address);
        for row in (0..n).step_by(rows) {
            let width = rows.min(n - row);
            let whole = width == rows && padded.is_none();
            let direct = whole && (self.store == Store::Over || self.adds(y));
            let aside = if direct { None } else { Some(self.device.allocate(tokens * rows * 4)?) };
            let to = y.from(0, row);
            let aside_output =
                aside.as_ref().map(|memory| Output { address: D::address(memory), stride: rows });
            let written = aside_output.unwrap_or(to);
            self.device.dense_product(&DenseProduct {
                weight: decoded.offset(row * self.k * 2),
                x,
                y: written.address,
                m: tokens,
                n: rows,
                k: self.k,
                y_stride: written.stride,
                store: if direct { self.store } else { Store::Over },
            })?;
            if let Some(from) = aside_output {
                self.copy(from, to, width)?;
            }
        }
        Ok(())
    }

    /// Whether the library adds to rows like these.
    fn adds(&self, y: Output) -> bool {
        self.device.adds_dense_products() && y.stride.is_multiple_of(4) && y.address.0.is_multiple_of(16)
    }

    /// The tokens and rows of zeros behind them.
    fn pad(&self) -> Result<D::Memory, KernelError> {
        let row_bytes = self.k * 2;
        let padded = self.device.allocate(self.chunks.tokens * row_bytes)?;
        let args = PadRowsArgs {
            from: self.x,
            to: D::address(&padded),
            rows: self.count as u32,
            row_bytes: row_bytes as u32,
        };
        self.device.launch(Queue::Compute, "pad_rows", [self.chunks.tokens, 1, 1], &args)?;
        Ok(padded)
    }

    /// What is not padding.
    fn copy(&self, from: Output, to: Output, columns: usize) -> Result<(), KernelError> {
        let args = CopyColumnsArgs {
            from: from.address,
            to: to.address,
            columns: columns as u32,
            from_stride: from.stride as u32,
            to_stride: to.stride as u32,
            store: self.store,
        };
        self.device.launch(Queue::Compute, "copy_columns", [self.count, 1, 1], &args)
    }
}
