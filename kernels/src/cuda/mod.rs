//! The CUDA backend: packed tiles in device memory, kernels of our own, a library for large dense products.
//!
//! [`Cuda`] runs on any [`Device`]: one over the CUDA driver, and one that runs the same kernel sources on the CPU
//! (`emulated`, a feature for tests). With [`Compute::F32`] every operation follows the CPU
//! backend's order, so that both give the same bits; with bf16 the tensor cores sum in an order of their own.

mod attend;
mod backend;
mod buffer;
mod decode;
mod device;
pub mod driver;
mod elementwise;
#[cfg(feature = "emulated")]
pub mod emulated;
mod head;
mod linear;
mod matrix;
mod norm;
mod quantize;
mod rotate;
mod route;
mod rows;

pub use self::attend::AttentionPath;
pub use self::buffer::{CudaBuffer, CudaOperand};
pub use self::device::{
    Address, Arguments, DenseProduct, Device, Queue, Store, TensorElement, TensorMap, TensorTile,
};
pub use self::elementwise::CudaWatch;
pub use self::linear::LinearPath;
pub use self::matrix::CudaMatrix;

use std::fmt;
use std::sync::{Arc, Mutex};

use self::buffer::{Preparing, Stored};
use crate::Compute;

/// Bytes that a run takes on a device beside weights, hidden states and activations: two matrices decoded to bf16, and
/// a block of logits. `matrices`: (n, k) of every linear.
pub fn scratch_bytes(matrices: impl Iterator<Item = (usize, usize)>) -> u64 {
    const LOGITS: u64 = 128 << 20;
    linear::scratch_bytes(matrices) + LOGITS
}

/// A CUDA device as a [`Backend`](crate::Backend).
pub struct Cuda<D: Device> {
    device: Arc<D>,
    /// The path of linears that was asked for, in place of the rule.
    linears: Option<LinearPath>,
    /// Where matrices are decoded to before a dense product.
    scratches: Mutex<linear::Scratches<D::Memory>>,
    /// Angles that were looked up last.
    rotation: Mutex<Option<Arc<rotate::Tables<D::Memory>>>>,
    /// The path of bf16 attention that was asked for, in place of the rule.
    attention: Option<AttentionPath>,
}

impl<D: Device + fmt::Debug> fmt::Debug for Cuda<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuda").field("device", &self.device).finish_non_exhaustive()
    }
}

impl<D: Device> Cuda<D> {
    /// The backend of a device.
    pub fn new(device: D) -> Cuda<D> {
        Cuda::on(Arc::new(device))
    }

    /// The same with products on one path wherever it can serve; without one, by the rule. Paths sum in
    /// orders of their own, so this is part of what the backend calls itself.
    #[must_use]
    pub fn with_linears(self, linears: Option<LinearPath>) -> Cuda<D> {
        Cuda { linears, ..self }
    }

    /// The same with bf16 attention on one path wherever it can serve; without one, by the rule. Tensor cores may sum in
    /// orders of their own, so this is part of what the backend calls itself.
    #[must_use]
    pub fn with_attention(self, attention: Option<AttentionPath>) -> Cuda<D> {
        Cuda { attention, ..self }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, for other threads to keep.
    pub(crate) fn shared_device(&self) -> &Arc<D> {
        &self.device
    }

    /// Another rank on the same device: work of both goes through the same queues.
    #[must_use]
    pub fn another_rank(&self) -> Cuda<D> {
        let Cuda { device, linears, attention, .. } = self;
        Cuda { linears: *linears, attention: *attention, ..Cuda::on(Arc::clone(device)) }
    }

    /// How operands are prepared: fp8 for tensor cores of its own where they were asked for and are there.
    fn preparing(&self, compute: Compute) -> Preparing {
        let asked = self.linears == Some(LinearPath::Fp8) && self.device.has_warpgroups();
        match compute {
            Compute::Bf16 if asked => Preparing { compute, fp8: Stored::Bytes },
            Compute::Bf16 | Compute::F32 => compute.into(),
        }
    }

    fn on(device: Arc<D>) -> Cuda<D> {
        Cuda {
            device,
            linears: None,
            attention: None,
            scratches: Mutex::new(linear::Scratches::new()),
            rotation: Mutex::new(None),
        }
    }
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/peer_copies.rs"]
mod peer_copies;
