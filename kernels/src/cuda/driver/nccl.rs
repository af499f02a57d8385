//! NCCL, NVIDIA's library of collectives: a binding of the few calls that putting activations side by side takes.
//!
//! Of our own because cudarc's never looks for `libnccl.so.2`, the only name that packages give it. Types and numbers are
//! those of nccl.h, the same in all versions from 2.14 on. Knows how to call the library, not what is sent.
#![expect(unsafe_code, reason = "calls a C library")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::path::Path;
use std::ptr;

use super::library::{Found, NotFound, Places, Version, Wanted, search};
use super::nvrtc::{function, open};

/// The first whose communicators need not block.
const OLDEST: c_int = 21_400;

/// What calls return.
const SUCCESS: c_int = 0;
const REMOTE_ERROR: c_int = 6;
const IN_PROGRESS: c_int = 7;

const FLOAT_32: c_int = 7;

type Handle = *mut c_void;
type Stream = *mut c_void;

/// What ranks recognise one another by; made by one of them.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId([u8; UniqueId::BYTES]);

impl UniqueId {
    /// Bytes of one.
    pub const BYTES: usize = 128;

    /// One that came from another rank.
    pub const fn from_bytes(bytes: [u8; UniqueId::BYTES]) -> UniqueId {
        UniqueId(bytes)
    }

    /// To hand to other ranks.
    pub const fn bytes(&self) -> [u8; UniqueId::BYTES] {
        self.0
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UniqueId").finish_non_exhaustive()
    }
}

/// `ncclConfig_t` as it was in 2.14, which later versions take: what they have more stays at their defaults.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    /// Not set.
    rest: c_int,
}

const NON_BLOCKING: Config = Config {
    size: size_of::<Config>(),
    magic: 0xcafe_beef,
    version: OLDEST as c_uint,
    blocking: 0,
    rest: c_int::MIN,
};

/// The library, not yet on a device.
#[derive(Clone, Copy, Debug)]
pub struct NcclLibrary {
    version: Version,
    calls: Calls,
}

#[derive(Clone, Copy, Debug)]
struct Calls {
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    abort: unsafe extern "C" fn(Handle) -> c_int,
    async_error: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> c_int,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> c_int,
}

/// Finds it.
pub(super) fn find(places: &Places) -> Result<Found, NotFound> {
    let wanted = Wanted { variable: "CTQ_NCCL", name: "libnccl.so", majors: vec![2], component: "nccl" };
    let found = search(&wanted, places, |path| NcclLibrary::load(path).map(|library| ((), library.version)));
    found.map(|((), found)| found)
}

/// `major * 10000 + minor * 100 + patch`, as NCCL and cuBLASLt give their versions.
pub(super) fn decimal(code: u32) -> Version {
    Version { major: code / 10_000, minor: code / 100 % 100, patch: Some(code % 100) }
}

/// What a call was refused with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// Another rank is lost.
    #[error("{0}")]
    Remote(String),
    /// Anything else.
    #[error("{0}")]
    Here(String),
}

impl NcclLibrary {
    /// Loads the library at a path, such as that of [`Machine::nccl`](super::Machine::nccl).
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn load(path: &Path) -> Result<NcclLibrary, String> {
        let library = open(path)?;
        type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
        // SAFETY: the type of nccl.h.
        let version: GetVersion = unsafe { function(library, "ncclGetVersion")? };
        let mut code = 0;
        // SAFETY: writes one integer.
        match unsafe { version(&raw mut code) } {
            SUCCESS if code >= OLDEST => {}
            // Before 2.9 the code was made in another way, and smaller.
            SUCCESS => return Err(format!("it is older than 2.14 (version code {code})")),
            error => return Err(format!("ncclGetVersion fails with {error}")),
        }
        // SAFETY: the types are those of nccl.h.
        let calls = unsafe {
            Calls {
                error_string: function(library, "ncclGetErrorString")?,
                unique_id: function(library, "ncclGetUniqueId")?,
                init: function(library, "ncclCommInitRankConfig")?,
                destroy: function(library, "ncclCommDestroy")?,
                abort: function(library, "ncclCommAbort")?,
                async_error: function(library, "ncclCommGetAsyncError")?,
                group_start: function(library, "ncclGroupStart")?,
                group_end: function(library, "ncclGroupEnd")?,
                all_gather: function(library, "ncclAllGather")?,
                broadcast: function(library, "ncclBroadcast")?,
            }
        };
        Ok(NcclLibrary { version: decimal(code as u32), calls })
    }

    /// What it says of itself.
    pub fn version(&self) -> Version {
        self.version
    }

