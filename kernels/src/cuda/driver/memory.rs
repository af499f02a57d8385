//! Memory of a device: allocated and freed in the order of the streams, counted against a budget.
//!
//! Freeing is ordered behind everything that was queued before, on every stream, without waiting on the host: see
//! [`Heap::free`].
#![expect(unsafe_code, reason = "calls the driver")]

use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{
    self, CUdevice_attribute, CUdeviceptr, CUmemPool_attribute, CUmemoryPool, CUresult,
};

use super::context::{Context, Order, Stream};
use crate::KernelError;

/// Bytes on a device.
#[derive(Debug)]
pub struct CudaMemory {
    heap: Arc<Heap>,
    pub(super) address: CUdeviceptr,
    pub(super) bytes: usize,
}

impl CudaMemory {
    pub(super) fn heap(&self) -> &Heap {
        &self.heap
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        self.heap.free(self.address, self.bytes);
    }
}

/// The streams of a device, and the memory that is used on them.
#[derive(Debug)]
pub(super) struct Heap {
    pub(super) context: Arc<Context>,
    /// Where everything is computed.
    pub(super) compute: Stream,
    /// Where weights are decoded for a product that has yet to begin.
    pub(super) decode: Stream,
    /// Where small uploads are queued: apart from the rest, so that they wait for nothing.
    tables: Stream,
    order: Order,
    /// The pool that memory comes from, where the device has pools.
    pool: Option<Pool>,
    /// The device reads pageable memory by itself: a copy from it may begin after the call that queues it.
    reads_pageable: bool,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug)]
struct Pool(CUmemoryPool);

// SAFETY: pools may be used from any thread.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

#[derive(Debug, Default)]
struct State {
    /// Bytes allocated now.
    used: u64,
    /// Bytes that may be allocated; `None`: as many as there are.
    limit: Option<u64>,
    /// Work was queued on `decode` that `compute` does not wait for yet.
    decoding: bool,
    /// Freed while work was queued on `decode`, which may still read it.
    freed: Vec<(CUdeviceptr, u64)>,
    /// Small uploads were queued that these streams do not wait for yet.
    tables_before_compute: bool,
    tables_before_decode: bool,
}

/// The driver aligns to 256 bytes, and so do we count.
fn rounded(bytes: usize) -> u64 {
    (bytes.max(1) as u64).next_multiple_of(256)
}

