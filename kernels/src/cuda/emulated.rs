//! A device that runs the CUDA kernels' own sources on the CPU, for tests: see `kernels/cuda/emulation`.
#![expect(unsafe_code, reason = "calls the emulation's C interface, and kernels work on raw addresses")]

mod memory;
mod order;

pub use self::memory::EmulatedMemory;
pub use self::order::EmulatedMark;

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::sync::Arc;

use libloading::Library;
use rayon::prelude::*;

use self::order::Order;
use crate::KernelError;
use crate::backend::BackendIdentity;
use crate::cuda::device::{Address, Arguments, DenseProduct, Device, Queue, Store, TensorMap, TensorTile};

/// As `simt::Kernel`.
#[repr(C)]
struct RawKernel {
    name: *const c_char,
    call: *const c_void,
    threads: u32,
    shared_bytes: u32,
    argument_bytes: usize,
}

unsafe extern "C" {
    fn ctq_kernel(name: *const c_char) -> *const RawKernel;
    fn ctq_run_block(
        kernel: *const RawKernel,
        args: *const c_void,
        x: u32,
        y: u32,
        z: u32,
        order: u32,
        copies: u32,
    ) -> u32;
}

type FindKernel = unsafe extern "C" fn(*const c_char) -> *const RawKernel;
type RunBlock = unsafe extern "C" fn(*const RawKernel, *const c_void, u32, u32, u32, u32, u32) -> u32;

/// The compiled emulation: the one that this crate was built with, or another build of it.
#[derive(Clone, Debug)]
struct Kernels {
    find: FindKernel,
    run_block: RunBlock,
    /// Keeps the functions loaded.
    _library: Option<Arc<Library>>,
}

impl Kernels {
    fn own() -> Kernels {
        Kernels { find: ctq_kernel, run_block: ctq_run_block, _library: None }
    }

    fn load(path: &Path) -> Result<Kernels, libloading::Error> {
        // SAFETY: the library is a build of `kernels/cuda/emulation`, whose initialisers only fill a table.
        let library = unsafe { Library::new(path)? };
        // SAFETY: the functions have these types in every build of the emulation.
        let (find, run_block) = unsafe {
            (*library.get::<FindKernel>(b"ctq_kernel")?, *library.get::<RunBlock>(b"ctq_run_block")?)
        };
        Ok(Kernels { find, run_block, _library: Some(Arc::new(library)) })
    }
}

/// Order in which the threads of a block run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadOrder {
    /// A warp runs until it meets a barrier of the block.
    DepthFirst,
    /// All threads take turns.
    LockStep,
    /// As depth first, the last thread first.
    LastFirst,
}

/// When asynchronous copies happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyTime {
    /// At once.
    Eager,
    /// At the last legal wait.
    Lazy,
}

/// One way to run a block that CUDA allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Order of threads.
    pub order: ThreadOrder,
    /// Time of copies.
    pub copies: CopyTime,
}

impl Schedule {
    /// Every combination.
    pub const ALL: [Schedule; 6] = [
        Schedule { order: ThreadOrder::DepthFirst, copies: CopyTime::Eager },
        Schedule { order: ThreadOrder::DepthFirst, copies: CopyTime::Lazy },
        Schedule { order: ThreadOrder::LockStep, copies: CopyTime::Eager },
        Schedule { order: ThreadOrder::LockStep, copies: CopyTime::Lazy },
        Schedule { order: ThreadOrder::LastFirst, copies: CopyTime::Eager },
        Schedule { order: ThreadOrder::LastFirst, copies: CopyTime::Lazy },
    ];
}

/// The emulated device. Cloning gives the same device.
#[derive(Clone, Debug)]
pub struct Emulated {
    kernels: Kernels,
    schedule: Schedule,
    /// Bytes that may be allocated.
    capacity: usize,
    order: Arc<Order>,
    dense_product: Dense,
    warpgroups: Warpgroups,
}

/// Whether the emulated device runs kernels written for Hopper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warpgroups {
    /// As sm_90a.
    Present,
    /// As every other device.
    Absent,
}

/// Whether the emulated device has a library for dense products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dense {
    /// Plain loops stand in for it.
    Present,
    /// It has none.
    Absent,
}

impl Emulated {
    /// A device without warpgroups and without a library for dense products, with as much memory as there is.
    pub fn new(schedule: Schedule) -> Emulated {
        let order = Arc::new(Order::new());
        let kernels = Kernels::own();
        Emulated {
            kernels,
            schedule,
            capacity: usize::MAX,
            order,
            dense_product: Dense::Absent,
            warpgroups: Warpgroups::Absent,
        }
    }

    /// The same with another build of the kernels: a shared library made from `kernels/cuda` and its
    /// emulation.
    ///
    /// # Errors
    /// Where the library cannot be loaded.
    pub fn with_kernels(self, library: &Path) -> Result<Emulated, libloading::Error> {
        Ok(Emulated { kernels: Kernels::load(library)?, ..self })
    }

