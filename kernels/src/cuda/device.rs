//! What the CUDA backend asks of a device: memory, copies, kernels by name. Implemented over the CUDA driver, and over
//! an emulation on the CPU that tests use. Knows no operation.

use std::sync::Arc;

use bytemuck::NoUninit;

use crate::KernelError;
use crate::backend::BackendIdentity;

/// Address of device memory, as kernels see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, NoUninit)]
#[repr(transparent)]
pub struct Address(pub u64);

impl Address {
    /// No memory.
    pub const NULL: Address = Address(0);

    /// `bytes` further on.
    pub const fn offset(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

/// The one argument of a kernel: plain data, laid out as the structure of the same name in `kernels/cuda`.
///
/// # Safety
/// The type must be `repr(C)`, hold nothing but numbers and [`Address`]es, and match the kernel's structure.
#[expect(unsafe_code, reason = "the launcher hands the bytes to a kernel as they are")]
pub unsafe trait Arguments: NoUninit + Send + Sync {}

/// A matrix in device memory that kernels copy boxes of, 128 bytes wide, with Hopper's copy engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorTile {
    /// Row-major elements, aligned to 16 bytes.
    pub address: Address,
    /// Rows; those beyond read as zeros.
    pub rows: usize,
    /// Elements of a row; those beyond read as zeros.
    pub columns: usize,
    /// Bytes from one row to the next, a multiple of 16.
    pub row_bytes: usize,
    /// Rows of a box, at most 256.
    pub box_rows: usize,
    /// What the matrix holds.
    pub element: TensorElement,
}

/// Elements of a [`TensorTile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorElement {
    /// 16 bits.
    Bf16,
    /// 8 bits of any meaning.
    Byte,
}

impl TensorElement {
    /// Its size.
    pub const fn bytes(self) -> usize {
        match self {
            TensorElement::Bf16 => 2,
            TensorElement::Byte => 1,
        }
    }
}

/// A [`TensorTile`] as kernels take it: `TensorMap` of hopper.cuh, a part of their [`Arguments`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, NoUninit)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u64; 16]);

/// Queues of work on a device. Work of one queue runs in order; queues run beside one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Everything but what follows.
    Compute,
    /// Decoding of packed weights for a product that has yet to begin.
    Decode,
}

/// What becomes of what is in the place that a result goes to.
#[derive(Clone, Copy, Debug, NoUninit, PartialEq, Eq)]
#[repr(u32)]
pub enum Store {
    /// It is overwritten.
    Over = 0,
    /// The result is added to it, both rounded first.
    Added = 1,
}

/// `y = x * w^T` of dense bf16 matrices with f32 sums, by a library.
#[derive(Clone, Copy, Debug)]
pub struct DenseProduct {
    /// bf16 [n, k] row-major.
    pub weight: Address,
    /// bf16 [m, k] row-major.
    pub x: Address,
    /// f32 [m, y_stride] row-major, of which n columns are written.
    pub y: Address,
    /// Rows of `x`.
    pub m: usize,
    /// Rows of `weight`.
    pub n: usize,
    /// The reduction axis.
    pub k: usize,
    /// Elements from one row of `y` to the next.
    pub y_stride: usize,
    /// What becomes of what is in `y`.
    pub store: Store,
}

/// A device that kernels run on.
pub trait Device: Send + Sync {
    /// Bytes on the device. Freed when dropped, after all work that was queued before.
    type Memory: Send + Sync;

    /// A place in the order of [`Queue::Compute`] of one device, for which other devices may wait.
    type Mark: Send + Sync;

    /// Bytes on their way to the host.
    type Parcel: Send + Sync;

    /// Kind of device and instruction set: `cuda`, `sm_90`.
    fn identity(&self) -> BackendIdentity;

    /// Where memory begins; aligned to 256 bytes.
    fn address(memory: &Self::Memory) -> Address;

    /// Memory for results of [`Queue::Compute`]; its content is undefined.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] where there is none left.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, KernelError>;

    /// A copy of host bytes, there for whatever is queued afterwards. May be called from any thread, and does not wait
    /// for the queues.
    ///
    /// # Errors
    /// As [`Device::allocate`]; where the copy fails.
    fn upload(&self, bytes: &[u8]) -> Result<Self::Memory, KernelError>;

