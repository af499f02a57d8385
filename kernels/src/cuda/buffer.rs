//! Activations and operands on the device, and how they get there. Allocates and copies; computes
//! nothing.

use std::sync::Arc;

use ctq_model::scheme::Activation;

use crate::cuda::device::{Address, Device};
use crate::{Compute, KernelError};

/// Activations: f32 [rows, width] row-major.
#[derive(Debug)]
pub struct CudaBuffer<M> {
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) memory: M,
}

/// Inputs of linears after their treatment.
#[derive(Debug)]
pub struct CudaOperand<M> {
    pub(crate) rows: usize,
    pub(crate) k: usize,
    pub(crate) kind: OperandKind<M>,
    /// Row-major: f32 [rows, k] for [`OperandKind::F32`] and [`OperandKind::ScaledF32`], else [rows, k rounded up to a
    /// multiple of 64] with zeros beyond k, so that a row is whole tiles. Codes are as [`Stored`] says, everything else
    /// is bf16.
    pub(crate) values: M,
}

/// How codes of activations lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Integers, or codes of fp8 numbers, in the order of `code_slot` (`kernels/cuda/codes.cuh`).
    Bytes,
    /// Fp8 numbers as f16.
    Halves,
}

/// How operands are prepared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Preparing {
    pub(crate) compute: Compute,
    /// Codes of fp8 numbers whose sums are floats.
    pub(crate) fp8: Stored,
}

impl From<Compute> for Preparing {
    /// For products with exact operands.
    fn from(compute: Compute) -> Preparing {
        Preparing { compute, fp8: Stored::Halves }
    }
}

/// What the values of an operand are, and their type on the device.
#[derive(Debug)]
pub(crate) enum OperandKind<M> {
    /// Values rounded to bf16, to multiply with decompressed weights on tensor cores.
    Bf16,
    /// f32 values to multiply with decompressed weights.
    F32,
    /// Codes; `scales`, f32 [rows, k / segment], multiply the sums of a segment, and are NaN where a code would be.
    Codes {
        activation: Activation,
        segment: usize,
        stored: Stored,
        scales: M,
        /// Zero points of integers, whole numbers in f32, as the scales; `None` where all are 0.
        offsets: Option<M>,
        /// Where sums of floats are made: tensor cores, or in the order of the CPU.
        compute: Compute,
    },
    /// bf16 codes times their local scale, exact; everything is divided by `global` at the end.
    ScaledBf16 { activation: Activation, global: f32 },
    /// The same in f32.
    ScaledF32 { activation: Activation, global: f32 },
}

impl<M> CudaBuffer<M> {
    /// Uninitialised activations for results.
    pub(crate) fn new<D: Device<Memory = M>>(
        device: &D,
        rows: usize,
        width: usize,
    ) -> Result<CudaBuffer<M>, KernelError> {
        Ok(CudaBuffer { rows, width, memory: device.allocate(rows * width * 4)? })
    }

    /// Activations from the host, [rows, width].
    pub(crate) fn upload<D: Device<Memory = M>>(
        device: &D,
        width: usize,
        values: &[f32],
    ) -> Result<CudaBuffer<M>, KernelError> {
        let rows = values.len().checked_div(width).unwrap_or(0);
        Ok(CudaBuffer { rows, width, memory: upload_floats(device, values)? })
    }

    pub(crate) fn download<D: Device<Memory = M>>(&self, device: &D) -> Result<Vec<f32>, KernelError> {
        download_floats(device, &self.memory, self.rows * self.width)
    }

    /// Elements.
    pub(crate) fn len(&self) -> usize {
        self.rows * self.width
    }

    /// Where it lies.
    pub(crate) fn address<D: Device<Memory = M>>(&self) -> Address {
        D::address(&self.memory)
    }
}

/// Numbers from the host.
pub(crate) fn upload_floats<D: Device>(device: &D, values: &[f32]) -> Result<D::Memory, KernelError> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    device.upload(&bytes)
}

/// Numbers from the host.
pub(crate) fn upload_integers<D: Device>(device: &D, values: &[u32]) -> Result<D::Memory, KernelError> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    device.upload(&bytes)
}

/// Numbers from the host that come again: in memory that is never written.
pub(crate) fn table_of_floats<D: Device>(device: &D, values: &[f32]) -> Result<Arc<D::Memory>, KernelError> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    device.table(&bytes)
}

/// Numbers from the host that come again: in memory that is never written.
pub(crate) fn table_of_integers<D: Device>(
    device: &D,
    values: &[u32],
) -> Result<Arc<D::Memory>, KernelError> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    device.table(&bytes)
}

/// The first `count` numbers of `memory`.
pub(crate) fn download_floats<D: Device>(
    device: &D,
    memory: &D::Memory,
    count: usize,
) -> Result<Vec<f32>, KernelError> {
    let mut bytes = vec![0; count * 4];
    device.download(memory, 0, &mut bytes)?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect())
}

/// The first `count` numbers of `memory`.
pub(crate) fn download_integers<D: Device>(
    device: &D,
    memory: &D::Memory,
    count: usize,
) -> Result<Vec<u32>, KernelError> {
    let mut bytes = vec![0; count * 4];
    device.download(memory, 0, &mut bytes)?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))).collect())
}
