//! cuBLASLt, NVIDIA's library of matrix products: a binding of the few calls that a product takes.
//!
//! Of our own for the same reason as NVRTC's: CUDA 12 and CUDA 13 serve alike. Numbers are those of cublasLt.h.
#![expect(unsafe_code, reason = "calls a C library")]

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::ptr;

use super::library::{Found, NotFound, Places, Version, Wanted, search};
use super::nccl::decimal;
use super::nvrtc::{function, open};

type Handle = *mut c_void;
type Opaque = *mut c_void;
type Stream = *mut c_void;

const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const OP_T: c_int = 1;
const DESC_TRANSA: c_int = 3;
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
const PREF_REDUCTION_SCHEME_MASK: c_int = 3;
const PREF_MIN_ALIGNMENT: [c_int; 4] = [5, 6, 7, 8];
const CONFIG_ID: c_int = 0;
const CONFIG_TILE: c_int = 1;
const CONFIG_SPLIT_K: c_int = 2;
const CONFIG_REDUCTION: c_int = 3;
const CONFIG_STAGES: c_int = 6;

/// What addresses and rows of all matrices are aligned to.
pub(super) const ALIGNMENT: u32 = 16;

/// One way to compute a product, as the library describes it: algorithm, tile, stages. No sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Algorithm([u64; 8]);

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Suggestion {
    algorithm: Algorithm,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const NO_SUGGESTION: Suggestion =
    Suggestion { algorithm: Algorithm([0; 8]), workspace: 0, state: -1, waves: 0.0, reserved: [0; 4] };

/// Sizes of a product y[m][n] = x[m][k] * w[n][k]^T.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sizes {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Elements from one row of y to the next.
    pub(super) y_stride: usize,
}

/// The library, not yet on a device.
#[derive(Debug)]
pub(super) struct CublasLt {
    version: Version,
    calls: Calls,
}

#[derive(Clone, Copy, Debug)]
struct Calls {
    create: unsafe extern "C" fn(*mut Handle) -> c_int,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    desc_create: unsafe extern "C" fn(*mut Opaque, c_int, c_int) -> c_int,
    desc_destroy: unsafe extern "C" fn(Opaque) -> c_int,
    desc_set: unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> c_int,
    layout_create: unsafe extern "C" fn(*mut Opaque, c_int, u64, u64, i64) -> c_int,
    layout_destroy: unsafe extern "C" fn(Opaque) -> c_int,
    preference_create: unsafe extern "C" fn(*mut Opaque) -> c_int,
    preference_destroy: unsafe extern "C" fn(Opaque) -> c_int,
    preference_set: unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> c_int,
    heuristic: unsafe extern "C" fn(
        Handle,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        c_int,
        *mut Suggestion,
        *mut c_int,
    ) -> c_int,
    check: unsafe extern "C" fn(
        Handle,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        *const Algorithm,
        *mut Suggestion,
    ) -> c_int,
    config: unsafe extern "C" fn(*const Algorithm, c_int, *mut c_void, usize, *mut usize) -> c_int,
    matmul: unsafe extern "C" fn(
        Handle,
        Opaque,
        *const c_void,
        *const c_void,
        Opaque,
        *const c_void,
        Opaque,
        *const c_void,
        *const c_void,
        Opaque,
        *mut c_void,
        Opaque,
        *const Algorithm,
        *mut c_void,
        usize,
        Stream,
    ) -> c_int,
}

/// Finds the newest that serves a driver of CUDA `major`.
pub(super) fn find(places: &Places, major: u32) -> Result<(CublasLt, Found), NotFound> {
    let wanted = Wanted {
        variable: "CTQ_CUBLASLT",
        name: "libcublasLt.so",
        majors: (12..=major.clamp(12, 99)).rev().collect(),
        component: "cublas",
    };
    search(&wanted, places, |path| {
        let library = CublasLt::load(path)?;
        let version = library.version;
        match version.major <= major {
            true => Ok((library, version)),
            false => Err(format!("it is of CUDA {}, and the driver is of CUDA {major}", version.major)),
        }
    })
}

fn told(result: c_int, call: &str) -> Result<(), String> {
    if result == 0 { Ok(()) } else { Err(format!("{call} fails with {}", status(result))) }
}

/// `cublasStatus_t`.
fn status(result: c_int) -> String {
    match result {
        1 => "CUBLAS_STATUS_NOT_INITIALIZED".to_owned(),
        3 => "CUBLAS_STATUS_ALLOC_FAILED".to_owned(),
        7 => "CUBLAS_STATUS_INVALID_VALUE".to_owned(),
        8 => "CUBLAS_STATUS_ARCH_MISMATCH".to_owned(),
        13 => "CUBLAS_STATUS_EXECUTION_FAILED".to_owned(),
        14 => "CUBLAS_STATUS_INTERNAL_ERROR".to_owned(),
        15 => "CUBLAS_STATUS_NOT_SUPPORTED".to_owned(),
        other => format!("status {other}"),
    }
}

