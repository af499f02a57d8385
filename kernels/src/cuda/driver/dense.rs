//! Dense products by cuBLASLt, with one algorithm for everything.
//!
//! The library chooses among algorithms by all sizes, and they sum in different orders. So one is chosen, once, for a
//! fixed shape, that cuts k nowhere; it then serves every k. Its order of sums depends on k alone: that is tried out
//! before it is taken, because the library does not tell everything about its algorithms.
#![expect(unsafe_code, reason = "hands addresses to the library")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUDA_MEMCPY2D_st, CUmemorytype_enum};

use super::cublaslt::{ALIGNMENT, Algorithm, Config, CublasLt, Layouts, Session, Sizes};
use super::library::Version;
use super::memory::{CudaMemory, Heap};
use super::staging::Staging;
use crate::KernelError;
use crate::cuda::device::{DenseProduct, Store};

/// What the library may use beside the matrices: the same for every product.
const WORKSPACE: usize = 32 << 20;

/// Sums that show whether a product is added to what is there in one go, and outputs that are looked at then.
const ADDITIONS: usize = 8;
const LOOKED_AT: usize = 8192;

/// The shape that the algorithm is chosen for.
const REFERENCE: Sizes = Sizes { m: 2048, n: 2048, k: 4096, y_stride: 2048 };

/// Products of one device.
#[derive(Debug)]
pub(super) struct Dense {
    heap: Arc<Heap>,
    session: Session,
    algorithm: Algorithm,
    description: String,
    /// Whether a product that is added has the bits of a sum afterwards.
    adds: bool,
    workspace: CudaMemory,
    /// Shapes that came up. Only looked up, never walked.
    layouts: Mutex<HashMap<Sizes, Arc<Layouts>>>,
    /// Whether the algorithm takes a k.
    takes: Mutex<HashMap<usize, bool>>,
}

impl Dense {
    /// Chooses the algorithm; the inner error says why there is none.
    ///
    /// # Errors
    /// Where the device fails or has no memory: that says nothing about the library.
    pub(super) fn new(
        heap: &Arc<Heap>,
        staging: &Staging,
        library: CublasLt,
        version: Version,
    ) -> Result<Result<Dense, String>, KernelError> {
        heap.context.bind()?;
        let workspace = heap.allocate(WORKSPACE)?;
        let trial = Trial::new(heap, staging)?;
        let prepared = Session::new(library).and_then(|session| {
            let layouts = session.layouts(REFERENCE)?;
            let candidates = candidates(&session, &layouts)?;
            Ok((session, layouts, candidates))
        });
        let (session, layouts, candidates) = match prepared {
            Ok(prepared) => prepared,
            Err(reason) => return Ok(Err(format!("cuBLASLt {version}: {reason}"))),
        };
        for (algorithm, config) in candidates {
            let multiply = |factor: f32| {
                let addresses = [trial.w.address, trial.x.address, trial.y.address];
                let (workspace, stream) = ((workspace.address, WORKSPACE), heap.compute.raw.cast());
                // SAFETY: the trial's matrices are of the reference's shape.
                unsafe { session.multiply(&algorithm, &layouts, addresses, factor, workspace, stream) }
            };
            if multiply(0.0).is_err() || !trial.is_good(heap)? {
                continue;
            }
            let adds = trial.adds(heap, || multiply(1.0))?;
            let Config { id, tile, stages, .. } = config;
            return Ok(Ok(Dense {
                heap: Arc::clone(heap),
                session,
                algorithm,
                description: format!("cuBLASLt {version}, algorithm {id}, tile {tile}, stages {stages}"),
                adds,
                workspace,
                layouts: Mutex::default(),
                takes: Mutex::default(),
            }));
        }
        Ok(Err(format!("cuBLASLt {version} has no algorithm for this device that sums in one order")))
    }

    /// What was chosen, for people.
    pub(super) fn description(&self) -> &str {
        &self.description
    }

    /// Whether a product that is added to what is there has the bits of a sum afterwards.
    pub(super) fn adds(&self) -> bool {
        self.adds
    }

    /// Whether products of this k are possible.
    pub(super) fn takes(&self, k: usize) -> bool {
        if k == 0 || !k.is_multiple_of(ALIGNMENT as usize / 2) || self.heap.context.bind().is_err() {
            return false;
        }
        let mut takes = self.takes.lock().unwrap_or_else(PoisonError::into_inner);
        *takes.entry(k).or_insert_with(|| {
            let layouts = self.session.layouts(Sizes { k, ..REFERENCE });
            layouts.is_ok_and(|layouts| self.session.takes(&self.algorithm, &layouts, WORKSPACE))
        })
    }

