//! NVRTC, NVIDIA's compiler as a library: C++ source to machine code of one target.
//!
//! A binding of our own, because versions of CUDA 12 and of CUDA 13 serve alike and are loaded from wherever they are
//! found. Knows how to call the library, not what is compiled.
#![expect(unsafe_code, reason = "calls a C library")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::DirEntry;
use std::path::Path;
use std::ptr;

use libloading::Library;

use super::library::{Found, NotFound, Places, Version, Wanted, search};
use super::sources::Source;

type Program = *mut c_void;

/// A loaded NVRTC.
#[derive(Debug)]
pub(super) struct Nvrtc {
    pub(super) version: Version,
    /// Targets it compiles for, such as 80 and 90.
    pub(super) targets: Vec<u32>,
    calls: Calls,
}

#[derive(Clone, Copy, Debug)]
struct Calls {
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
}

/// A function of a library.
///
/// # Safety
/// `F` must be the type of the function of that name.
pub(super) unsafe fn function<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
    // SAFETY: the caller's promise.
    let symbol = unsafe { library.get::<F>(name.as_bytes()) };
    symbol.map(|symbol| *symbol).map_err(|_| format!("it has no function `{name}`"))
}

/// Opens a library by its path or name, for as long as the process runs: NVIDIA's libraries keep state and threads of
/// their own, and functions of theirs may be called late.
pub(super) fn open(path: &Path) -> Result<&'static Library, String> {
    // SAFETY: what runs when NVIDIA's libraries are loaded expects nothing of the process.
    let library = unsafe { Library::new(path) }.map(|library| &*Box::leak(Box::new(library)));
    library.map_err(|error| match std::error::Error::source(&error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    })
}

impl Nvrtc {
    /// Finds the newest that serves a driver of CUDA `major`: what a newer one makes, the driver refuses.
    pub(super) fn find(places: &Places, major: u32) -> Result<(Nvrtc, Found), NotFound> {
        search(&wanted(major), places, |path| {
            let nvrtc = Nvrtc::load(path)?;
            let version = nvrtc.version;
            match version.major <= major {
                true => Ok((nvrtc, version)),
                false => Err(format!("it is of CUDA {version}, and the driver is of CUDA {major}")),
            }
        })
    }

    /// Loads the library at a path.
    pub(super) fn load(path: &Path) -> Result<Nvrtc, String> {
        load_builtins(path);
        let library = open(path)?;
        // SAFETY: the types are those of nvrtc.h, the same in all versions from CUDA 12 on.
        let (calls, version, count, list) = unsafe {
            let calls = Calls {
                error_string: function(library, "nvrtcGetErrorString")?,
                create: function(library, "nvrtcCreateProgram")?,
                destroy: function(library, "nvrtcDestroyProgram")?,
                compile: function(library, "nvrtcCompileProgram")?,
                log_size: function(library, "nvrtcGetProgramLogSize")?,
                log: function(library, "nvrtcGetProgramLog")?,
                cubin_size: function(library, "nvrtcGetCUBINSize")?,
                cubin: function(library, "nvrtcGetCUBIN")?,
            };
            type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
            type One = unsafe extern "C" fn(*mut c_int) -> c_int;
            let version: Version = function(library, "nvrtcVersion")?;
            let count: One = function(library, "nvrtcGetNumSupportedArchs")?;
            let list: One = function(library, "nvrtcGetSupportedArchs")?;
            (calls, version, count, list)
        };
        let (mut major, mut minor, mut known) = (0, 0, 0);
        // SAFETY: pointers to as many integers as the functions write.
        calls.check(unsafe { version(&raw mut major, &raw mut minor) }, "nvrtcVersion")?;
        // SAFETY: as above.
        calls.check(unsafe { count(&raw mut known) }, "nvrtcGetNumSupportedArchs")?;
        let mut targets = vec![0; known.max(0) as usize];
        // SAFETY: as above.
        calls.check(unsafe { list(targets.as_mut_ptr()) }, "nvrtcGetSupportedArchs")?;
        Ok(Nvrtc {
            version: Version { major: major as u32, minor: minor as u32, patch: None },
            targets: targets.into_iter().map(|target| target as u32).collect(),
            calls,
        })
    }

