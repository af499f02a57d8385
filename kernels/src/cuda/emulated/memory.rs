//! Memory of emulated devices: guards around it, NaN in it, and a register of whose it is, so that a kernel that is
//! given memory of another device is noticed. Knows no kernels.
#![expect(unsafe_code, reason = "owns raw memory that kernels work on")]

use std::collections::BTreeMap;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::order::Order;
use crate::cuda::device::Arguments;

/// Bytes before and behind each allocation that no kernel may touch.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;
/// What undefined memory holds: NaN as f32, f64, bf16 and f16.
const UNDEFINED: u8 = 0xff;

/// Where each allocation begins: its bytes, and the number of its device.
static ALLOCATIONS: Mutex<BTreeMap<u64, (usize, u64)>> = Mutex::new(BTreeMap::new());

fn allocations() -> MutexGuard<'static, BTreeMap<u64, (usize, u64)>> {
    ALLOCATIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of an allocation of another device that an address among a kernel's arguments lies in. What arguments point to
/// is not looked at.
pub(super) fn of_another_device<A: Arguments>(args: &A, device: &Order) -> Option<usize> {
    let allocations = allocations();
    bytemuck::bytes_of(args).as_chunks().0.iter().find_map(|word| {
        let address = u64::from_ne_bytes(*word);
        let (start, (bytes, owner)) = allocations.range(..=address).next_back()?;
        (*owner != device.number() && address < start + *bytes as u64).then_some(*bytes)
    })
}

/// Memory of the emulated device, with guards around it.
pub struct EmulatedMemory {
    start: NonNull<u8>,
    bytes: usize,
    device: Arc<Order>,
    /// Work of the device before this was allocated.
    allocated: u64,
    /// Other devices that have read it, and how much work they had queued then.
    readers: Mutex<Vec<(Arc<Order>, u64)>>,
}

// SAFETY: the memory is owned, and only kernels and copies touch it, which callers order.
unsafe impl Send for EmulatedMemory {}
// SAFETY: as above.
unsafe impl Sync for EmulatedMemory {}

impl fmt::Debug for EmulatedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EmulatedMemory({})", self.bytes)
    }
}

impl EmulatedMemory {
    fn layout(bytes: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(bytes + 2 * GUARD, GUARD).expect("a size that fits")
    }

    pub(super) fn new(bytes: usize, device: &Arc<Order>) -> EmulatedMemory {
        let layout = Self::layout(bytes);
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { std::alloc::alloc(layout) }).expect("memory for the emulation");
        // SAFETY: within the allocation.
        unsafe {
            start.as_ptr().write_bytes(GUARD_BYTE, GUARD);
            start.as_ptr().add(GUARD).write_bytes(UNDEFINED, bytes);
            start.as_ptr().add(GUARD + bytes).write_bytes(GUARD_BYTE, GUARD);
        }
        device.allocated(bytes);
        // Counted as work, so that a mark from before does not cover what will fill it.
        let allocated = device.work();
        let device = Arc::clone(device);
        let memory = EmulatedMemory { start, bytes, device, allocated, readers: Mutex::default() };
        allocations().insert(memory.content() as u64, (bytes, memory.device.number()));
        memory
    }

    pub(super) fn content(&self) -> *mut u8 {
        // SAFETY: within the allocation.
        unsafe { self.start.as_ptr().add(GUARD) }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_of(&self, device: &Arc<Order>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }

    /// Another device reads it in work that it has just queued.
    ///
    /// # Errors
    /// Where that device does not wait for anything marked since this was allocated.
    pub(super) fn read_by(&self, reader: &Arc<Order>) -> Result<(), String> {
        if reader.sees(&self.device) < self.allocated {
            return Err(format!("a copy of {} bytes that no mark was waited for", self.bytes));
        }
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.push((Arc::clone(reader), reader.worked()));
        Ok(())
    }

    /// Whether its device waits for all that other devices read of it, or the host has.
    fn is_read(&self) -> bool {
        let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.iter().all(|(reader, when)| self.device.sees(reader).max(reader.finished()) >= *when)
    }

    fn guards_are_whole(&self) -> bool {
        let whole = |at: usize| {
            // SAFETY: within the allocation, and initialised when it was made.
            let guard = unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(at), GUARD) };
            guard.iter().all(|byte| *byte == GUARD_BYTE)
        };
        whole(0) && whole(GUARD + self.bytes)
    }
}

impl Drop for EmulatedMemory {
    fn drop(&mut self) {
        allocations().remove(&(self.content() as u64));
        self.device.freed(self.bytes);
        let (whole, read) = (self.guards_are_whole(), self.is_read());
        // SAFETY: allocated with the same layout.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), Self::layout(self.bytes)) };
        if std::thread::panicking() {
            return;
        }
        assert!(whole, "a kernel wrote outside an allocation of {} bytes", self.bytes);
        assert!(read, "{} bytes are freed while another device may read them", self.bytes);
    }
}
