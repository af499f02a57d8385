//! Large copies, through two pinned buffers by turns, so that one is filled or emptied while the other crosses the bus.
#![expect(unsafe_code, reason = "calls the driver, and copies into memory that it gives")]

use std::num::NonZero;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;

use cudarc::driver::sys;

use super::context::{Context, Event, Stream};
use super::memory::{CudaMemory, Heap};
use crate::KernelError;

/// Bytes of one pinned buffer.
const BUFFER: usize = 16 << 20;
/// Copies that may be under way at once: weights of the next layer, and activations of this one, each on its own way.
const LANES: usize = 2;
/// Threads that fill or empty a buffer, at most: one does not keep up with the bus, nor do four with pages of files.
const THREADS: usize = 8;
/// Bytes worth a thread of their own.
const LEAST: usize = 1 << 20;

/// The ways that large copies take.
#[derive(Debug)]
pub(super) struct Staging {
    lanes: [Mutex<Lane>; LANES],
}

/// A stream for uploads and the buffers that copies go through, used by one copy at a time.
#[derive(Debug)]
struct Lane {
    context: Arc<Context>,
    copy: Stream,
    /// Made with the first copy.
    buffers: Vec<Buffer>,
}

/// Pinned memory.
#[derive(Debug)]
struct Buffer {
    context: Arc<Context>,
    start: NonNull<u8>,
    /// The last copy from it or to it.
    crossed: Event,
}

// SAFETY: pinned memory belongs to no thread.
unsafe impl Send for Buffer {}

impl Buffer {
    fn new(context: &Arc<Context>) -> Result<Buffer, KernelError> {
        context.bind()?;
        let crossed = Event::new(context)?;
        let mut start = ptr::null_mut();
        // SAFETY: writes one pointer, which is freed when this is dropped.
        context.check(unsafe { sys::cuMemHostAlloc(&raw mut start, BUFFER, 0) }, "cuMemHostAlloc")?;
        let start =
            NonNull::new(start.cast()).ok_or_else(|| context.error("cuMemHostAlloc: null".to_owned()))?;
        Ok(Buffer { context: Arc::clone(context), start, crossed })
    }

    /// Copies at most [`BUFFER`] bytes to its beginning.
    fn fill(&mut self, bytes: &[u8]) {
        // SAFETY: the buffer's own memory, nobody else's while this is borrowed.
        let to = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), bytes.len().min(BUFFER)) };
        copy(bytes, to);
    }

    /// Copies at most [`BUFFER`] bytes from its beginning.
    fn empty(&self, bytes: &mut [u8]) {
        // SAFETY: the buffer's own memory, which nobody writes to while this is borrowed: the copy to it is over.
        let from = unsafe { std::slice::from_raw_parts(self.start.as_ptr(), bytes.len().min(BUFFER)) };
        copy(from, bytes);
    }
}

/// Copies on several threads. Plain ones: a task of a pool that waited here could be handed another upload to run, which
/// would wait for this one.
fn copy(from: &[u8], to: &mut [u8]) {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS);
    let share = from.len().div_ceil(threads).max(LEAST);
    thread::scope(|scope| {
        let mut parts = to.chunks_mut(share).zip(from.chunks(share));
        let first = parts.next();
        for (to, from) in parts {
            scope.spawn(|| to.copy_from_slice(from));
        }
        if let Some((to, from)) = first {
            to.copy_from_slice(from);
        }
    });
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
        let lane = || {
            let copy = Stream::new(context)?;
            Ok(Mutex::new(Lane { context: Arc::clone(context), copy, buffers: Vec::new() }))
        };
        Ok(Staging { lanes: [lane()?, lane()?] })
    }

    /// A lane that nobody uses, or the last when it is free.
    fn lane(&self) -> MutexGuard<'_, Lane> {
        let free = self.lanes.iter().find_map(|lane| match lane.try_lock() {
            Ok(lane) => Some(lane),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        });
        free.unwrap_or_else(|| self.lanes[LANES - 1].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// New memory with these bytes; they are there when this returns.
    pub(super) fn upload(&self, heap: &Arc<Heap>, bytes: &[u8]) -> Result<CudaMemory, KernelError> {
        let mut lane = self.lane();
        lane.make_buffers()?;
        // From here on nothing returns before the stream is waited for: memory is freed on another.
        let memory = heap.allocate_on(&lane.copy, bytes.len())?;
        let sent = lane.send(&memory, bytes);
        // Before an error too: nothing may be under way when the buffers or the memory are used again.
        let done = lane.copy.synchronize();
        sent.and(done).map(|()| memory)
    }

    /// Copies memory to the host, after all that is queued on `after`.
    pub(super) fn download(&self, after: &Stream, from: u64, bytes: &mut [u8]) -> Result<(), KernelError> {
        let mut lane = self.lane();
        lane.make_buffers()?;
        let received = lane.receive(after, from, bytes);
        let done = after.synchronize();
        received.and(done)
    }
}

impl Lane {
    fn make_buffers(&mut self) -> Result<(), KernelError> {
        while self.buffers.len() < 2 {
            self.buffers.push(Buffer::new(&self.context)?);
        }
        Ok(())
    }

    fn send(&mut self, memory: &CudaMemory, bytes: &[u8]) -> Result<(), KernelError> {
        let count = self.buffers.len();
        for (index, chunk) in bytes.chunks(BUFFER).enumerate() {
            let buffer = &mut self.buffers[index % count];
            if index >= count {
                buffer.crossed.wait()?;
            }
            buffer.fill(chunk);
            let to = memory.address + (index * BUFFER) as u64;
            // SAFETY: as many bytes on both sides; the buffer is not written before the copy is over.
            let copied = unsafe {
                sys::cuMemcpyHtoDAsync_v2(to, buffer.start.as_ptr().cast(), chunk.len(), self.copy.raw)
            };
            self.context.check(copied, "uploading")?;
            buffer.crossed.record(&self.copy)?;
        }
        Ok(())
    }

    /// While a chunk crosses, the one before it is emptied.
    fn receive(&mut self, stream: &Stream, from: u64, bytes: &mut [u8]) -> Result<(), KernelError> {
        let count = self.buffers.len();
        let mut crossing: Option<(usize, &mut [u8])> = None;
        for (index, chunk) in bytes.chunks_mut(BUFFER).enumerate() {
            let buffer = &self.buffers[index % count];
            let at = from + (index * BUFFER) as u64;
            // SAFETY: as many bytes on both sides; the buffer was emptied after the copy before the last.
            let copied = unsafe {
                sys::cuMemcpyDtoHAsync_v2(buffer.start.as_ptr().cast(), at, chunk.len(), stream.raw)
            };
            self.context.check(copied, "downloading")?;
            buffer.crossed.record(stream)?;
            if let Some((before, chunk)) = crossing.replace((index % count, chunk)) {
                self.buffers[before].crossed.wait()?;
                self.buffers[before].empty(chunk);
            }
        }
        if let Some((last, chunk)) = crossing {
            self.buffers[last].crossed.wait()?;
            self.buffers[last].empty(chunk);
        }
        Ok(())
    }
}
