//! A device's context, streams and events, and what the driver's errors are called. Knows no kernels and no memory.
#![expect(unsafe_code, reason = "calls the driver")]

use std::ffi::{CStr, c_char};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUevent, CUresult, CUstream};

use super::machine::DeviceInfo;
use crate::KernelError;

/// Name and text of an error.
pub(super) fn describe(error: CUresult) -> String {
    let text = |call: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = ptr::null();
        // SAFETY: writes a pointer to a C string that lives as long as the driver, or null.
        unsafe {
            let found = call(error, &raw mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
            found.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("error {}", error as u32));
    text(sys::cuGetErrorString).map_or_else(|| name.clone(), |text| format!("{name} ({text})"))
}

/// The primary context of a device.
#[derive(Debug)]
pub(super) struct Context {
    /// For people: `cuda:0 (NVIDIA H200)`.
    pub(super) name: String,
    pub(super) device: CUdevice,
    context: CUcontext,
}

// SAFETY: a context may be current to any number of threads.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains it.
    pub(super) fn new(device: &DeviceInfo) -> Result<Context, KernelError> {
        let name = format!("cuda:{} ({})", device.ordinal, device.name);
        let mut this = Context { name, device: 0, context: ptr::null_mut() };
        // SAFETY: any thread may call it, any number of times.
        this.check(unsafe { sys::cuInit(0) }, "cuInit")?;
        // SAFETY: writes one handle.
        let found = unsafe { sys::cuDeviceGet(&raw mut this.device, device.ordinal as i32) };
        this.check(found, "cuDeviceGet")?;
        let mut context = ptr::null_mut();
        // SAFETY: writes one handle, which is released when this is dropped.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, this.device) };
        this.check(retained, "cuDevicePrimaryCtxRetain")?;
        this.context = context;
        this.bind()?;
        Ok(this)
    }

    /// An error of this device.
    pub(super) fn error(&self, what: String) -> KernelError {
        KernelError::Device { device: self.name.clone(), what }
    }

    /// An error of the driver, and what it came up in.
    pub(super) fn check(&self, result: CUresult, call: &str) -> Result<(), KernelError> {
        match result {
            CUresult::CUDA_SUCCESS => Ok(()),
            error => Err(self.error(format!("{call}: {}", describe(error)))),
        }
    }

    /// Makes it current to this thread, which every other call needs.
    pub(super) fn bind(&self) -> Result<(), KernelError> {
        // SAFETY: the context is retained.
        self.check(unsafe { sys::cuCtxSetCurrent(self.context) }, "cuCtxSetCurrent")
    }

    /// The context, as calls about two devices take it.
    pub(super) fn raw(&self) -> CUcontext {
        self.context
    }

    /// Free memory, and all of it, in bytes.
    pub(super) fn memory(&self) -> Result<(u64, u64), KernelError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        self.check(unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }, "cuMemGetInfo")?;
        Ok((free as u64, total as u64))
    }

    /// An attribute of the device.
    pub(super) fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32, KernelError> {
        let mut value = 0;
        // SAFETY: writes one integer.
        let read = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.device) };
        self.check(read, "cuDeviceGetAttribute")?;
        Ok(value)
    }

    /// What no other GPU of any machine has, in hexadecimal; parts of one GPU have the same.
    pub(super) fn identifier(&self) -> Result<String, KernelError> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: writes 16 bytes.
        let read = unsafe { sys::cuDeviceGetUuid(&raw mut uuid, self.device) };
        self.check(read, "cuDeviceGetUuid")?;
        Ok(uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if !self.context.is_null() {
            // SAFETY: retained once, released once. Nothing can be done about a failure.
            let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}

/// Work in order, beside that of other streams.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) context: Arc<Context>,
    pub(super) raw: CUstream,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// One that waits for no other by itself.
    pub(super) fn new(context: &Arc<Context>) -> Result<Stream, KernelError> {
        context.bind()?;
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle, which is destroyed when this is dropped.
        context.check(unsafe { sys::cuStreamCreate(&raw mut raw, flags) }, "cuStreamCreate")?;
        Ok(Stream { context: Arc::clone(context), raw })
    }

    /// Waits until everything that was queued is done.
    pub(super) fn synchronize(&self) -> Result<(), KernelError> {
        self.context.bind()?;
        // SAFETY: the stream is there.
        self.context.check(unsafe { sys::cuStreamSynchronize(self.raw) }, "cuStreamSynchronize")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: destroyed once; work that is queued is still done. Nothing can be done about a failure.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A place in a stream.
#[derive(Debug)]
pub(super) struct Event {
    context: Arc<Context>,
    raw: CUevent,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(context: &Arc<Context>) -> Result<Event, KernelError> {
        context.bind()?;
        let mut raw = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes one handle, which is destroyed when this is dropped.
        context.check(unsafe { sys::cuEventCreate(&raw mut raw, flags) }, "cuEventCreate")?;
        Ok(Event { context: Arc::clone(context), raw })
    }

    /// Marks what is queued on a stream so far.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), KernelError> {
        // SAFETY: both are of the same context.
        self.context.check(unsafe { sys::cuEventRecord(self.raw, stream.raw) }, "cuEventRecord")
    }

    /// Lets a stream, of this or another device, wait for what was marked.
    pub(super) fn hold(&self, stream: &Stream) -> Result<(), KernelError> {
        // SAFETY: both are there.
        stream.context.check(unsafe { sys::cuStreamWaitEvent(stream.raw, self.raw, 0) }, "cuStreamWaitEvent")
    }

    /// Waits here for what was marked.
    pub(super) fn wait(&self) -> Result<(), KernelError> {
        // SAFETY: the event is there.
        self.context.check(unsafe { sys::cuEventSynchronize(self.raw) }, "cuEventSynchronize")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: destroyed once. Nothing can be done about a failure.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

/// Lets streams follow one another.
#[derive(Debug)]
pub(super) struct Order {
    /// Recorded and waited for in one go, so that one event serves all pairs.
    event: Mutex<Event>,
}

impl Order {
    pub(super) fn new(context: &Arc<Context>) -> Result<Order, KernelError> {
        Ok(Order { event: Mutex::new(Event::new(context)?) })
    }

    /// What is queued on `later` from now on waits for all that is queued on `earlier` so far.
    pub(super) fn follow(&self, later: &Stream, earlier: &Stream) -> Result<(), KernelError> {
        later.context.bind()?;
        let event = self.event.lock().unwrap_or_else(PoisonError::into_inner);
        event.record(earlier)?;
        event.hold(later)
    }
}