    /// A new id, for all ranks of one communicator. Needs no device.
    ///
    /// # Errors
    /// Where the library finds no network interface to meet on.
    pub fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId([0; UniqueId::BYTES]);
        // SAFETY: writes as many bytes.
        let made = unsafe { (self.calls.unique_id)(&raw mut id) };
        self.check(made, "ncclGetUniqueId").map(|()| id).map_err(|refused| refused.to_string())
    }

    /// What a call returned; whatever is still in progress is no error.
    fn check(&self, result: c_int, call: &str) -> Result<(), Refused> {
        if matches!(result, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: returns a C string that lives as long as the library.
        let text = unsafe { CStr::from_ptr((self.calls.error_string)(result)) };
        let what = format!("NCCL {}: {call}: {}", self.version, text.to_string_lossy());
        Err(if result == REMOTE_ERROR { Refused::Remote(what) } else { Refused::Here(what) })
    }
}

/// A rank's place among others, as the library knows it. No call on it blocks; after each that is not of its end,
/// [`RawCommunicator::settled`] says when its work is queued.
#[derive(Debug)]
pub(super) struct RawCommunicator {
    library: NcclLibrary,
    handle: Handle,
}

// SAFETY: a communicator may be used from any thread, by one at a time.
unsafe impl Send for RawCommunicator {}

impl RawCommunicator {
    /// Begins to join, as rank `rank` of `ranks`, with the device whose context is current to this thread.
    pub(super) fn join(
        library: NcclLibrary,
        id: UniqueId,
        rank: usize,
        ranks: usize,
    ) -> Result<RawCommunicator, Refused> {
        let mut config = NON_BLOCKING;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle, and reads a configuration of the size that it tells.
        let begun = unsafe {
            (library.calls.init)(&raw mut handle, ranks as c_int, id, rank as c_int, &raw mut config)
        };
        library.check(begun, "ncclCommInitRankConfig")?;
        Ok(RawCommunicator { library, handle })
    }

    /// Whether all that was begun is done, or queued.
    pub(super) fn settled(&self) -> Result<bool, Refused> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is there; writes one integer.
        let asked = unsafe { (self.library.calls.async_error)(self.handle, &raw mut state) };
        self.library.check(asked, "ncclCommGetAsyncError")?;
        self.library.check(state, "joining or gathering")?;
        Ok(state == SUCCESS)
    }

    /// `count` f32 of each rank, in the order of ranks.
    ///
    /// # Safety
    /// `from` must hold `count` numbers and `to` as many of each rank until the stream has come by, which must be one of
    /// the device that has joined.
    pub(super) unsafe fn all_gather(
        &self,
        from: u64,
        to: u64,
        count: usize,
        stream: Stream,
    ) -> Result<(), Refused> {
        // SAFETY: the caller's promise.
        let queued = unsafe {
            let (from, to) = (from as *const c_void, to as *mut c_void);
            (self.library.calls.all_gather)(from, to, count, FLOAT_32, self.handle, stream)
        };
        self.library.check(queued, "ncclAllGather")
    }

    /// Broadcasts that the library runs as one: of each its root, address on this rank and count of f32.
    ///
    /// # Safety
    /// `from`, for this rank's own, and every address must hold as many numbers as are said until the stream has come by,
    /// which must be one of the device that has joined.
    pub(super) unsafe fn broadcasts(
        &self,
        from: u64,
        broadcasts: impl Iterator<Item = (usize, u64, usize)>,
        stream: Stream,
    ) -> Result<(), Refused> {
        let Calls { group_start, group_end, broadcast, .. } = self.library.calls;
        // SAFETY: ended below, on this thread.
        self.library.check(unsafe { group_start() }, "ncclGroupStart")?;
        let mut queued = Ok(());
        for (root, to, count) in broadcasts {
            // SAFETY: the caller's promise. Where this rank is not the root, `from` is not read.
            let result = unsafe {
                let (from, to) = (from as *const c_void, to as *mut c_void);
                broadcast(from, to, count, FLOAT_32, root as c_int, self.handle, stream)
            };
            queued = queued.and(self.library.check(result, "ncclBroadcast"));
        }
        // SAFETY: begun above. Ended after an error too, which else would last.
        let ended = self.library.check(unsafe { group_end() }, "ncclGroupEnd");
        queued.and(ended)
    }

    /// Leaves, when all that was queued is done.
    pub(super) fn leave(self) {
        // SAFETY: ended once. Nothing can be done about a failure.
        let _ = unsafe { (self.library.calls.destroy)(self.handle) };
    }

    /// Ends what is under way on this rank's device, and leaves.
    pub(super) fn abort(self) {
        // SAFETY: ended once. Nothing can be done about a failure.
        let _ = unsafe { (self.library.calls.abort)(self.handle) };
    }
}

#[cfg(test)]
#[path = "tests/nccl.rs"]
mod tests;
