//! [`Device`] over the CUDA driver: memory, copies and launches of one GPU. Knows no operation.
#![expect(unsafe_code, reason = "calls the driver")]

use std::path::Path;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};

use super::compile::Compiler;
use super::context::Context;
use super::cublaslt::CublasLt;
use super::dense::Dense;
use super::kernels::KernelTable;
use super::machine::{Kernels, Machine};
use super::memory::{CudaMemory, Heap};
use super::nvrtc::Nvrtc;
use super::parcels::{CudaParcel, Parcels};
use super::peers::CudaMark;
use super::staging::Staging;
use super::tables::Tables;
use crate::KernelError;
use crate::backend::BackendIdentity;
use crate::cuda::device::{
    Address, Arguments, DenseProduct, Device, Queue, TensorElement, TensorMap, TensorTile,
};

/// Copies up to this many bytes go without pinned buffers.
const SMALL: usize = 64 << 10;

/// A GPU.
#[derive(Debug)]
pub struct CudaDevice {
    // In the order in which they must go: what is used on the context's streams before the streams.
    kernels: KernelTable,
    /// The library of dense products, or why there is none.
    dense: Result<Dense, String>,
    staging: Staging,
    parcels: Arc<Parcels>,
    tables: Tables<CudaMemory>,
    heap: Arc<Heap>,
    context: Arc<Context>,
    capability: (u32, u32),
    multiprocessors: usize,
    /// Last kernel that was queued: a fault of one is told by whatever waits next.
    last: Mutex<&'static str>,
}

impl CudaDevice {
    /// Opens a device of a machine. At most `budget` bytes of its memory are allocated; without one, as much as there
    /// is. Compiled kernels are kept in `cache`, where there is one.
    ///
    /// # Errors
    /// Where it cannot be used, or fails.
    pub fn open(
        machine: &Machine,
        ordinal: usize,
        budget: Option<u64>,
        cache: Option<&Path>,
    ) -> Result<CudaDevice, KernelError> {
        let fault = |what: String| KernelError::Device { device: format!("cuda:{ordinal}"), what };
        let (info, kernels) = machine.device(ordinal).map_err(|error| fault(error.to_string()))?;
        let compiler = match kernels {
            Kernels::Prebuilt(target) => Compiler::prebuilt(target.clone()),
            Kernels::Compiled(target) => {
                let found = machine.nvrtc.as_ref().map_err(|error| fault(format!("NVRTC: {error}")))?;
                let nvrtc = Nvrtc::load(&found.path).map_err(fault)?;
                Compiler::nvrtc(target.clone(), nvrtc, cache)
            }
        };
        let context = Arc::new(Context::new(info)?);
        let heap = Arc::new(Heap::new(&context)?);
        let staging = Staging::new(&context)?;
        let dense = match &machine.cublaslt {
            Ok(found) => match CublasLt::load(&found.path) {
                Ok(library) => Dense::new(&heap, &staging, library, found.version)?,
                Err(reason) => Err(format!("{}: {reason}", found.path.display())),
            },
            Err(error) => Err(format!("cuBLASLt: {error}")),
        };
        // What the library takes is apart from the budget, which must not decide who multiplies.
        if let Some(budget) = budget {
            heap.limit(budget);
        }
        Ok(CudaDevice {
            kernels: KernelTable::new(&context, compiler),
            dense,
            staging,
            parcels: Arc::new(Parcels::new(&context)),
            tables: Tables::new(),
            heap,
            context,
            capability: info.capability,
            multiprocessors: info.multiprocessors as usize,
            last: Mutex::new(""),
        })
    }

    /// Makes and loads all kernels now rather than when they are first needed.
    ///
    /// # Errors
    /// Where one cannot be compiled or loaded.
    pub fn load_kernels(&self) -> Result<(), KernelError> {
        self.kernels.load_all()
    }

    /// What messages call it: `cuda:0 (NVIDIA H200)`.
    pub fn name(&self) -> &str {
        &self.context.name
    }

