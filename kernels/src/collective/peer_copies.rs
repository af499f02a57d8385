//! Ranks that are threads of one process, on CUDA devices that copy from one another.
//!
//! Hosts meet twice for a gather, and wait for no device: that a part is there when it is read, and is read before it is
//! freed, is a matter of marks which the devices' queues wait for. Knows no models.

use std::fmt;
use std::sync::Arc;

use super::meeting::{Meeting, Parcels};
use super::{Collective, Peers};
use crate::backend::{Backend, KernelError};
use crate::cuda::{Cuda, CudaBuffer, Device};

/// One of several ranks in one process, each on a device of its own, or several on one.
pub struct PeerCopies<D: Device> {
    rank: usize,
    meetings: Arc<Meetings<D>>,
}

struct Meetings<D: Device> {
    ranks: usize,
    bytes: Meeting<Parcels>,
    parts: Meeting<Arc<Part<D>>>,
    /// After each rank's reads.
    read: Meeting<Arc<D::Mark>>,
}

/// What one rank brings to a gather.
struct Part<D: Device> {
    columns: CudaBuffer<D::Memory>,
    /// After the work that makes the columns.
    ready: D::Mark,
    // Behind its memory, which it must outlive.
    device: Arc<D>,
}

impl<D: Device> fmt::Debug for PeerCopies<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerCopies").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl<D: Device> PeerCopies<D> {
    /// All of `ranks` ranks, in order.
    pub fn team(ranks: usize) -> Vec<PeerCopies<D>> {
        let (bytes, parts, read) = (Meeting::of(ranks), Meeting::of(ranks), Meeting::of(ranks));
        let meetings = Arc::new(Meetings { ranks, bytes, parts, read });
        (0..ranks).map(|rank| PeerCopies { rank, meetings: Arc::clone(&meetings) }).collect()
    }

    /// Brings this rank's part; returns all.
    fn publish(
        &self,
        backend: &Cuda<D>,
        columns: CudaBuffer<D::Memory>,
    ) -> Result<Vec<Arc<Part<D>>>, KernelError> {
        let device = Arc::clone(backend.shared_device());
        let ready = device.mark()?;
        self.meetings.parts.meet(self.rank, Arc::new(Part { columns, ready, device }))
    }

    /// Queues the reads of all parts, and lets the freeing of this rank's part wait for everybody's.
    fn read(&self, backend: &Cuda<D>, parts: &[Arc<Part<D>>]) -> Result<CudaBuffer<D::Memory>, KernelError> {
        let device = backend.device();
        let copies: Vec<Option<CudaBuffer<D::Memory>>> =
            parts.iter().map(|part| self.bring(device, part)).collect::<Result<_, _>>()?;
        let here = parts.iter().zip(&copies);
        let here: Vec<&CudaBuffer<D::Memory>> =
            here.map(|(part, copy)| copy.as_ref().unwrap_or(&part.columns)).collect();
        let whole = backend.concatenate(&here)?;
        let read = Arc::new(device.mark()?);
        for (rank, mark) in self.meetings.read.meet(self.rank, read)?.iter().enumerate() {
            if rank != self.rank {
                device.wait_for(mark)?;
            }
        }
        Ok(whole)
    }

    /// Waits for another rank's part; a copy of it, where it lies on another device.
    fn bring(&self, device: &D, part: &Part<D>) -> Result<Option<CudaBuffer<D::Memory>>, KernelError> {
        let CudaBuffer { rows, width, memory } = &part.columns;
        if *width == 0 || *rows == 0 {
            return Ok(None);
        }
        device.wait_for(&part.ready)?;
        if device.is_same_device(&part.device) {
            return Ok(None);
        }
        let memory = device.fetch(&part.device, memory)?;
        Ok(Some(CudaBuffer { rows: *rows, width: *width, memory }))
    }
}

impl<D: Device> Peers for PeerCopies<D> {
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
        self.meetings.parts.give_up(reason);
        self.meetings.read.give_up(reason);
    }
}

impl<D: Device> Collective<Cuda<D>> for PeerCopies<D> {
    fn all_gather(
        &self,
        backend: &Cuda<D>,
        part: CudaBuffer<D::Memory>,
        _widths: &[usize],
    ) -> Result<CudaBuffer<D::Memory>, KernelError> {
        let gathered = self.publish(backend, part).and_then(|parts| {
            let whole = self.read(backend, &parts);
            if whole.is_err() {
                // Nobody waits for this rank's mark any more, so parts must stay until its reads are over. A device that
                // has failed reads nothing.
                let _ = backend.device().finish();
            }
            whole
        });
        if let Err(error) = &gathered {
            self.abort(&format!("rank {}: {error}", self.rank));
        }
        gathered
    }
}
