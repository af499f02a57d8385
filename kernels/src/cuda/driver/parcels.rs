//! Small results on their way to the host: copied to pinned memory behind the work that makes them, so that nobody waits
//! before the bytes are asked for.
#![expect(unsafe_code, reason = "calls the driver, and reads memory that it gives")]

use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;

use super::context::{Context, Event};
use super::memory::{CudaMemory, Heap};
use crate::KernelError;

/// Fewest bytes of a box.
const LEAST: usize = 4 << 10;

/// Pinned memory that is used again and again.
#[derive(Debug)]
pub(super) struct Parcels {
    context: Arc<Context>,
    empty: Mutex<Vec<PinnedBox>>,
}

/// Bytes on their way to the host.
#[derive(Debug)]
pub struct CudaParcel {
    parcels: Arc<Parcels>,
    /// Gone once it is opened.
    content: Option<PinnedBox>,
    bytes: usize,
}

/// Pinned memory.
#[derive(Debug)]
struct PinnedBox {
    context: Arc<Context>,
    start: NonNull<u8>,
    bytes: usize,
    /// The last copy to it.
    arrived: Event,
}

// SAFETY: pinned memory belongs to no thread.
unsafe impl Send for PinnedBox {}
// SAFETY: it is only read once it is owned, and the copy to it is over.
unsafe impl Sync for PinnedBox {}

impl Parcels {
    pub(super) fn new(context: &Arc<Context>) -> Parcels {
        Parcels { context: Arc::clone(context), empty: Mutex::default() }
    }

    /// The first `bytes` of memory, after all that is queued on `compute`.
    pub(super) fn send(
        parcels: &Arc<Parcels>,
        heap: &Heap,
        memory: &CudaMemory,
        bytes: usize,
    ) -> Result<CudaParcel, KernelError> {
        if bytes > memory.bytes {
            let what = format!("a parcel of {bytes} bytes from memory of {}", memory.bytes);
            return Err(parcels.context.error(what));
        }
        heap.before_compute()?;
        let content = parcels.take(bytes)?;
        let to = content.start.as_ptr().cast();
        // SAFETY: as many bytes on both sides. The box is neither read nor given to anybody else before the copy is over,
        // and the memory is freed behind it.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to, memory.address, bytes, heap.compute.raw) };
        let sent =
            parcels.context.check(copied, "sending").and_then(|()| content.arrived.record(&heap.compute));
        if let Err(error) = sent {
            // The copy may be under way: the box stays where it is.
            std::mem::forget(content);
            return Err(error);
        }
        Ok(CudaParcel { parcels: Arc::clone(parcels), content: Some(content), bytes })
    }

    /// A box of at least `bytes`.
    fn take(&self, bytes: usize) -> Result<PinnedBox, KernelError> {
        {
            let mut empty = self.empty.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(index) = empty.iter().position(|held| held.bytes >= bytes) {
                return Ok(empty.swap_remove(index));
            }
        }
        PinnedBox::new(&self.context, bytes.max(LEAST).next_power_of_two())
    }
}

impl PinnedBox {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<PinnedBox, KernelError> {
        context.bind()?;
        let arrived = Event::new(context)?;
        let mut start = ptr::null_mut();
        // SAFETY: writes one pointer, which is freed when this is dropped.
        context.check(unsafe { sys::cuMemHostAlloc(&raw mut start, bytes, 0) }, "cuMemHostAlloc")?;
        let start =
            NonNull::new(start.cast()).ok_or_else(|| context.error("cuMemHostAlloc: null".to_owned()))?;
        Ok(PinnedBox { context: Arc::clone(context), start, bytes, arrived })
    }

    /// Waits for the copy.
    fn wait(&self) -> Result<(), KernelError> {
        self.context.bind()?;
        self.arrived.wait()
    }
}

impl CudaParcel {
    /// The bytes, once they are there.
    pub(super) fn open(mut self) -> Result<Vec<u8>, KernelError> {
        let content = self.content.as_ref().expect("opened once");
        content.wait()?;
        // SAFETY: the box's own memory, which nobody writes to: the copy is over.
        let bytes = unsafe { std::slice::from_raw_parts(content.start.as_ptr(), self.bytes) }.to_vec();
        self.put_back();
        Ok(bytes)
    }

    /// The box serves again. Only after the copy to it is over.
    fn put_back(&mut self) {
        let mut empty = self.parcels.empty.lock().unwrap_or_else(PoisonError::into_inner);
        empty.extend(self.content.take());
    }
}

impl Drop for CudaParcel {
    fn drop(&mut self) {
        // Nobody asked for it: the copy must be over all the same. A device that failed writes nothing any more.
        if self.content.as_ref().is_some_and(|content| content.wait().is_ok()) {
            self.put_back();
        }
    }
}

impl Drop for PinnedBox {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated once and freed once. Nothing can be done about a failure.
            let _ = unsafe { sys::cuMemFreeHost(self.start.as_ptr().cast()) };
        }
    }
}