    fn layouts(&self, sizes: Sizes) -> Result<Arc<Layouts>, String> {
        let mut known = self.layouts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layouts) = known.get(&sizes) {
            return Ok(Arc::clone(layouts));
        }
        let layouts = Arc::new(self.session.layouts(sizes)?);
        if !self.session.takes(&self.algorithm, &layouts, WORKSPACE) {
            return Err(format!("{}: does not take a product of {sizes:?}", self.description));
        }
        known.insert(sizes, Arc::clone(&layouts));
        Ok(layouts)
    }

    /// Queues a product.
    pub(super) fn multiply(&self, product: &DenseProduct) -> Result<(), KernelError> {
        let DenseProduct { weight, x, y, m, n, k, y_stride, store } = *product;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let aligned = |address: u64| address.is_multiple_of(u64::from(ALIGNMENT));
        let error = |what: String| self.heap.context.error(what);
        if !aligned(weight.0) || !aligned(x.0) || !k.is_multiple_of(ALIGNMENT as usize / 2) {
            return Err(error(format!("a dense product of k = {k} whose rows are not aligned to 16 bytes")));
        }
        self.heap.before_compute()?;
        // The algorithm writes rows that are aligned to 16 bytes; others go through memory that is.
        let direct = aligned(y.0) && y_stride.is_multiple_of(ALIGNMENT as usize / 4);
        let factor = match store {
            Store::Over => 0.0,
            Store::Added if direct => 1.0,
            Store::Added => {
                return Err(error("a dense product added to rows that are not aligned".to_owned()));
            }
        };
        let stride = if direct { y_stride } else { n.next_multiple_of(ALIGNMENT as usize / 4) };
        let between = if direct { None } else { Some(self.heap.allocate(m * stride * 4)?) };
        let to = between.as_ref().map_or(y.0, |memory| memory.address);
        let layouts = self.layouts(Sizes { m, n, k, y_stride: stride }).map_err(error)?;
        let stream = self.heap.compute.raw;
        // SAFETY: matrices of these sizes by the promise of `DenseProduct`; the workspace is used on this stream alone.
        let queued = unsafe {
            let workspace = (self.workspace.address, WORKSPACE);
            let addresses = [weight.0, x.0, to];
            self.session.multiply(&self.algorithm, &layouts, addresses, factor, workspace, stream.cast())
        };
        queued.map_err(error)?;
        if between.is_some() {
            // SAFETY: m rows of n elements lie in both.
            let copied = unsafe {
                let rows = rows(to, stride * 4, y.0, y_stride * 4, n * 4, m);
                sys::cuMemcpy2DAsync_v2(&raw const rows, stream)
            };
            self.heap.context.check(copied, "copying a product")?;
        }
        Ok(())
    }
}

/// Algorithms that say they do not cut k.
fn candidates(session: &Session, layouts: &Layouts) -> Result<Vec<(Algorithm, Config)>, String> {
    let with_config = |algorithm| session.config(&algorithm).map(|config| (algorithm, config));
    let all: Result<Vec<_>, String> =
        session.suggestions(layouts, WORKSPACE)?.into_iter().map(with_config).collect();
    let whole = |(_, config): &(Algorithm, Config)| config.split_k <= 1 && config.reduction == 0;
    Ok(all?.into_iter().filter(whole).collect())
}

/// `height` rows of `width` bytes from one place on the device to another.
fn rows(
    from: u64,
    from_stride: usize,
    to: u64,
    to_stride: usize,
    width: usize,
    height: usize,
) -> CUDA_MEMCPY2D_st {
    let device = CUmemorytype_enum::CU_MEMORYTYPE_DEVICE;
    CUDA_MEMCPY2D_st {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: device,
        srcHost: std::ptr::null(),
        srcDevice: from,
        srcArray: std::ptr::null_mut(),
        srcPitch: from_stride,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: device,
        dstHost: std::ptr::null_mut(),
        dstDevice: to,
        dstArray: std::ptr::null_mut(),
        dstPitch: to_stride,
        WidthInBytes: width,
        Height: height,
    }
}

