//! NCCL, NVIDIA's library of collectives: whether it is there, and its version. Nothing uses it yet.
#![expect(unsafe_code, reason = "calls a C library")]

use std::ffi::c_int;

use super::library::{Found, NotFound, Places, Version, Wanted, search};
use super::nvrtc::{function, open};

/// Finds it.
pub(super) fn find(places: &Places) -> Result<Found, NotFound> {
    let wanted = Wanted { variable: "CTQ_NCCL", name: "libnccl.so", majors: vec![2], component: "nccl" };
    let found = search(&wanted, places, |path| {
        let library = open(path)?;
        type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
        // SAFETY: the type of nccl.h.
        let version: GetVersion = unsafe { function(library, "ncclGetVersion")? };
        let mut code = 0;
        // SAFETY: writes one integer.
        match unsafe { version(&raw mut code) } {
            // From 2.9 on.
            0 if code >= 20_000 => Ok(((), decimal(code as u32))),
            0 => Err(format!("it is too old (version code {code})")),
            error => Err(format!("ncclGetVersion fails with {error}")),
        }
    });
    found.map(|((), found)| found)
}

/// `major * 10000 + minor * 100 + patch`, as NCCL and cuBLASLt give their versions.
pub(super) fn decimal(code: u32) -> Version {
    Version { major: code / 10_000, minor: code / 100 % 100, patch: Some(code % 100) }
}
