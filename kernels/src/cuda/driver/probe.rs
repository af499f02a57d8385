//! The only door to CUDA: asks the driver and looks for libraries. Makes no context on a device, and never panics.
#![expect(unsafe_code, reason = "calls the driver")]

use std::ffi::{CStr, c_int};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

use super::compile;
use super::context::{Context, describe};
use super::cublaslt;
use super::library::{Places, Version};
use super::machine::{DeviceInfo, Driver, Machine, Survey, WhyNot};
use super::nccl;
use super::nvrtc::Nvrtc;

/// First CUDA whose drivers serve, and newest that libraries are looked for where there is no driver to go by.
const OLDEST: Version = Version { major: 12, minor: 0, patch: None };
const NEWEST_MAJOR: u32 = 13;

/// The machine, if a device of it can be used.
///
/// # Errors
/// Why not, and what would help.
pub fn probe() -> Result<Machine, WhyNot> {
    survey().machine()
}

/// Everything that there is, whether or not it can be used.
pub fn survey() -> Survey {
    // cudarc panics where the library or a function of it is missing. Both are checked before; should a driver lack
    // something all the same, that is a driver which does not work, and no reason for ctq to end.
    let driver = catch_unwind(driver).unwrap_or_else(|_| {
        Err(WhyNot::DriverFailed { what: "it lacks a function that ctq calls".to_owned() })
    });
    let major = driver.as_ref().map_or(NEWEST_MAJOR, |driver| driver.cuda.major);
    let places = Places::of_this_machine();
    let (nvrtc, nvrtc_targets) = match Nvrtc::find(&places, major) {
        Ok((nvrtc, found)) => (Ok(found), nvrtc.targets),
        Err(missing) => (Err(missing), Vec::new()),
    };
    Survey {
        driver,
        nvrtc,
        nvrtc_targets,
        cublaslt: cublaslt::find(&places, major).map(|(_, found)| found),
        nccl: nccl::find(&places),
        prebuilt: compile::prebuilt_targets(),
    }
}

/// Free memory of a device in bytes. Makes a context on it, which takes a moment and some memory.
///
/// # Errors
/// Where the device fails; says how.
pub fn free_memory(machine: &Machine, ordinal: usize) -> Result<u64, String> {
    let (device, _) = machine.device(ordinal).map_err(|error| error.to_string())?;
    let read = || Context::new(device)?.memory().map(|(free, _)| free);
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(_) => Err("the driver lacks a function that ctq calls".to_owned()),
    }
}

fn driver() -> Result<Driver, WhyNot> {
    // SAFETY: loads the driver's library, as every program that uses CUDA does.
    if !unsafe { sys::is_culib_present() } {
        return Err(no_library());
    }
    let call = |result: CUresult, what: &str| match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        CUresult::CUDA_ERROR_NO_DEVICE => Err(no_device()),
        // The library that toolkits bring for linking.
        CUresult::CUDA_ERROR_STUB_LIBRARY => Err(no_library()),
        error => Err(WhyNot::DriverFailed { what: format!("{what}: {}", describe(error)) }),
    };
    let mut version: c_int = 0;
    // SAFETY: writes one integer; needs no initialisation.
    call(unsafe { sys::cuDriverGetVersion(&raw mut version) }, "cuDriverGetVersion")?;
    let version = version.unsigned_abs();
    let cuda = Version { major: version / 1000, minor: version % 1000 / 10, patch: None };
    // SAFETY: any thread may call it, any number of times.
    call(unsafe { sys::cuInit(0) }, "cuInit")?;
    let mut count: c_int = 0;
    // SAFETY: writes one integer.
    call(unsafe { sys::cuDeviceGetCount(&raw mut count) }, "cuDeviceGetCount")?;
    if count <= 0 {
        return Err(no_device());
    }
    if cuda < OLDEST {
        return Err(WhyNot::DriverTooOld { cuda });
    }
    let devices = (0..count).map(|ordinal| device(ordinal, count, &call)).collect::<Result<_, WhyNot>>()?;
    Ok(Driver { cuda, release: release(), devices })
}

fn device(
    ordinal: c_int,
    count: c_int,
    call: &dyn Fn(CUresult, &str) -> Result<(), WhyNot>,
) -> Result<DeviceInfo, WhyNot> {
    let mut device = 0;
    // SAFETY: writes one handle.
    call(unsafe { sys::cuDeviceGet(&raw mut device, ordinal) }, "cuDeviceGet")?;
    let mut name = [0_u8; 256];
    // SAFETY: writes a C string of at most the length that is given.
    call(unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 256, device) }, "cuDeviceGetName")?;
    let name =
        CStr::from_bytes_until_nul(&name).map_or_else(|_| String::new(), |n| n.to_string_lossy().into());
    let mut memory = 0;
    // SAFETY: writes one number.
    call(unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) }, "cuDeviceTotalMem")?;
    let attribute = |attribute: CUdevice_attribute| {
        let mut value: c_int = 0;
        // SAFETY: writes one integer.
        let read = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) };
        call(read, "cuDeviceGetAttribute")?;
        Ok(value.unsigned_abs())
    };
    let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let mut peers = Vec::new();
    for other in (0..count).filter(|other| *other != ordinal) {
        let (mut peer, mut can) = (0, 0);
        // SAFETY: writes one handle.
        call(unsafe { sys::cuDeviceGet(&raw mut peer, other) }, "cuDeviceGet")?;
        // SAFETY: writes one integer.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, device, peer) };
        call(asked, "cuDeviceCanAccessPeer")?;
        if can != 0 {
            peers.push(other as usize);
        }
    }
    let memory = memory as u64;
    Ok(DeviceInfo {
        ordinal: ordinal as usize,
        name,
        capability: (major, minor),
        memory,
        multiprocessors,
        peers,
    })
}

fn no_device() -> WhyNot {
    WhyNot::NoDevice { visible: std::env::var("CUDA_VISIBLE_DEVICES").ok() }
}

/// What the lack of libcuda means: a device's file says that there is a GPU to be used.
fn no_library() -> WhyNot {
    let device = (0..16).map(|n| format!("/dev/nvidia{n}")).find(|file| fs::exists(file).unwrap_or(false));
    match device {
        Some(device) => WhyNot::NoDriverLibrary { device },
        None => WhyNot::NoDriver { module_loaded: fs::exists("/proc/driver/nvidia").unwrap_or(false) },
    }
}

/// The driver's own version, as its kernel module tells it.
fn release() -> Option<String> {
    let text = fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let number = |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
    text.lines().next()?.split_whitespace().find(number).map(str::to_owned)
}
