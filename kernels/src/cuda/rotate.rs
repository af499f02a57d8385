//! Rotary embedding: the kernel `rotate` of `kernels/cuda/elementwise.cu`, and the tables that it looks angles up in.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::sync::{Arc, PoisonError};

use crate::backend::Span;
use crate::cuda::Cuda;
use crate::cuda::buffer::{CudaBuffer, table_of_integers, upload_floats};
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::cuda::elementwise::{NONE, row_blocks};
use crate::{KernelError, Rotation};
use bytemuck::NoUninit;

/// cos and sin of every position on the device. Kept until another rotation comes: all layers turn by the same.
#[derive(Debug)]
pub(crate) struct Tables<M> {
    rotation: u64,
    cos: M,
    sin: M,
}

/// `RotateArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct RotateArgs {
    x: Address,
    cos: Address,
    sin: Address,
    positions: Address,
    width: u32,
    half: u32,
}

// SAFETY: as the structure of that name in elementwise.cu.
unsafe impl Arguments for RotateArgs {}

/// Rotates the heads of each row by its position inside its window; rows of no span stay.
pub(crate) fn rotate<D: Device>(
    cuda: &Cuda<D>,
    x: &mut CudaBuffer<D::Memory>,
    rotation: &Rotation,
    spans: &[Span],
) -> Result<(), KernelError> {
    let device = cuda.device();
    let mut positions = vec![NONE; x.rows];
    for span in spans {
        let rows = positions[span.rows.clone()].iter_mut();
        rows.zip(span.first as u32..).for_each(|(at, position)| *at = position);
    }
    let half = rotation.head_dim() / 2;
    let tables = tables(cuda, rotation)?;
    let positions = table_of_integers(device, &positions)?;
    let args = RotateArgs {
        x: x.address::<D>(),
        cos: D::address(&tables.cos),
        sin: D::address(&tables.sin),
        positions: D::address(&positions),
        width: x.width as u32,
        half: half as u32,
    };
    let pairs = x.width / (2 * half) * half;
    device.launch(Queue::Compute, "rotate", row_blocks(x.rows, pairs), &args)
}

/// The tables of a rotation, uploaded where they are not there yet.
fn tables<D: Device>(cuda: &Cuda<D>, rotation: &Rotation) -> Result<Arc<Tables<D::Memory>>, KernelError> {
    let mut kept = cuda.rotation.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(tables) = kept.as_ref().filter(|tables| tables.rotation == rotation.identity()) {
        return Ok(Arc::clone(tables));
    }
    let (cos, sin) = rotation.tables();
    let tables = Arc::new(Tables {
        rotation: rotation.identity(),
        cos: upload_floats(cuda.device(), cos)?,
        sin: upload_floats(cuda.device(), sin)?,
    });
    *kept = Some(Arc::clone(&tables));
    Ok(tables)
}