impl Heap {
    /// Streams of a device, and all of its memory.
    pub(super) fn new(context: &Arc<Context>) -> Result<Heap, KernelError> {
        let pools = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)?;
        let pageable = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS)?;
        Ok(Heap {
            context: Arc::clone(context),
            compute: Stream::new(context)?,
            decode: Stream::new(context)?,
            tables: Stream::new(context)?,
            order: Order::new(context)?,
            pool: if pools == 0 { None } else { Some(Pool::of(context)?) },
            reads_pageable: pageable != 0,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on at most `bytes` more.
    pub(super) fn limit(&self, bytes: u64) {
        let mut state = self.state();
        state.limit = Some(state.used.saturating_add(bytes));
    }

    /// Where memory comes from, if not from the driver one by one.
    pub(super) fn pool(&self) -> Option<CUmemoryPool> {
        self.pool.map(|Pool(pool)| pool)
    }

    /// Bytes allocated now.
    pub(super) fn used(&self) -> u64 {
        self.state().used
    }

    /// Memory that work on `compute` may use from here on.
    pub(super) fn allocate(self: &Arc<Heap>, bytes: usize) -> Result<CudaMemory, KernelError> {
        self.allocate_on(&self.compute, bytes)
    }

    /// Memory that work on `stream` may use from here on; others after they have waited for it.
    pub(super) fn allocate_on(
        self: &Arc<Heap>,
        stream: &Stream,
        bytes: usize,
    ) -> Result<CudaMemory, KernelError> {
        self.context.bind()?;
        self.reserve(rounded(bytes))?;
        match self.take(stream, rounded(bytes)) {
            Ok(address) => Ok(CudaMemory { heap: Arc::clone(self), address, bytes }),
            Err(error) => {
                self.state().used -= rounded(bytes);
                Err(error)
            }
        }
    }

    fn out_of_memory(&self, wanted: u64) -> KernelError {
        KernelError::OutOfMemory { device: self.context.name.clone(), wanted }
    }

    /// Counts bytes against the budget.
    fn reserve(&self, bytes: u64) -> Result<(), KernelError> {
        let mut state = self.state();
        let is_over =
            |state: &State| state.limit.is_some_and(|limit| state.used.saturating_add(bytes) > limit);
        if is_over(&state) {
            self.release(&mut state)?;
        }
        if is_over(&state) {
            return Err(self.out_of_memory(bytes));
        }
        state.used += bytes;
        Ok(())
    }

    fn take(&self, stream: &Stream, bytes: u64) -> Result<CUdeviceptr, KernelError> {
        match self.ask(stream, bytes) {
            Ok(address) => return Ok(address),
            Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {}
            Err(error) => self.context.check(error, "allocating memory")?,
        }
        // What is freed may still be waiting for work that is queued, or be kept in pieces.
        self.release(&mut self.state())?;
        for stream in [&self.decode, &self.tables, &self.compute] {
            stream.synchronize()?;
        }
        if let Some(Pool(pool)) = self.pool {
            // SAFETY: the device's own pool, which lives as long as its context.
            self.context.check(unsafe { sys::cuMemPoolTrimTo(pool, 0) }, "cuMemPoolTrimTo")?;
        }
        match self.ask(stream, bytes) {
            Ok(address) => Ok(address),
            Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => Err(self.out_of_memory(bytes)),
            Err(error) => Err(self
                .context
                .check(error, "allocating memory")
                .err()
                .unwrap_or_else(|| self.out_of_memory(bytes))),
        }
    }

    fn ask(&self, stream: &Stream, bytes: u64) -> Result<CUdeviceptr, CUresult> {
        let mut address = 0;
        // SAFETY: writes one address, which is freed once.
        let result = unsafe {
            match self.pool {
                Some(_) => sys::cuMemAllocAsync(&raw mut address, bytes as usize, stream.raw),
                None => sys::cuMemAlloc_v2(&raw mut address, bytes as usize),
            }
        };
        if result == CUresult::CUDA_SUCCESS { Ok(address) } else { Err(result) }
    }

    /// Frees memory behind all work that was queued before.
    ///
    /// Work on `decode` that `compute` does not wait for yet may still use it. Waiting now would take from the decoding
    /// that it runs beside the products, so the memory stays until `compute` waits anyway.
    fn free(&self, address: CUdeviceptr, bytes: usize) {
        let mut state = self.state();
        state.freed.push((address, rounded(bytes)));
        if !state.decoding {
            // A device that has failed is told of where it is used.
            let _ = self.give_back(&mut state);
        }
    }

    /// Frees everything that waits for the end of work on `decode`.
    fn release(&self, state: &mut State) -> Result<(), KernelError> {
        if state.decoding {
            self.order.follow(&self.compute, &self.decode)?;
            state.decoding = false;
        }
        self.give_back(state)
    }

    /// Frees what was dropped; `compute` waits for everything that may use it.
    fn give_back(&self, state: &mut State) -> Result<(), KernelError> {
        if state.freed.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        self.see_tables(state, &self.compute)?;
        if self.pool.is_none() {
            self.compute.synchronize()?;
        }
        for (address, bytes) in std::mem::take(&mut state.freed) {
            state.used -= bytes;
            // SAFETY: allocated once and freed once, behind all work that uses it.
            let freed = unsafe {
                match self.pool {
                    Some(_) => sys::cuMemFreeAsync(address, self.compute.raw),
                    None => sys::cuMemFree_v2(address),
                }
            };
            self.context.check(freed, "freeing memory")?;
        }
        Ok(())
    }

    /// Queues a small upload; returns when the bytes have been taken.
    pub(super) fn upload_table(self: &Arc<Heap>, bytes: &[u8]) -> Result<CudaMemory, KernelError> {
        let memory = self.allocate_on(&self.tables, bytes.len())?;
        if !bytes.is_empty() {
            self.copy_table(memory.address, bytes)?;
        }
        // Of no bytes too: what frees them has to follow what allocated them.
        let mut state = self.state();
        state.tables_before_compute = true;
        state.tables_before_decode = true;
        Ok(memory)
    }

    fn copy_table(&self, to: CUdeviceptr, bytes: &[u8]) -> Result<(), KernelError> {
        // SAFETY: as many bytes on both sides; the driver takes bytes of pageable memory before it returns, or they are
        // borrowed until the copy is over.
        let copied =
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), self.tables.raw) };
        self.context.check(copied, "uploading")?;
        if self.reads_pageable { self.tables.synchronize() } else { Ok(()) }
    }

    fn see_tables(&self, state: &mut State, stream: &Stream) -> Result<(), KernelError> {
        let pending = if stream.raw == self.decode.raw {
            &mut state.tables_before_decode
        } else {
            &mut state.tables_before_compute
        };
        if std::mem::take(pending) {
            self.order.follow(stream, &self.tables)?;
        }
        Ok(())
    }

    /// What must happen before work is queued on `compute`: it sees all uploads.
    pub(super) fn before_compute(&self) -> Result<(), KernelError> {
        self.context.bind()?;
        self.see_tables(&mut self.state(), &self.compute)
    }

    /// What must happen before work is queued on `decode`: it sees all uploads, and memory is kept for it.
    pub(super) fn before_decode(&self) -> Result<(), KernelError> {
        self.context.bind()?;
        let mut state = self.state();
        state.decoding = true;
        self.see_tables(&mut state, &self.decode)
    }

    /// `compute` waits for `decode`.
    pub(super) fn compute_follows_decode(&self) -> Result<(), KernelError> {
        self.context.bind()?;
        let mut state = self.state();
        self.order.follow(&self.compute, &self.decode)?;
        state.decoding = false;
        self.give_back(&mut state)
    }

    /// `decode` waits for `compute`.
    pub(super) fn decode_follows_compute(&self) -> Result<(), KernelError> {
        self.order.follow(&self.decode, &self.compute)
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // No memory refers to this any more, but what was freed may still be kept for work on `decode`.
        let mut state = std::mem::take(&mut *self.state());
        let _ = self.release(&mut state);
        for stream in [&self.decode, &self.tables, &self.compute] {
            let _ = stream.synchronize();
        }
    }
}

impl Pool {
    /// The device's pool, which keeps what is freed instead of giving it back to the system.
    fn of(context: &Context) -> Result<Pool, KernelError> {
        let mut pool = ptr::null_mut();
        // SAFETY: writes one handle.
        let found = unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.device) };
        context.check(found, "cuDeviceGetDefaultMemPool")?;
        let mut keep = u64::MAX;
        let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a 64-bit number.
        let set = unsafe { sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut keep).cast()) };
        context.check(set, "cuMemPoolSetAttribute")?;
        // An upload must not be made to wait for computing only because memory would be freed there soon.
        let mut no = 0_i32;
        let waits = CUmemPool_attribute::CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES;
        // SAFETY: the attribute is an integer.
        let set = unsafe { sys::cuMemPoolSetAttribute(pool, waits, (&raw mut no).cast()) };
        context.check(set, "cuMemPoolSetAttribute")?;
        Ok(Pool(pool))
    }
}
