//! How ranks that share one model reach one another: small messages of host bytes, and activations put side by side.
//!
//! Every rank runs the same program and makes the same calls in the same order. A call returns when all ranks have made
//! it, or fails on all of them where one is lost. Knows neither models nor how ranks are started.

mod cut;
mod handover;
mod in_process;
mod peer_copies;
mod rank;
pub mod team;

pub use cut::Cut;
pub use handover::Handover;
pub use in_process::{InProcess, Meeting};
pub use peer_copies::PeerCopies;
pub use rank::{Rank, RankBuffer, RankMatrix};

use crate::backend::{Backend, KernelError};

/// The ranks that share a model, seen from one of them.
pub trait Peers: Send + Sync {
    /// Which of them this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn ranks(&self) -> usize;

    /// Hands `parts[j]` to rank j, for every j; returns what each rank has handed to this one, in the order of ranks.
    /// What a rank hands to itself comes back.
    ///
    /// # Errors
    /// [`KernelError::Lost`] where a rank is lost or has given up.
    fn exchange(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, KernelError>;

    /// Gives up: whatever other ranks wait for, now or later, fails with [`KernelError::Lost`] of this `reason`.
    fn abort(&self, reason: &str);
}

/// Ranks that put activations side by side.
pub trait Collective<B: Backend>: Peers {
    /// Columns of all ranks side by side, [rows, sum of widths]; `part` is this rank's, [rows, widths\[rank\]]. A width
    /// may be 0.
    ///
    /// # Errors
    /// As [`Peers::exchange`]; where a device has no room, or fails.
    fn all_gather(&self, backend: &B, part: B::Buffer, widths: &[usize]) -> Result<B::Buffer, KernelError>;
}

/// A rank that shares with nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Peers for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn exchange(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, KernelError> {
        Ok(parts)
    }

    fn abort(&self, _reason: &str) {}
}

impl<B: Backend> Collective<B> for Alone {
    fn all_gather(&self, _backend: &B, part: B::Buffer, _widths: &[usize]) -> Result<B::Buffer, KernelError> {
        Ok(part)
    }
}

/// Where hidden states go from one stage of layers to the next: host memory, one group of windows at a time.
pub trait Pipe: Send + Sync {
    /// Hands the hidden states of a group on; waits while the other side has not taken the one before.
    ///
    /// # Errors
    /// [`KernelError::Lost`] where the other side is gone.
    fn send(&self, hidden: Vec<f32>) -> Result<(), KernelError>;

    /// Takes the hidden states of the next group.
    ///
    /// # Errors
    /// As [`Pipe::send`].
    fn receive(&self) -> Result<Vec<f32>, KernelError>;

    /// Gives up: what the other side waits for, now or later, fails with [`KernelError::Lost`] of this `reason`.
    fn abort(&self, reason: &str);
}