    /// What no other GPU of any machine has.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn identifier(&self) -> Result<String, KernelError> {
        self.context.identifier()
    }

    /// What there is to tell since this was asked last, such as a cache that cannot be written.
    pub fn take_notes(&self) -> Vec<String> {
        self.kernels.compiler.take_notes()
    }

    /// What multiplies dense matrices, or why the library does not.
    ///
    /// # Errors
    /// The reason, where ctq's own kernels serve.
    pub fn dense(&self) -> Result<&str, &str> {
        self.dense.as_ref().map(Dense::description).map_err(String::as_str)
    }

    /// Free memory, and all of it, in bytes.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn memory(&self) -> Result<(u64, u64), KernelError> {
        self.context.memory()
    }

    /// Bytes allocated now.
    pub fn used(&self) -> u64 {
        self.heap.used()
    }

    /// Waits for all that was queued.
    ///
    /// # Errors
    /// Where it failed.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        let done = self.heap.decode.synchronize().and(self.heap.compute.synchronize());
        done.map_err(|error| self.blamed(error))
    }

    /// Streams and memory.
    pub(super) fn heap(&self) -> &Arc<Heap> {
        &self.heap
    }

    /// Says what was under way where a device fails.
    fn blamed(&self, error: KernelError) -> KernelError {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            KernelError::Device { device, what } if !last.is_empty() => {
                KernelError::Device { device, what: format!("{what}, at the latest in `{last}`") }
            }
            error => error,
        }
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Kernels must not go while they run. Whoever waits for a result is told of a failure.
        let _ = self.synchronize();
    }
}

impl Device for CudaDevice {
    type Memory = CudaMemory;
    type Mark = CudaMark;
    type Parcel = CudaParcel;

    fn identity(&self) -> BackendIdentity {
        let (major, minor) = self.capability;
        // Who multiplies shows in the bits, so it is part of how a number was made.
        let products = match &self.dense {
            Ok(dense) => format!(", {}", dense.description()),
            Err(_) => String::new(),
        };
        BackendIdentity { name: "cuda".to_owned(), isa: format!("sm_{major}{minor}{products}") }
    }

    fn address(memory: &CudaMemory) -> Address {
        Address(memory.address)
    }

    fn allocate(&self, bytes: usize) -> Result<CudaMemory, KernelError> {
        self.heap.allocate(bytes).map_err(|error| self.blamed(error))
    }

    fn upload(&self, bytes: &[u8]) -> Result<CudaMemory, KernelError> {
        match bytes.len() {
            ..=SMALL => self.heap.upload_table(bytes),
            _ => self.staging.upload(&self.heap, bytes),
        }
    }

    fn table(&self, bytes: &[u8]) -> Result<Arc<CudaMemory>, KernelError> {
        self.tables.get(bytes, || self.upload(bytes))
    }