impl CublasLt {
    pub(super) fn load(path: &Path) -> Result<CublasLt, String> {
        let library = open(path)?;
        // SAFETY: the types are those of cublasLt.h, the same in CUDA 12 and 13.
        let (calls, version) = unsafe {
            let calls = Calls {
                create: function(library, "cublasLtCreate")?,
                destroy: function(library, "cublasLtDestroy")?,
                desc_create: function(library, "cublasLtMatmulDescCreate")?,
                desc_destroy: function(library, "cublasLtMatmulDescDestroy")?,
                desc_set: function(library, "cublasLtMatmulDescSetAttribute")?,
                layout_create: function(library, "cublasLtMatrixLayoutCreate")?,
                layout_destroy: function(library, "cublasLtMatrixLayoutDestroy")?,
                preference_create: function(library, "cublasLtMatmulPreferenceCreate")?,
                preference_destroy: function(library, "cublasLtMatmulPreferenceDestroy")?,
                preference_set: function(library, "cublasLtMatmulPreferenceSetAttribute")?,
                heuristic: function(library, "cublasLtMatmulAlgoGetHeuristic")?,
                check: function(library, "cublasLtMatmulAlgoCheck")?,
                config: function(library, "cublasLtMatmulAlgoConfigGetAttribute")?,
                matmul: function(library, "cublasLtMatmul")?,
            };
            let version: unsafe extern "C" fn() -> usize = function(library, "cublasLtGetVersion")?;
            (calls, decimal(version() as u32))
        };
        Ok(CublasLt { version, calls })
    }
}

/// The library on the device whose context is current.
#[derive(Debug)]
pub(super) struct Session {
    library: CublasLt,
    handle: Handle,
    /// `x * w^T` as the library sees it: column-major, y^T = w * x^T.
    product: Opaque,
}

// SAFETY: the library may be called from any thread.
unsafe impl Send for Session {}
// SAFETY: as above; nothing here is changed after it is made.
unsafe impl Sync for Session {}

/// Shapes of the matrices of a product.
#[derive(Debug)]
pub(super) struct Layouts {
    destroy: unsafe extern "C" fn(Opaque) -> c_int,
    w: Opaque,
    x: Opaque,
    y: Opaque,
}

// SAFETY: plain descriptions, which the library only reads.
unsafe impl Send for Layouts {}
// SAFETY: as above.
unsafe impl Sync for Layouts {}

impl Drop for Layouts {
    fn drop(&mut self) {
        for layout in [self.w, self.x, self.y].into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: made once, destroyed once.
            unsafe { (self.destroy)(layout) };
        }
    }
}

/// What an algorithm says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) id: u32,
    pub(super) tile: u32,
    pub(super) stages: u32,
    /// Parts that k is cut into; their sums would be added in an order of their own.
    pub(super) split_k: u32,
    pub(super) reduction: u32,
}

impl Session {
    pub(super) fn new(library: CublasLt) -> Result<Session, String> {
        let mut this = Session { library, handle: ptr::null_mut(), product: ptr::null_mut() };
        let calls = this.library.calls;
        // SAFETY: writes one handle, destroyed when this is dropped.
        told(unsafe { (calls.create)(&raw mut this.handle) }, "cublasLtCreate")?;
        // SAFETY: as above.
        let created = unsafe { (calls.desc_create)(&raw mut this.product, COMPUTE_32F, R_32F) };
        told(created, "cublasLtMatmulDescCreate")?;
        let transposed = OP_T;
        // SAFETY: the attribute is an integer.
        let set = unsafe { (calls.desc_set)(this.product, DESC_TRANSA, (&raw const transposed).cast(), 4) };
        told(set, "cublasLtMatmulDescSetAttribute")?;
        Ok(this)
    }

    pub(super) fn layouts(&self, sizes: Sizes) -> Result<Layouts, String> {
        let calls = self.library.calls;
        let null = ptr::null_mut();
        let mut layouts = Layouts { destroy: calls.layout_destroy, w: null, x: null, y: null };
        let Sizes { m, n, k, y_stride } = sizes;
        for (layout, kind, rows, columns, stride) in [
            (&mut layouts.w, R_16BF, k, n, k),
            (&mut layouts.x, R_16BF, k, m, k),
            (&mut layouts.y, R_32F, n, m, y_stride),
        ] {
            // SAFETY: writes one handle.
            let made =
                unsafe { (calls.layout_create)(layout, kind, rows as u64, columns as u64, stride as i64) };
            told(made, "cublasLtMatrixLayoutCreate")?;
        }
        Ok(layouts)
    }

