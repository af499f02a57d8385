//! How ranks that share one model reach one another: small messages of host bytes, and activations put side by side.
//!
//! Every rank runs the same program and makes the same calls in the same order. A call returns when all ranks have made
//! it, or fails on all of them where one is lost. Knows neither models nor how ranks are started.

mod cut;
mod handover;
mod in_process;
mod meeting;
mod peer_copies;
mod rank;
pub mod team;

pub use cut::Cut;
pub use handover::Handover;
pub use in_process::InProcess;
pub use peer_copies::PeerCopies;
pub use rank::{Rank, RankBuffer, RankMatrix};

pub use crate::peers::{Alone, Peers};

use crate::backend::{Backend, KernelError};

/// Ranks that put activations side by side.
pub trait Collective<B: Backend>: Peers {
    /// Columns of all ranks side by side, [rows, sum of widths]; `part` is this rank's, [rows, widths\[rank\]]. A width
    /// may be 0.
    ///
    /// # Errors
    /// As [`Peers::exchange`]; where a device has no room, or fails.
    fn all_gather(&self, backend: &B, part: B::Buffer, widths: &[usize]) -> Result<B::Buffer, KernelError>;
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
