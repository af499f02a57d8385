//! Large uploads: through two pinned buffers by turns, so that one is filled while the other is sent.
#![expect(unsafe_code, reason = "calls the driver, and copies into memory that it gives")]

use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use cudarc::driver::sys;

use super::context::{Context, Event, Stream};
use super::memory::{CudaMemory, Heap};
use crate::KernelError;

/// Bytes of one pinned buffer.
const BUFFER: usize = 32 << 20;
/// Threads that fill a buffer: one does not keep up with the bus.
const THREADS: usize = 4;
/// Bytes worth a thread of their own.
const LEAST: usize = 1 << 20;

/// A stream for large uploads and what they go through.
#[derive(Debug)]
pub(super) struct Staging {
    context: Arc<Context>,
    copy: Stream,
    /// Made with the first upload, and used by one at a time.
    buffers: Mutex<Vec<Buffer>>,
}

/// Pinned memory.
#[derive(Debug)]
struct Buffer {
    context: Arc<Context>,
    start: NonNull<u8>,
    /// The last copy from it.
    sent: Event,
}

// SAFETY: pinned memory belongs to no thread.
unsafe impl Send for Buffer {}

impl Buffer {
    fn new(context: &Arc<Context>) -> Result<Buffer, KernelError> {
        context.bind()?;
        let sent = Event::new(context)?;
        let mut start = ptr::null_mut();
        // SAFETY: writes one pointer, which is freed when this is dropped.
        context.check(unsafe { sys::cuMemHostAlloc(&raw mut start, BUFFER, 0) }, "cuMemHostAlloc")?;
        let start =
            NonNull::new(start.cast()).ok_or_else(|| context.error("cuMemHostAlloc: null".to_owned()))?;
        Ok(Buffer { context: Arc::clone(context), start, sent })
    }

    /// Copies at most [`BUFFER`] bytes to its beginning. Plain threads: a task of a pool that waited here could be
    /// handed another upload to run, which would wait for this one.
    fn fill(&mut self, bytes: &[u8]) {
        // SAFETY: the buffer's own memory, nobody else's while this is borrowed.
        let to = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), bytes.len().min(BUFFER)) };
        let share = bytes.len().div_ceil(THREADS).max(LEAST);
        thread::scope(|scope| {
            let mut parts = to.chunks_mut(share).zip(bytes.chunks(share));
            let first = parts.next();
            for (to, from) in parts {
                scope.spawn(|| to.copy_from_slice(from));
            }
            if let Some((to, from)) = first {
                to.copy_from_slice(from);
            }
        });
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated once and freed once. Nothing can be done about a failure.
            let _ = unsafe { sys::cuMemFreeHost(self.start.as_ptr().cast()) };
        }
    }
}

impl Staging {
    pub(super) fn new(context: &Arc<Context>) -> Result<Staging, KernelError> {
        Ok(Staging { context: Arc::clone(context), copy: Stream::new(context)?, buffers: Mutex::default() })
    }

    /// New memory with these bytes; they are there when this returns.
    pub(super) fn upload(&self, heap: &Arc<Heap>, bytes: &[u8]) -> Result<CudaMemory, KernelError> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        while buffers.len() < 2 {
            buffers.push(Buffer::new(&self.context)?);
        }
        // From here on nothing returns before the stream is waited for: memory is freed on another.
        let memory = heap.allocate_on(&self.copy, bytes.len())?;
        let sent = self.send(&mut buffers, &memory, bytes);
        // Before an error too: nothing may be under way when the buffers or the memory are used again.
        let done = self.copy.synchronize();
        sent.and(done).map(|()| memory)
    }

    fn send(&self, buffers: &mut [Buffer], memory: &CudaMemory, bytes: &[u8]) -> Result<(), KernelError> {
        let count = buffers.len();
        for (index, chunk) in bytes.chunks(BUFFER).enumerate() {
            let buffer = &mut buffers[index % count];
            if index >= count {
                buffer.sent.wait()?;
            }
            buffer.fill(chunk);
            let to = memory.address + (index * BUFFER) as u64;
            // SAFETY: as many bytes on both sides; the buffer is not written before the copy is over.
            let copied = unsafe {
                sys::cuMemcpyHtoDAsync_v2(to, buffer.start.as_ptr().cast(), chunk.len(), self.copy.raw)
            };
            self.context.check(copied, "uploading")?;
            buffer.sent.record(&self.copy)?;
        }
        Ok(())
    }
}