    /// Compiles a source file to a CUBIN. Files that it includes are taken from `headers`, by their names.
    pub(super) fn compile(
        &self,
        source: Source,
        headers: &[Source],
        options: &[String],
    ) -> Result<Vec<u8>, String> {
        let text = |text: &str| CString::new(text).map_err(|_| format!("{}: a zero byte", source.name));
        let texts = |texts: Vec<&str>| texts.into_iter().map(text).collect::<Result<Vec<CString>, String>>();
        let (code, name) = (text(source.text)?, text(source.name)?);
        let contents = texts(headers.iter().map(|header| header.text).collect())?;
        let names = texts(headers.iter().map(|header| header.name).collect())?;
        let options = texts(options.iter().map(String::as_str).collect())?;
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (contents, names, option_pointers) = (pointers(&contents), pointers(&names), pointers(&options));

        let mut program = Running { calls: self.calls, program: ptr::null_mut() };
        // SAFETY: C strings that live until the end of this function, and as many headers as are announced.
        let created = unsafe {
            (self.calls.create)(
                &raw mut program.program,
                code.as_ptr(),
                name.as_ptr(),
                names.len() as c_int,
                contents.as_ptr(),
                names.as_ptr(),
            )
        };
        self.calls.check(created, "nvrtcCreateProgram")?;
        // SAFETY: the program is there; as many options as are announced.
        let compiled = unsafe {
            (self.calls.compile)(program.program, options.len() as c_int, option_pointers.as_ptr())
        };
        self.calls.check(compiled, "nvrtcCompileProgram").map_err(|error| match program.log() {
            log if log.is_empty() => format!("{}: {error}", source.name),
            log => format!("{}: {error}: {log}", source.name),
        })?;
        program.cubin().map_err(|error| format!("{}: {error}", source.name))
    }
}

/// Versions for a driver of CUDA `major`, newest first. CUDA 11 knows neither Hopper nor what follows.
fn wanted(major: u32) -> Wanted {
    Wanted {
        variable: "CTQ_NVRTC",
        name: "libnvrtc.so",
        majors: (12..=major.clamp(12, 99)).rev().collect(),
        component: "cuda_nvrtc",
    }
}

/// Loads the library that NVRTC looks up by name when it compiles, from beside NVRTC: outside the loader's path it would
/// not find it.
fn load_builtins(path: &Path) {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let (Some(folder), Some(version)) = (path.parent(), name.strip_prefix("libnvrtc.so")) else { return };
    let start = format!("libnvrtc-builtins.so{version}");
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let fits = |entry: &DirEntry| entry.file_name().to_string_lossy().starts_with(&start);
    if let Some(entry) = entries.filter(fits).max_by_key(DirEntry::file_name) {
        // Where this fails, NVRTC says what it misses.
        let _ = open(&entry.path());
    }
}

impl Calls {
    fn check(&self, result: c_int, call: &str) -> Result<(), String> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: takes any number and gives a string that lives as long as the library.
        let text = unsafe { CStr::from_ptr((self.error_string)(result)) };
        Err(format!("{call}: {}", text.to_string_lossy()))
    }
}

/// A program that is destroyed in the end.
struct Running {
    calls: Calls,
    program: Program,
}

impl Running {
    /// What the compiler said.
    fn log(&self) -> String {
        let mut bytes = 0;
        // SAFETY: the program is there.
        if unsafe { (self.calls.log_size)(self.program, &raw mut bytes) } != 0 || bytes == 0 {
            return String::new();
        }
        let mut log = vec![0_u8; bytes];
        // SAFETY: as many bytes as were announced.
        if unsafe { (self.calls.log)(self.program, log.as_mut_ptr().cast()) } != 0 {
            return String::new();
        }
        String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned()
    }

    fn cubin(&self) -> Result<Vec<u8>, String> {
        let mut bytes = 0;
        // SAFETY: the program is there.
        let size = unsafe { (self.calls.cubin_size)(self.program, &raw mut bytes) };
        self.calls.check(size, "nvrtcGetCUBINSize")?;
        let mut cubin = vec![0_u8; bytes];
        // SAFETY: as many bytes as were announced.
        let copied = unsafe { (self.calls.cubin)(self.program, cubin.as_mut_ptr().cast()) };
        self.calls.check(copied, "nvrtcGetCUBIN")?;
        Ok(cubin)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: made by this library and destroyed once.
            unsafe { (self.calls.destroy)(&raw mut self.program) };
        }
    }
}
