//! What devices of one process do with one another: wait for marks, and copy. Knows no ranks.
#![expect(unsafe_code, reason = "calls the driver")]

use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUmemAccess_flags, CUmemAccessDesc, CUmemLocation, CUmemLocationType, CUresult,
};

use super::context::{Context, Event};
use super::device::CudaDevice;
use super::memory::{CudaMemory, Heap};
use crate::KernelError;

/// A place in a device's order of work.
#[derive(Debug)]
pub struct CudaMark {
    event: Event,
}

impl CudaDevice {
    /// Lets devices of one process read and write one another's memory wherever the hardware can, so that copies cross
    /// no memory of the host. To be called once, with all of them; ranks that join by NCCL in one process need it, other
    /// copies are slower without.
    ///
    /// # Errors
    /// Where a device fails.
    pub fn connect(devices: &[&CudaDevice]) -> Result<(), KernelError> {
        for reader in devices {
            for owner in devices {
                reader.heap().reach(owner.heap())?;
            }
        }
        Ok(())
    }
}

impl Heap {
    /// Marks what is queued on `compute` so far.
    pub(super) fn mark(&self) -> Result<CudaMark, KernelError> {
        // Uploads are work too.
        self.before_compute()?;
        let event = Event::new(&self.context)?;
        event.record(&self.compute)?;
        Ok(CudaMark { event })
    }

    /// `compute` waits for what any device has marked; memory is freed on it, and so waits too.
    pub(super) fn wait_for(&self, mark: &CudaMark) -> Result<(), KernelError> {
        self.context.bind()?;
        mark.event.hold(&self.compute)
    }

    /// A copy of another device's memory, in the order of `compute`.
    pub(super) fn fetch(self: &Arc<Heap>, memory: &CudaMemory) -> Result<CudaMemory, KernelError> {
        let copy = self.allocate(memory.bytes)?;
        self.before_compute()?;
        if memory.bytes == 0 {
            return Ok(copy);
        }
        let (to, from) = (self.context.raw(), memory.heap().context.raw());
        // SAFETY: as many bytes on both sides, each in its context; both are freed behind this copy: this one on the same
        // stream, the other by the promise of `Device::fetch`. Where the devices do not reach one another, the driver
        // takes the way through the host by itself.
        let copied = unsafe {
            sys::cuMemcpyPeerAsync(copy.address, to, memory.address, from, memory.bytes, self.compute.raw)
        };
        self.context.check(copied, "copying from another device").map(|()| copy)
    }

    /// Lets this device address memory of `owner`, if it can.
    fn reach(&self, owner: &Heap) -> Result<(), KernelError> {
        if self.context.device == owner.context.device || !self.context.can_reach(&owner.context)? {
            return Ok(());
        }
        self.context.bind()?;
        let Some(pool) = owner.pool() else {
            // SAFETY: both contexts are retained.
            let enabled = unsafe { sys::cuCtxEnablePeerAccess(owner.context.raw(), 0) };
            return match enabled {
                CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
                result => self.context.check(result, "cuCtxEnablePeerAccess"),
            };
        };
        // Memory of pools does not follow the access of contexts.
        let access = CUmemAccessDesc {
            location: CUmemLocation {
                type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                id: self.context.device,
            },
            flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: reads one description.
        let set = unsafe { sys::cuMemPoolSetAccess(pool, &raw const access, 1) };
        owner.context.check(set, "cuMemPoolSetAccess")
    }
}

impl Context {
    /// Whether this device can address memory of another.
    fn can_reach(&self, other: &Context) -> Result<bool, KernelError> {
        let mut can = 0;
        // SAFETY: writes one integer.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, self.device, other.device) };
        self.check(asked, "cuDeviceCanAccessPeer").map(|()| can != 0)
    }
}

#[cfg(test)]
#[path = "tests/peers.rs"]
mod tests;
