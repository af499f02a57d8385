//! The ranks that share a model, as one of them sees them: small messages of host bytes. Knows no activations.

use crate::error::KernelError;

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