    /// Ways to compute a product without cutting k, best first.
    pub(super) fn suggestions(&self, layouts: &Layouts, workspace: usize) -> Result<Vec<Algorithm>, String> {
        let calls = self.library.calls;
        let mut preference = ptr::null_mut();
        // SAFETY: writes one handle, destroyed below.
        told(unsafe { (calls.preference_create)(&raw mut preference) }, "cublasLtMatmulPreferenceCreate")?;
        let mut found = [NO_SUGGESTION; 32];
        let mut count: c_int = 0;
        let (none, aligned) = (0_u32, ALIGNMENT);
        // SAFETY: attributes are of these types; as many suggestions as are announced.
        let asked = unsafe {
            let set = |attribute: c_int, value: *const c_void, bytes: usize| {
                let set = (calls.preference_set)(preference, attribute, value, bytes);
                told(set, "cublasLtMatmulPreferenceSetAttribute")
            };
            set(PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)
                .and_then(|()| set(PREF_REDUCTION_SCHEME_MASK, (&raw const none).cast(), 4))
                .and_then(|()| {
                    let aligned = (&raw const aligned).cast();
                    PREF_MIN_ALIGNMENT.iter().try_for_each(|attribute| set(*attribute, aligned, 4))
                })
                .and_then(|()| {
                    let asked = (calls.heuristic)(
                        self.handle,
                        self.product,
                        layouts.w,
                        layouts.x,
                        layouts.y,
                        layouts.y,
                        preference,
                        found.len() as c_int,
                        found.as_mut_ptr(),
                        &raw mut count,
                    );
                    told(asked, "cublasLtMatmulAlgoGetHeuristic")
                })
        };
        // SAFETY: made once, destroyed once.
        unsafe { (calls.preference_destroy)(preference) };
        asked?;
        let usable = found.iter().take(count.max(0) as usize).filter(|suggestion| suggestion.state == 0);
        Ok(usable.map(|suggestion| suggestion.algorithm).collect())
    }

    pub(super) fn config(&self, algorithm: &Algorithm) -> Result<Config, String> {
        let read = |attribute: c_int| {
            let (mut value, mut written) = (0_u32, 0);
            // SAFETY: these attributes are of 32 bits.
            let read = unsafe {
                let to = (&raw mut value).cast();
                (self.library.calls.config)(algorithm, attribute, to, 4, &raw mut written)
            };
            told(read, "cublasLtMatmulAlgoConfigGetAttribute").map(|()| value)
        };
        Ok(Config {
            id: read(CONFIG_ID)?,
            tile: read(CONFIG_TILE)?,
            stages: read(CONFIG_STAGES)?,
            split_k: read(CONFIG_SPLIT_K)?,
            reduction: read(CONFIG_REDUCTION)?,
        })
    }

    /// Whether an algorithm takes these shapes, within `workspace` bytes.
    pub(super) fn takes(&self, algorithm: &Algorithm, layouts: &Layouts, workspace: usize) -> bool {
        let mut result = NO_SUGGESTION;
        // SAFETY: everything is made by this library; writes one result.
        let checked = unsafe {
            (self.library.calls.check)(
                self.handle,
                self.product,
                layouts.w,
                layouts.x,
                layouts.y,
                layouts.y,
                algorithm,
                &raw mut result,
            )
        };
        checked == 0 && result.workspace <= workspace
    }

    /// Queues a product, plus `factor` times what is in `y`. Addresses are [w, x, y].
    ///
    /// # Safety
    /// The addresses must hold matrices of these layouts, and `workspace` its address and bytes, until the stream is
    /// done with it.
    pub(super) unsafe fn multiply(
        &self,
        algorithm: &Algorithm,
        layouts: &Layouts,
        [w, x, y]: [u64; 3],
        factor: f32,
        workspace: (u64, usize),
        stream: *mut c_void,
    ) -> Result<(), String> {
        let one = 1.0_f32;
        let pointer = |address: u64| ptr::without_provenance_mut::<c_void>(address as usize);
        // SAFETY: the caller's promise; factors are read before the call returns.
        let queued = unsafe {
            (self.library.calls.matmul)(
                self.handle,
                self.product,
                (&raw const one).cast(),
                pointer(w),
                layouts.w,
                pointer(x),
                layouts.x,
                (&raw const factor).cast(),
                pointer(y),
                layouts.y,
                pointer(y),
                layouts.y,
                algorithm,
                pointer(workspace.0),
                workspace.1,
                stream,
            )
        };
        told(queued, "cublasLtMatmul")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let calls = self.library.calls;
        // SAFETY: made once, destroyed once.
        unsafe {
            if !self.product.is_null() {
                (calls.desc_destroy)(self.product);
            }
            if !self.handle.is_null() {
                (calls.destroy)(self.handle);
            }
        }
    }
}
