//! What a collective is held against: a copy of as many bytes that every rank makes for itself, all at the same time.

use std::hint::black_box;

use rayon::prelude::*;

use crate::backend::{Backend, KernelError};
use crate::collective::Rank;

/// Bytes that one task copies.
const CHUNK: usize = 1 << 20;

/// Where the copy is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// In host memory, between two buffers that have been used before, by the workers of the rank.
    Host,
    /// On the device, by its kernel that gathers rows.
    Device,
}

/// A copy that can be made again and again.
pub(super) enum Copy<'a, B: Backend> {
    Host { from: Vec<u8>, to: Vec<u8> },
    Device { rank: &'a Rank<B>, from: <Rank<B> as Backend>::Buffer, rows: Vec<u32> },
}

impl<'a, B: Backend> Copy<'a, B> {
    /// A copy of `bytes` bytes, on a device in `rows` rows at most.
    pub(super) fn of(
        floor: Floor,
        rank: &'a Rank<B>,
        bytes: usize,
        rows: usize,
    ) -> Result<Self, KernelError> {
        Ok(match floor {
            Floor::Host => Copy::Host { from: vec![0x3f; bytes], to: vec![1; bytes] },
            Floor::Device => {
                let elements = bytes.div_ceil(size_of::<f32>()).max(1);
                let rows = rows.clamp(1, elements);
                let width = elements.div_ceil(rows);
                let from = rank.upload(width, &super::noise(rows * width))?;
                Copy::Device { rank, from, rows: (0..rows as u32).collect() }
            }
        })
    }

    pub(super) fn make(&mut self) -> Result<(), KernelError> {
        match self {
            Copy::Host { from, to } => {
                let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
                chunks.for_each(|(to, from)| to.copy_from_slice(black_box(from)));
                black_box(to);
                Ok(())
            }
            Copy::Device { rank, from, rows } => rank.gather(from, rows).map(drop),
        }
    }
}
