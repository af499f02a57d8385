//! RMS norm: `kernels/cuda/norm.cu`.
#![expect(unsafe_code, reason = "arguments of kernels")]

use bytemuck::NoUninit;

use crate::KernelError;
use crate::cuda::buffer::{CudaBuffer, table_of_floats};
use crate::cuda::device::{Address, Arguments, Device, Queue};

/// Runs that one block covers: warps of `NORM_THREADS`.
const RUNS: usize = 8;

/// `NormArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct NormArgs {
    x: Address,
    out: Address,
    weight: Address,
    runs: u64,
    length: u32,
    epsilon: f32,
}

// SAFETY: as the structure of that name in norm.cu.
unsafe impl Arguments for NormArgs {}

/// `x / rms(x) * weight` over each run of `weight.len()` elements of a row.
pub(crate) fn norm<D: Device>(
    device: &D,
    x: &CudaBuffer<D::Memory>,
    weight: &[f32],
    epsilon: f32,
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    assert!(x.width.is_multiple_of(weight.len()), "whole runs of {} in rows of {}", weight.len(), x.width);
    let out = CudaBuffer::new(device, x.rows, x.width)?;
    let runs = x.len() / weight.len();
    let scales = table_of_floats(device, weight)?;
    let args = NormArgs {
        x: x.address::<D>(),
        out: out.address::<D>(),
        weight: D::address(&scales),
        runs: runs as u64,
        length: weight.len() as u32,
        epsilon,
    };
    device.launch(Queue::Compute, "rms_norm", [runs.div_ceil(RUNS), 1, 1], &args)?;
    Ok(out)
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/norm.rs"]
mod tests;