/// A product all of whose outputs are the same sum: an algorithm that sums in one order gives equal bits everywhere.
struct Trial {
    x: CudaMemory,
    w: CudaMemory,
    y: CudaMemory,
    expected: f64,
}

impl Trial {
    fn new(heap: &Arc<Heap>, staging: &Staging) -> Result<Trial, KernelError> {
        let Sizes { m, n, k, .. } = REFERENCE;
        let (x, w) = (trial_row(k, 1), trial_row(k, 2));
        let expected = x.iter().zip(&w).map(|(x, w)| wide(*x) * wide(*w)).sum();
        let matrix = |row: &[u16], rows: usize| {
            let bytes: Vec<u8> = row.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            staging.upload(heap, &bytes.repeat(rows))
        };
        let (x, w) = (matrix(&x, m)?, matrix(&w, n)?);
        Ok(Trial { x, w, y: heap.allocate(m * n * 4)?, expected })
    }

    /// Whether all outputs that were queued are the same and right.
    fn is_good(&self, heap: &Heap) -> Result<bool, KernelError> {
        Ok(is_uniform(&self.outputs(heap, REFERENCE.m * REFERENCE.n)?, self.expected))
    }

    /// Whether each product that `add` queues is added to the outputs when it is whole, with one rounding. A sum that
    /// began with what is there would be rounded differently on its way, if not the first time then later.
    fn adds(&self, heap: &Heap, add: impl Fn() -> Result<(), String>) -> Result<bool, KernelError> {
        let product = self.outputs(heap, 1)?[0];
        let mut sum = product;
        for _ in 0..ADDITIONS {
            if add().is_err() {
                return Ok(false);
            }
            sum += product;
            let found = self.outputs(heap, LOOKED_AT)?;
            if found.iter().any(|found| found.to_bits() != sum.to_bits()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The first `count` outputs that were queued.
    fn outputs(&self, heap: &Heap, count: usize) -> Result<Vec<f32>, KernelError> {
        let mut y = vec![0.0_f32; count];
        // SAFETY: as many bytes on both sides; waited for before they are read.
        let queued = unsafe {
            let bytes = size_of_val(&y[..]);
            sys::cuMemcpyDtoHAsync_v2(y.as_mut_ptr().cast(), self.y.address, bytes, heap.compute.raw)
        };
        heap.context.check(queued, "downloading")?;
        heap.compute.synchronize()?;
        Ok(y)
    }
}

/// Whether all numbers have the bits of the first, and it is near what is expected.
fn is_uniform(y: &[f32], expected: f64) -> bool {
    let Some(first) = y.first() else { return false };
    let near = (f64::from(*first) - expected).abs() <= 1e-2;
    near && y.iter().all(|value| value.to_bits() == first.to_bits())
}

/// Numbers of both signs and of magnitudes in [1/16, 1), as bf16 bits: sums that show in which order they were taken.
fn trial_row(k: usize, seed: u64) -> Vec<u16> {
    let mut state = seed;
    let mut next = || {
        // The multiplier and increment of Knuth's MMIX.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u16
    };
    let mut value = || {
        let bits = next();
        let (sign, exponent, fraction) = (bits & 0x8000, 123 + (bits >> 8 & 3), bits & 0x7f);
        sign | exponent << 7 | fraction
    };
    (0..k).map(|_| value()).collect()
}

/// A bf16 number.
fn wide(bits: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(bits) << 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trial_tells_orders_of_sums_apart() {
        let (x, w) = (trial_row(4096, 1), trial_row(4096, 2));
        let products: Vec<f32> = x.iter().zip(&w).map(|(x, w)| (wide(*x) * wide(*w)) as f32).collect();
        assert!(x.iter().all(|bits| (0.0625..1.0).contains(&wide(*bits).abs())));
        let whole = products.iter().fold(0.0_f32, |sum, p| sum + p);
        let halves = products.chunks(2048).map(|half| half.iter().fold(0.0_f32, |sum, p| sum + p));
        let halves = halves.fold(0.0_f32, |sum, half| sum + half);
        assert_ne!(whole.to_bits(), halves.to_bits());
        let expected = x.iter().zip(&w).map(|(x, w)| wide(*x) * wide(*w)).sum();
        assert!(is_uniform(&[whole; 4], expected), "{whole} for {expected}");
        assert!(!is_uniform(&[whole, whole, halves], expected));
        assert!(!is_uniform(&[whole + 1.0; 4], expected));
        assert!(!is_uniform(&[f32::NAN; 4], expected));
    }
}
