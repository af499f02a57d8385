//! Ranks on devices of several processes or nodes, by NCCL: which calls a gather is made of, and how it ends where a
//! rank is lost. Bytes of the host go another way.
#![expect(unsafe_code, reason = "hands addresses to the library")]

use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::device::CudaDevice;
use super::memory::Heap;
use super::nccl::{NcclLibrary, RawCommunicator, Refused, UniqueId};
use crate::KernelError;
use crate::collective::{Collective, Peers};
use crate::cuda::device::{Address, Device};
use crate::cuda::elementwise::place_side_by_side;
use crate::cuda::{Cuda, CudaBuffer};

/// How long ranks that have all begun to meet may take: connecting many nodes takes a minute or two.
const MEETING: Duration = Duration::from_secs(600);
/// Between two questions whether something is settled.
const PAUSE: Duration = Duration::from_micros(20);

/// One of several ranks, each on a device of its own: activations go by NCCL, host bytes by `P`.
///
/// A rank that waits on its device for one that is lost waits until [`Peers::abort`] is called on this rank's own
/// object, from whatever thread. What it has computed with what never came is undefined, and its next gather fails with
/// [`KernelError::Lost`].
pub struct Nccl<P> {
    // First, so that it leaves while streams are there.
    communicator: Communicator,
    heap: Arc<Heap>,
    peers: P,
}

impl<P> fmt::Debug for Nccl<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl").field("communicator", &self.communicator).finish_non_exhaustive()
    }
}

impl<P: Peers> Nccl<P> {
    /// Joins the ranks of `peers`, each with its device; returns when all have. Ranks of one process join from threads
    /// of their own, after their devices were made to reach one another by [`CudaDevice::connect`].
    ///
    /// # Errors
    /// Where a rank is lost, the library fails, or a device is there twice.
    pub fn join(device: &CudaDevice, library: NcclLibrary, peers: P) -> Result<Nccl<P>, KernelError> {
        let heap = Arc::clone(device.heap());
        let name = heap.context.name.clone();
        let joined = share_id(&name, library, &peers).and_then(|id| {
            heap.context.bind()?;
            Communicator::join(name, library, id, peers.rank(), peers.ranks(), MEETING)
        });
        match joined {
            Ok(communicator) => Ok(Nccl { communicator, heap, peers }),
            Err(error) => {
                peers.abort(&format!("rank {}: {error}", peers.rank()));
                Err(error)
            }
        }
    }
}

/// The id that rank 0 makes. No rank goes on before all are there, because joining waits for them without an end.
fn share_id(device: &str, library: NcclLibrary, peers: &dyn Peers) -> Result<UniqueId, KernelError> {
    let fault = |what: String| KernelError::Device { device: device.to_owned(), what };
    let own = match peers.rank() {
        0 => library.unique_id().map_err(fault)?.bytes().to_vec(),
        _ => Vec::new(),
    };
    let received = peers.exchange(vec![own; peers.ranks()])?;
    let id = received.first().and_then(|bytes| <[u8; UniqueId::BYTES]>::try_from(&bytes[..]).ok());
    id.map(UniqueId::from_bytes).ok_or_else(|| fault("rank 0 has sent no id of NCCL's".to_owned()))
}

impl<P> Drop for Nccl<P> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.communicator.abort("a rank panicked");
        } else if self.communicator.is_open() {
            // What is queued must be over before it leaves. Whoever waits for a result is told of a failure.
            let _ = self.heap.compute.synchronize();
        }
    }
}

impl<P: Peers> Peers for Nccl<P> {
    fn rank(&self) -> usize {
        self.peers.rank()
    }

    fn ranks(&self) -> usize {
        self.peers.ranks()
    }