    /// The same with `capacity` bytes of memory.
    #[must_use]
    pub fn with_capacity(self, capacity: usize) -> Emulated {
        Emulated { capacity, ..self }
    }

    /// The same with or without a library for dense products.
    #[must_use]
    pub fn with_dense_product(self, dense_product: Dense) -> Emulated {
        Emulated { dense_product, ..self }
    }

    /// The same with or without warpgroups.
    #[must_use]
    pub fn with_warpgroups(self, warpgroups: Warpgroups) -> Emulated {
        Emulated { warpgroups, ..self }
    }

    /// Bytes allocated now.
    pub fn used(&self) -> usize {
        self.order.used()
    }

    /// Kernels that were launched so far.
    pub fn launches(&self) -> usize {
        self.order.launches()
    }

    /// Times that the host has waited for everything so far.
    pub fn waits(&self) -> usize {
        self.order.waits()
    }

    fn failure(what: String) -> KernelError {
        KernelError::Device { device: "the emulated device".to_owned(), what }
    }
}

impl Device for Emulated {
    type Memory = EmulatedMemory;
    type Mark = EmulatedMark;
    type Parcel = EmulatedParcel;

    fn identity(&self) -> BackendIdentity {
        BackendIdentity { name: "cuda".to_owned(), isa: "emulated".to_owned() }
    }

