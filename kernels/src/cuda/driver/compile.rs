//! Machine code for the kernels of one device: built into ctq, from the cache, or compiled now.

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::architecture;
use super::cubin_cache::{self, CubinCache};
use super::nvrtc::Nvrtc;
use super::sources::{HEADERS, Source};

/// Machine code that is built in: unit, target, CUBIN.
#[cfg(feature = "prebuilt")]
const PREBUILT: &[(&str, &str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/prebuilt.rs"));
#[cfg(not(feature = "prebuilt"))]
const PREBUILT: &[(&str, &str, &[u8])] = &[];

/// Targets that are built in.
pub(super) fn prebuilt_targets() -> Vec<String> {
    let mut targets: Vec<String> = PREBUILT.iter().map(|(_, target, _)| (*target).to_owned()).collect();
    targets.sort();
    targets.dedup();
    targets
}

/// The best built-in target for a device.
pub(super) fn prebuilt_for(capability: (u32, u32), targets: &[String]) -> Option<String> {
    architecture::targets(capability).into_iter().find(|target| targets.contains(target))
}

/// How the kernels are compiled: NUMERICS.md needs sums and products rounded one by one.
pub(super) fn options(target: &str) -> Vec<String> {
    let architecture = format!("--gpu-architecture={target}");
    [&architecture, "--std=c++17", "--fmad=false", "-default-device"].map(str::to_owned).to_vec()
}

/// Where machine code comes from.
#[derive(Debug)]
pub(super) enum Code {
    /// It is built in.
    Prebuilt {
        /// For this target.
        target: String,
    },
    /// NVRTC makes it.
    Compiled {
        /// For this target.
        target: String,
        /// The compiler.
        nvrtc: Nvrtc,
        /// Where results are kept.
        cache: Option<CubinCache>,
    },
}

/// Gives machine code, and remembers what people should know of how it came about.
#[derive(Debug)]
pub(super) struct Compiler {
    code: Code,
    notes: Mutex<Vec<String>>,
}

impl Compiler {
    pub(super) fn prebuilt(target: String) -> Compiler {
        Compiler { code: Code::Prebuilt { target }, notes: Mutex::default() }
    }

    /// With a folder to keep results in, or without.
    pub(super) fn nvrtc(target: String, nvrtc: Nvrtc, cache: Option<&Path>) -> Compiler {
        let cache = cache.map(CubinCache::new);
        Compiler { code: Code::Compiled { target, nvrtc, cache }, notes: Mutex::default() }
    }

    /// What machine code is made for, such as `sm_90a`.
    pub(super) fn target(&self) -> &str {
        match &self.code {
            Code::Prebuilt { target } | Code::Compiled { target, .. } => target,
        }
    }

    /// Machine code of a unit.
    pub(super) fn cubin(&self, unit: Source) -> Result<Cow<'static, [u8]>, String> {
        match &self.code {
            Code::Prebuilt { target } => PREBUILT
                .iter()
                .find(|(name, of, _)| *name == unit.name && of == target)
                .map(|(_, _, cubin)| Cow::Borrowed(*cubin))
                .ok_or_else(|| format!("{} is not built in for {target}", unit.name)),
            Code::Compiled { target, nvrtc, cache } => {
                let options = options(target);
                let Some(cache) = cache else {
                    return nvrtc.compile(unit, HEADERS, &options).map(Cow::Owned);
                };
                let key = key(unit, &options, nvrtc);
                if let Some(cubin) = cache.load(&key) {
                    return Ok(Cow::Owned(cubin));
                }
                let cubin = nvrtc.compile(unit, HEADERS, &options)?;
                if let Err(error) = cache.store(&key, &cubin) {
                    self.note(format!("compiled kernels cannot be kept for the next run: {error}"));
                }
                Ok(Cow::Owned(cubin))
            }
        }
    }

    fn note(&self, text: String) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if !notes.contains(&text) {
            notes.push(text);
        }
    }

    /// What there is to tell since this was asked last.
    pub(super) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The name of a unit's machine code: everything it depends on.
fn key(unit: Source, options: &[String], nvrtc: &Nvrtc) -> String {
    let version = nvrtc.version.to_string();
    let mut parts: Vec<&[u8]> = vec![unit.name.as_bytes(), unit.text.as_bytes(), version.as_bytes()];
    for header in HEADERS {
        parts.extend([header.name.as_bytes(), header.text.as_bytes()]);
    }
    parts.extend(options.iter().map(|option| option.as_bytes()));
    cubin_cache::key(&parts)
}

#[cfg(test)]
#[path = "tests/compile.rs"]
mod tests;