    fn exchange(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, KernelError> {
        self.peers.exchange(parts)
    }

    fn abort(&self, reason: &str) {
        self.peers.abort(reason);
        self.communicator.abort(reason);
    }
}

impl<P: Peers> Collective<Cuda<CudaDevice>> for Nccl<P> {
    fn all_gather(
        &self,
        backend: &Cuda<CudaDevice>,
        part: CudaBuffer<<CudaDevice as Device>::Memory>,
        widths: &[usize],
    ) -> Result<CudaBuffer<<CudaDevice as Device>::Memory>, KernelError> {
        assert_eq!(part.width, widths[self.rank()], "the width that others know of");
        let (device, rows) = (backend.device(), part.rows);
        let gathered = device.allocate(rows * widths.iter().sum::<usize>() * size_of::<f32>())?;
        self.heap.before_compute()?;
        let stream = self.heap.compute.raw.cast();
        let (from, to) = (part.address::<CudaDevice>(), CudaDevice::address(&gathered));
        // SAFETY: both are of these sizes, and freed behind this work on the same stream.
        unsafe { self.communicator.all_gather(from, to, rows, widths, stream)? };
        let mut at = to;
        let place = |width: &usize| {
            let here = at;
            at = at.offset(rows * width * size_of::<f32>());
            (here, *width)
        };
        let parts: Vec<(Address, usize)> = widths.iter().map(place).collect();
        place_side_by_side(device, rows, &parts)
    }
}

/// A rank's place among others, until it is given up.
#[derive(Debug)]
struct Communicator {
    device: String,
    rank: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open(RawCommunicator),
    /// Why it is not.
    Closed(String),
}

impl Communicator {
    /// Joins, with the device whose context is current to this thread.
    fn join(
        device: String,
        library: NcclLibrary,
        id: UniqueId,
        rank: usize,
        ranks: usize,
        within: Duration,
    ) -> Result<Communicator, KernelError> {
        let raw = RawCommunicator::join(library, id, rank, ranks).map_err(|error| refused(&device, error))?;
        let this = Communicator { device, rank, state: Mutex::new(State::Open(raw)) };
        let joined = this.settle(Some(Instant::now() + within));
        joined.inspect_err(|error| this.abort(&error.to_string())).map(|()| this)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_open(&self) -> bool {
        matches!(*self.state(), State::Open(_))
    }

    /// Calls the library, which returns at once, so that nobody who gives up has to wait.
    fn call<T>(&self, call: impl FnOnce(&RawCommunicator) -> Result<T, Refused>) -> Result<T, KernelError> {
        match &*self.state() {
            State::Open(raw) => call(raw).map_err(|error| refused(&self.device, error)),
            State::Closed(reason) => Err(KernelError::Lost { what: reason.clone() }),
        }
    }

    /// Waits until all that was begun is done or queued.
    fn settle(&self, until: Option<Instant>) -> Result<(), KernelError> {
        while !self.call(RawCommunicator::settled)? {
            if until.is_some_and(|until| Instant::now() > until) {
                let what = "other ranks have not joined in time; see whether all nodes reach one another \
                            (NCCL_SOCKET_IFNAME names the interface), and run the same command again";
                return Err(KernelError::Lost { what: format!("{}: {what}", self.device) });
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Queues a gather: [rows, width] of each rank, one behind the other.
    ///
    /// # Safety
    /// `from` must hold this rank's part and `to` all parts until `stream` has come by, which must be one of the device
    /// that has joined.
    unsafe fn all_gather(
        &self,
        from: Address,
        to: Address,
        rows: usize,
        widths: &[usize],
        stream: *mut c_void,
    ) -> Result<(), KernelError> {
        if rows == 0 || widths.iter().all(|width| *width == 0) {
            return Ok(());
        }
        self.call(|raw| {
            if widths.iter().all(|width| *width == widths[self.rank]) {
                // SAFETY: the caller's promise.
                return unsafe { raw.all_gather(from.0, to.0, rows * widths[self.rank], stream) };
            }
            let mut at = to;
            let parts = widths.iter().enumerate().map(|(root, width)| {
                let here = at;
                at = at.offset(rows * width * size_of::<f32>());
                (root, here.0, rows * width)
            });
            // SAFETY: the caller's promise.
            unsafe { raw.broadcasts(from.0, parts.filter(|(_, _, count)| *count > 0), stream) }
        })?;
        self.settle(None)
    }

    /// Gives up; whatever is under way on this rank's device ends.
    fn abort(&self, reason: &str) {
        let mut state = self.state();
        if matches!(*state, State::Open(_))
            && let State::Open(raw) = std::mem::replace(&mut *state, State::Closed(reason.to_owned()))
        {
            raw.abort();
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if let State::Open(raw) = std::mem::replace(&mut *self.state(), State::Closed(String::new())) {
            raw.leave();
        }
    }
}

fn refused(device: &str, error: Refused) -> KernelError {
    match error {
        Refused::Remote(what) => KernelError::Lost {
            what: format!("{device}: another rank is lost: {what}; run the same command again"),
        },
        Refused::Here(what) => KernelError::Device { device: device.to_owned(), what },
    }
}

#[cfg(test)]
#[path = "tests/communicator.rs"]
mod tests;