    fn address(memory: &EmulatedMemory) -> Address {
        Address(memory.content() as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<EmulatedMemory, KernelError> {
        if self.used().saturating_add(bytes) > self.capacity {
            return Err(KernelError::OutOfMemory {
                device: "the emulated device".to_owned(),
                wanted: bytes as u64,
            });
        }
        Ok(EmulatedMemory::new(bytes, &self.order))
    }

    fn upload(&self, bytes: &[u8]) -> Result<EmulatedMemory, KernelError> {
        let memory = self.allocate(bytes.len())?;
        // SAFETY: freshly allocated with as many bytes.
        unsafe { memory.content().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(memory)
    }

    fn table(&self, bytes: &[u8]) -> Result<Arc<EmulatedMemory>, KernelError> {
        self.upload(bytes).map(Arc::new)
    }

    fn download(&self, memory: &EmulatedMemory, offset: usize, bytes: &mut [u8]) -> Result<(), KernelError> {
        assert!(offset + bytes.len() <= memory.bytes(), "a download beyond the end");
        self.order.finish();
        // SAFETY: within the allocation.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(memory.content().add(offset), bytes.len()) };
        Ok(())
    }

    fn send(&self, memory: &EmulatedMemory, bytes: usize) -> Result<EmulatedParcel, KernelError> {
        assert!(bytes <= memory.bytes(), "a parcel beyond the end");
        let mut content = vec![0; bytes];
        // SAFETY: within the allocation.
        unsafe { content.as_mut_ptr().copy_from_nonoverlapping(memory.content(), bytes) };
        Ok(EmulatedParcel { content, sent: self.order.worked() })
    }

    fn receive(&self, parcel: EmulatedParcel) -> Result<Vec<u8>, KernelError> {
        self.order.finish_until(parcel.sent);
        Ok(parcel.content)
    }

    fn launch<A: Arguments>(
        &self,
        _queue: Queue,
        kernel: &'static str,
        [x, y, z]: [usize; 3],
        args: &A,
    ) -> Result<(), KernelError> {
        let name = CString::new(kernel).expect("names have no zeros");
        // SAFETY: the name is a C string; kernels live as long as the program.
        let found = unsafe { (self.kernels.find)(name.as_ptr()).as_ref() };
        let Some(found) = found else {
            return Err(Emulated::failure(format!("there is no kernel `{kernel}`")));
        };
        assert_eq!(found.argument_bytes, size_of::<A>(), "arguments of `{kernel}`");
        assert!(y < 65_536 && z < 65_536 && x < 1 << 31, "`{kernel}` on {x} x {y} x {z} blocks");
        let (found, args) = (Shared(found), Shared(args));
        if let Some(bytes) = memory::of_another_device(args.0, &self.order) {
            let what = format!("`{kernel}` is given memory of another device, {bytes} bytes");
            return Err(Emulated::failure(what));
        }
        self.order.launch();
        let run = |index: usize| {
            let (bx, by, bz) = (index % x, index / x % y, index / (x * y));
            // SAFETY: sizes of arguments are equal; what they point to is the callers' promise, as on a device.
            let failure = unsafe {
                (self.kernels.run_block)(
                    found.pointer(),
                    args.pointer().cast(),
                    bx as u32,
                    by as u32,
                    bz as u32,
                    self.schedule.order as u32,
                    self.schedule.copies as u32,
                )
            };
            match failure {
                0 => Ok(()),
                failure => Err((index, failure)),
            }
        };
        (0..x * y * z).into_par_iter().try_for_each(run).map_err(|(block, failure)| {
            let what = match failure {
                1 => "makes no progress",
                2 => "reaches beyond its shared memory",
                4 => "reaches for 16 bytes that are not aligned",
                3 => "waits for a thread that has left",
                5 => "uses a barrier, a bulk copy or a warpgroup's product as hardware does not let it",
                _ => "ends while copies or products of it are under way",
            };
            // SAFETY: the name is a string literal of the kernel.
            let name = unsafe { CStr::from_ptr(found.0.name) }.to_string_lossy();
            Emulated::failure(format!("block {block} of `{name}` {what}"))
        })
    }

    fn follow(&self, _queue: Queue, _earlier: Queue) -> Result<(), KernelError> {
        // Everything happens at once.
        Ok(())
    }

    fn mark(&self) -> Result<EmulatedMark, KernelError> {
        Ok(self.order.mark())
    }

    fn wait_for(&self, mark: &EmulatedMark) -> Result<(), KernelError> {
        self.order.wait_for(mark);
        Ok(())
    }

    fn finish(&self) -> Result<(), KernelError> {
        self.order.finish();
        Ok(())
    }

    fn is_same_device(&self, other: &Emulated) -> bool {
        Arc::ptr_eq(&self.order, &other.order)
    }

    fn fetch(&self, from: &Emulated, memory: &EmulatedMemory) -> Result<EmulatedMemory, KernelError> {
        assert!(memory.is_of(&from.order), "memory of the device it is fetched from");
        let copy = self.allocate(memory.bytes())?;
        self.order.work();
        memory.read_by(&self.order).map_err(Emulated::failure)?;
        // SAFETY: as many bytes on both sides.
        unsafe { copy.content().copy_from_nonoverlapping(memory.content(), memory.bytes()) };
        Ok(copy)
    }

    fn multiprocessors(&self) -> usize {
        // Few, so that blocks that stay for several tiles are tried.
        3
    }

    fn has_warpgroups(&self) -> bool {
        self.warpgroups == Warpgroups::Present
    }

    fn tensor_map(&self, tile: &TensorTile) -> Result<TensorMap, KernelError> {
        let TensorTile { address, rows, columns, row_bytes, box_rows, element } = *tile;
        if !self.has_warpgroups() {
            return Err(Emulated::failure("a device without warpgroups has no tensor maps".to_owned()));
        }
        let aligned = address.0.is_multiple_of(16) && row_bytes.is_multiple_of(16);
        if !aligned || rows == 0 || columns == 0 || !(1..=256).contains(&box_rows) {
            return Err(Emulated::failure(format!("no tensor map tells of {tile:?}")));
        }
        // What emulation/hopper.h reads.
        let mut words = [0; 16];
        words[0] = address.0;
        let numbers = [rows, columns, row_bytes, box_rows, element.bytes()];
        words[1..].iter_mut().zip(numbers).for_each(|(word, number)| *word = number as u64);
        Ok(TensorMap(words))
    }

    fn has_dense_product(&self, k: usize) -> bool {
        self.dense_product == Dense::Present && k.is_multiple_of(8)
    }

    fn adds_dense_products(&self) -> bool {
        true
    }

    fn dense_product(&self, product: &DenseProduct) -> Result<(), KernelError> {
        let DenseProduct { m, n, k, y_stride, store, .. } = *product;
        let element = |from: Address, index: usize| {
            // SAFETY: the caller's promise: [n, k] and [m, k] elements.
            let bits = unsafe { (from.0 as *const u16).add(index).read() };
            f32::from_bits(u32::from(bits) << 16)
        };
        let y = Shared(product);
        (0..m).into_par_iter().for_each(|row| {
            for column in 0..n {
                let sum = (0..k).fold(0.0_f32, |sum, i| {
                    sum + element(product.x, row * k + i) * element(product.weight, column * k + i)
                });
                // SAFETY: the caller's promise: [m, y_stride] elements; rows are written by one thread each.
                unsafe {
                    let to = (y.0.y.0 as *mut f32).add(row * y_stride + column);
                    match store {
                        Store::Over => to.write(sum),
                        Store::Added => to.write(to.read() + sum),
                    }
                }
            }
        });
        Ok(())
    }
}

/// A copy of memory as it was.
#[derive(Debug)]
pub struct EmulatedParcel {
    content: Vec<u8>,
    /// Work of the device before it.
    sent: u64,
}

/// A reference that may be looked at from the threads that run blocks.
#[derive(Clone, Copy)]
struct Shared<'a, T>(&'a T);

// SAFETY: nothing behind it is written while blocks run.
unsafe impl<T> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<'_, T> {}

impl<T> Shared<'_, T> {
    fn pointer(&self) -> *const T {
        self.0
    }
}
