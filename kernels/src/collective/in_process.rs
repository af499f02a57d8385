//! Ranks that are threads of one process and read one another's buffers.

use std::fmt;
use std::sync::Arc;

use super::meeting::{Meeting, Parcels};
use super::{Collective, Peers};
use crate::backend::{Backend, KernelError};

/// One of several ranks in one process whose backends read one another's buffers: on the CPU, or on one device.
pub struct InProcess<B: Backend> {
    rank: usize,
    meetings: Arc<Meetings<B>>,
}

struct Meetings<B: Backend> {
    ranks: usize,
    bytes: Meeting<Parcels>,
    buffers: Meeting<Arc<B::Buffer>>,
}

impl<B: Backend> fmt::Debug for InProcess<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InProcess").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl<B: Backend> InProcess<B> {
    /// All of `ranks` ranks, in order.
    pub fn team(ranks: usize) -> Vec<InProcess<B>> {
        let (bytes, buffers) = (Meeting::of(ranks), Meeting::of(ranks));
        let meetings = Arc::new(Meetings { ranks, bytes, buffers });
        (0..ranks).map(|rank| InProcess { rank, meetings: Arc::clone(&meetings) }).collect()
    }
}

impl<B: Backend> Peers for InProcess<B> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.meetings.ranks
    }

    fn exchange(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, KernelError> {
        self.meetings.bytes.exchange(self.rank, parts)
    }

    fn abort(&self, reason: &str) {
        self.meetings.bytes.give_up(reason);
        self.meetings.buffers.give_up(reason);
    }
}

impl<B: Backend> Collective<B> for InProcess<B> {
    fn all_gather(&self, backend: &B, part: B::Buffer, _widths: &[usize]) -> Result<B::Buffer, KernelError> {
        let parts = self.meetings.buffers.meet(self.rank, Arc::new(part))?;
        backend.concatenate(&parts.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }
}
