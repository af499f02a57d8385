//! Kernels by their names: a file's machine code is made and loaded when the first of its kernels is asked for.
#![expect(unsafe_code, reason = "calls the driver")]

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult};
use rayon::prelude::*;

use super::compile::Compiler;
use super::context::Context;
use super::sources::{UNITS, units_of};
use crate::KernelError;

/// Dynamic shared memory that a kernel may have without asking for it.
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;

/// A kernel that is ready to be launched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    pub(super) function: CUfunction,
    /// Threads of a block.
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared: u32,
}

// SAFETY: functions may be launched from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// The kernels of a device.
#[derive(Debug)]
pub(super) struct KernelTable {
    context: Arc<Context>,
    pub(super) compiler: Compiler,
    /// One a unit, once it is loaded.
    modules: Vec<Mutex<Option<Module>>>,
    /// What was asked for already. Only looked up, never walked.
    known: RwLock<HashMap<&'static str, Kernel>>,
}

#[derive(Debug)]
struct Module(CUmodule);

// SAFETY: modules may be used from any thread.
unsafe impl Send for Module {}

impl KernelTable {
    pub(super) fn new(context: &Arc<Context>, compiler: Compiler) -> KernelTable {
        let modules = UNITS.iter().map(|_| Mutex::new(None)).collect();
        KernelTable { context: Arc::clone(context), compiler, modules, known: RwLock::default() }
    }

    /// A kernel by its name.
    pub(super) fn find(&self, name: &'static str) -> Result<Kernel, KernelError> {
        if let Some(kernel) = self.known.read().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Ok(*kernel);
        }
        for unit in units_of(name) {
            let found = self.with_module(unit, |module| self.kernel(module, name))?;
            if let Some(kernel) = found {
                self.known.write().unwrap_or_else(PoisonError::into_inner).insert(name, kernel);
                return Ok(kernel);
            }
        }
        Err(self.context.error(format!("there is no kernel `{name}`")))
    }

    /// Makes and loads everything now, several files at a time.
    pub(super) fn load_all(&self) -> Result<(), KernelError> {
        (0..UNITS.len()).into_par_iter().try_for_each(|unit| self.with_module(unit, |_| Ok(())))
    }

    fn with_module<T>(
        &self,
        unit: usize,
        then: impl FnOnce(CUmodule) -> Result<T, KernelError>,
    ) -> Result<T, KernelError> {
        self.context.bind()?;
        let mut slot = self.modules[unit].lock().unwrap_or_else(PoisonError::into_inner);
        let module = match &*slot {
            Some(module) => module.0,
            None => {
                let module = self.load(unit)?;
                slot.insert(Module(module)).0
            }
        };
        then(module)
    }

    fn load(&self, unit: usize) -> Result<CUmodule, KernelError> {
        // Owned, because what is built in lies at any address, and the driver reads it as a file of 64-bit numbers.
        let cubin = self.compiler.cubin(UNITS[unit]).map_err(|error| self.context.error(error))?.into_owned();
        let mut module = ptr::null_mut();
        // SAFETY: a CUBIN, whole as its trailer or the compiler says; the driver reads its length from it.
        let loaded = unsafe { sys::cuModuleLoadData(&raw mut module, cubin.as_ptr().cast()) };
        self.context.check(loaded, &format!("loading {}", UNITS[unit].name))?;
        Ok(module)
    }

    /// A kernel of a module, with what it says of its launch; `None` where the module does not have it.
    fn kernel(&self, module: CUmodule, name: &str) -> Result<Option<Kernel>, KernelError> {
        let check = |result, call: &str| self.context.check(result, &format!("`{name}`: {call}"));
        let text =
            |text: String| CString::new(text).map_err(|_| self.context.error("a zero in a name".to_owned()));
        let mut function = ptr::null_mut();
        let symbol = text(name.to_owned())?;
        // SAFETY: a loaded module and a C string.
        match unsafe { sys::cuModuleGetFunction(&raw mut function, module, symbol.as_ptr()) } {
            CUresult::CUDA_ERROR_NOT_FOUND => return Ok(None),
            result => check(result, "cuModuleGetFunction")?,
        }
        let (mut address, mut bytes) = (0, 0);
        let symbol = text(format!("{name}_launch"))?;
        // SAFETY: as above.
        let found =
            unsafe { sys::cuModuleGetGlobal_v2(&raw mut address, &raw mut bytes, module, symbol.as_ptr()) };
        check(found, "cuModuleGetGlobal")?;
        let mut launch = [0_u32; 2];
        if bytes != size_of_val(&launch) {
            return Err(self.context.error(format!("`{name}_launch` has {bytes} bytes")));
        }
        // SAFETY: as many bytes on both sides; waits for the copy.
        let copied = unsafe { sys::cuMemcpyDtoH_v2(launch.as_mut_ptr().cast(), address, bytes) };
        check(copied, "cuMemcpyDtoH")?;
        let [threads, shared] = launch;
        if shared > SHARED_WITHOUT_ASKING {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            let set = unsafe { sys::cuFuncSetAttribute(function, attribute, shared as i32) };
            check(set, "cuFuncSetAttribute")?;
        }
        Ok(Some(Kernel { function, threads, shared }))
    }
}

impl Drop for KernelTable {
    fn drop(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        for module in &mut self.modules {
            let module = module.get_mut().unwrap_or_else(PoisonError::into_inner);
            if let Some(Module(module)) = module.take() {
                // SAFETY: loaded once, unloaded once. Nothing can be done about a failure.
                let _ = unsafe { sys::cuModuleUnload(module) };
            }
        }
    }
}