    /// Memory that holds these bytes for whoever asks for them, never to be written: a device may upload what comes again
    /// only once.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn table(&self, bytes: &[u8]) -> Result<Arc<Self::Memory>, KernelError>;

    /// Copies memory from `offset` to the host, after all work queued so far on [`Queue::Compute`].
    ///
    /// # Errors
    /// Where the copy, or work queued before it, fails.
    fn download(&self, memory: &Self::Memory, offset: usize, bytes: &mut [u8]) -> Result<(), KernelError>;

    /// Sends the first `bytes` of memory to the host, as they are after all work queued so far on [`Queue::Compute`].
    /// Does not wait; the memory may go at once.
    ///
    /// # Errors
    /// Where the copy cannot be queued.
    fn send(&self, memory: &Self::Memory, bytes: usize) -> Result<Self::Parcel, KernelError>;

    /// Waits until a parcel is there.
    ///
    /// # Errors
    /// Where the copy, or work queued before it, fails.
    fn receive(&self, parcel: Self::Parcel) -> Result<Vec<u8>, KernelError>;

    /// Queues a kernel on `blocks` blocks (x, y, z). A launch of no blocks does nothing.
    ///
    /// # Errors
    /// Where the kernel cannot be compiled or launched.
    fn launch<A: Arguments>(
        &self,
        queue: Queue,
        kernel: &'static str,
        blocks: [usize; 3],
        args: &A,
    ) -> Result<(), KernelError>;

    /// Lets work queued on `queue` from now on wait for all that is queued on `earlier` so far.
    ///
    /// # Errors
    /// Where the device fails.
    fn follow(&self, queue: Queue, earlier: Queue) -> Result<(), KernelError>;

    /// Marks all work queued so far on [`Queue::Compute`], uploads that were made before included.
    ///
    /// # Errors
    /// Where the device fails.
    fn mark(&self) -> Result<Self::Mark, KernelError>;

    /// Lets work queued on [`Queue::Compute`] from now on, and the freeing of memory that is dropped from now on, wait
    /// for what was marked on any device.
    ///
    /// # Errors
    /// Where the device fails.
    fn wait_for(&self, mark: &Self::Mark) -> Result<(), KernelError>;

    /// Waits on the host until all that was queued on [`Queue::Compute`] is done.
    ///
    /// # Errors
    /// Where it failed.
    fn finish(&self) -> Result<(), KernelError>;

    /// Whether `other` is the same device, so that work of each may use memory of the other in place.
    fn is_same_device(&self, other: &Self) -> bool;

    /// A copy of memory of another device, there for whatever is queued on [`Queue::Compute`] afterwards. This device
    /// must have been made to wait for what fills the memory, and whoever frees it has to wait for a mark that this
    /// device sets afterwards.
    ///
    /// # Errors
    /// As [`Device::allocate`]; where the copy cannot be queued.
    fn fetch(&self, from: &Self, memory: &Self::Memory) -> Result<Self::Memory, KernelError>;

    /// Blocks that run at once where each has a multiprocessor to itself.
    fn multiprocessors(&self) -> usize;

    /// Whether kernels written for Hopper's warpgroups run here: `KERNEL_HOPPER` in the sources.
    fn has_warpgroups(&self) -> bool;

    /// How kernels are told of a matrix that they copy boxes of.
    ///
    /// # Errors
    /// Where the device has no warpgroups, or does not take the matrix.
    fn tensor_map(&self, tile: &TensorTile) -> Result<TensorMap, KernelError>;

    /// Whether [`Device::dense_product`] is there for products of this k. Must not depend on anything else.
    fn has_dense_product(&self, k: usize) -> bool;

    /// Whether dense products can be added to what is there with the bits of a sum afterwards.
    fn adds_dense_products(&self) -> bool;

    /// Queues a dense product on [`Queue::Compute`]. [`Store::Added`] only where products can be. Bits of an output depend on its row of `x` and of `weight` alone
    /// as long as `m` and `n` stay the same.
    ///
    /// # Errors
    /// Where the library fails.
    fn dense_product(&self, product: &DenseProduct) -> Result<(), KernelError>;
}