    fn download(&self, memory: &CudaMemory, offset: usize, bytes: &mut [u8]) -> Result<(), KernelError> {
        if offset.checked_add(bytes.len()).is_none_or(|end| end > memory.bytes) {
            let what = format!("a download of {} bytes from {offset} of {}", bytes.len(), memory.bytes);
            return Err(self.context.error(what));
        }
        self.heap.before_compute()?;
        let (to, from) = (bytes.as_mut_ptr().cast(), memory.address + offset as u64);
        if bytes.len() > SMALL {
            let done = self.staging.download(&self.heap.compute, from, bytes);
            return done.map_err(|error| self.blamed(error));
        }
        let queued = if bytes.is_empty() {
            Ok(())
        } else {
            // SAFETY: inside both; the bytes are borrowed until the stream is synchronised.
            let queued = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes.len(), self.heap.compute.raw) };
            self.context.check(queued, "downloading")
        };
        queued.and(self.heap.compute.synchronize()).map_err(|error| self.blamed(error))
    }

    fn send(&self, memory: &CudaMemory, bytes: usize) -> Result<CudaParcel, KernelError> {
        Parcels::send(&self.parcels, &self.heap, memory, bytes).map_err(|error| self.blamed(error))
    }

    fn receive(&self, parcel: CudaParcel) -> Result<Vec<u8>, KernelError> {
        parcel.open().map_err(|error| self.blamed(error))
    }

    fn launch<A: Arguments>(
        &self,
        queue: Queue,
        kernel: &'static str,
        blocks: [usize; 3],
        args: &A,
    ) -> Result<(), KernelError> {
        if blocks.contains(&0) {
            return Ok(());
        }
        let [x, y, z] = blocks;
        if x >= 1 << 31 || y >= 1 << 16 || z >= 1 << 16 {
            return Err(self.context.error(format!("`{kernel}` on {x} x {y} x {z} blocks")));
        }
        let found = self.kernels.find(kernel)?;
        let stream = match queue {
            Queue::Compute => {
                self.heap.before_compute()?;
                &self.heap.compute
            }
            Queue::Decode => {
                self.heap.before_decode()?;
                &self.heap.decode
            }
        };
        let mut arguments = [ptr::from_ref(args).cast_mut().cast()];
        // SAFETY: one argument, of the type that the kernel takes by the promise of `Arguments`; the driver copies it
        // before it returns. What it points to is the callers' promise.
        let launched = unsafe {
            sys::cuLaunchKernel(
                found.function,
                x as u32,
                y as u32,
                z as u32,
                found.threads,
                1,
                1,
                found.shared,
                stream.raw,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        let launched = self.context.check(launched, &format!("launching `{kernel}`"));
        launched.map_err(|error| self.blamed(error))?;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = kernel;
        Ok(())
    }

    fn follow(&self, queue: Queue, earlier: Queue) -> Result<(), KernelError> {
        match (queue, earlier) {
            (Queue::Compute, Queue::Decode) => self.heap.compute_follows_decode(),
            (Queue::Decode, Queue::Compute) => self.heap.decode_follows_compute(),
            // A queue runs in order by itself.
            (Queue::Compute, Queue::Compute) | (Queue::Decode, Queue::Decode) => Ok(()),
        }
    }

    fn mark(&self) -> Result<CudaMark, KernelError> {
        self.heap.mark().map_err(|error| self.blamed(error))
    }

    fn wait_for(&self, mark: &CudaMark) -> Result<(), KernelError> {
        self.heap.wait_for(mark).map_err(|error| self.blamed(error))
    }

    fn finish(&self) -> Result<(), KernelError> {
        self.heap.before_compute()?;
        self.heap.compute.synchronize().map_err(|error| self.blamed(error))
    }

    fn is_same_device(&self, other: &CudaDevice) -> bool {
        self.context.device == other.context.device
    }

    fn fetch(&self, _from: &CudaDevice, memory: &CudaMemory) -> Result<CudaMemory, KernelError> {
        self.heap.fetch(memory).map_err(|error| self.blamed(error))
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn has_warpgroups(&self) -> bool {
        self.kernels.compiler.target() == "sm_90a"
    }

    fn tensor_map(&self, tile: &TensorTile) -> Result<TensorMap, KernelError> {
        let TensorTile { address, rows, columns, row_bytes, box_rows, element } = *tile;
        let kind = match element {
            TensorElement::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            TensorElement::Byte => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        let size = [columns as u64, rows as u64];
        let boxes = [(128 / element.bytes()) as u32, box_rows as u32];
        let mut map = CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays have the lengths that a rank of 2 takes; the map is only written.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                kind,
                2,
                address.0 as *mut _,
                size.as_ptr(),
                &raw const row_bytes as *const u64,
                boxes.as_ptr(),
                [1_u32; 2].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        self.context.check(encoded, &format!("cuTensorMapEncodeTiled of {tile:?}"))?;
        Ok(TensorMap(map.opaque))
    }

    fn has_dense_product(&self, k: usize) -> bool {
        self.dense.as_ref().is_ok_and(|dense| dense.takes(k))
    }

    fn adds_dense_products(&self) -> bool {
        self.dense.as_ref().is_ok_and(Dense::adds)
    }

    fn dense_product(&self, product: &DenseProduct) -> Result<(), KernelError> {
        let dense = self.dense.as_ref().map_err(|error| self.context.error(error.clone()))?;
        dense.multiply(product).map_err(|error| self.blamed(error))
    }
}

#[cfg(test)]
#[path = "tests/device.rs"]
mod tests;
