//! Operations that touch every element once: `kernels/cuda/elementwise.cu`.
#![expect(unsafe_code, reason = "arguments of kernels")]

use bytemuck::NoUninit;

use crate::KernelError;
use crate::cuda::buffer::{CudaBuffer, table_of_floats, table_of_integers, upload_floats, upload_integers};
use crate::cuda::device::{Address, Arguments, Device, Queue};

/// Elements that one block covers: `ELEMENTWISE_THREADS`.
const ELEMENTS: usize = 256;
/// Columns that one block of a kernel over rows covers: `ELEMENTWISE_COLUMNS`.
const COLUMNS: usize = 1024;
/// Blocks that look for numbers that are not finite; each leaves one number for the host. At most as many as a large
/// device has room for at once.
const FINITE_BLOCKS: usize = 1024;
/// Elements that one of them takes in a step: `ELEMENTWISE_THREADS` times `FINITE_QUADS` times four.
const FINITE_ELEMENTS: usize = 4096;
/// What stands for no row and no position.
pub(super) const NONE: u32 = u32::MAX;

/// `PairArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct PairArgs {
    x: Address,
    y: Address,
    count: u64,
}

// SAFETY: as the structure of that name in elementwise.cu.
unsafe impl Arguments for PairArgs {}

/// `ZeroArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct ZeroArgs {
    x: Address,
    count: u64,
}

// SAFETY: as the structure of that name in elementwise.cu.
unsafe impl Arguments for ZeroArgs {}

/// Activations that are all zero.
pub(crate) fn zeros<D: Device>(
    device: &D,
    rows: usize,
    width: usize,
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    let x = CudaBuffer::new(device, rows, width)?;
    let args = ZeroArgs { x: x.address::<D>(), count: x.len() as u64 };
    device.launch(Queue::Compute, "zero", [x.len().div_ceil(ELEMENTS), 1, 1], &args)?;
    Ok(x)
}

/// `x += y`.
pub(crate) fn add<D: Device>(
    device: &D,
    x: &mut CudaBuffer<D::Memory>,
    y: &CudaBuffer<D::Memory>,
) -> Result<(), KernelError> {
    assert_eq!((x.rows, x.width), (y.rows, y.width), "shapes of a sum");
    let args = PairArgs { x: x.address::<D>(), y: y.address::<D>(), count: x.len() as u64 };
    device.launch(Queue::Compute, "add", [x.len().div_ceil(ELEMENTS), 1, 1], &args)
}

/// `GateArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct GateArgs {
    out: Address,
    gate: Address,
    up: Address,
    count: u64,
}

// SAFETY: as the structure of that name in elementwise.cu.
unsafe impl Arguments for GateArgs {}

/// `silu(gate) * up`, written over the gate.
pub(crate) fn gate<D: Device>(
    device: &D,
    gate: CudaBuffer<D::Memory>,
    up: &CudaBuffer<D::Memory>,
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    assert_eq!((gate.rows, gate.width), (up.rows, up.width), "shapes of a gate");
    let args = GateArgs {
        out: gate.address::<D>(),
        gate: gate.address::<D>(),
        up: up.address::<D>(),
        count: gate.len() as u64,
    };
    device.launch(Queue::Compute, "gate", [gate.len().div_ceil(ELEMENTS), 1, 1], &args)?;
    Ok(gate)
}

/// Blocks of a kernel over rows.
pub(super) fn row_blocks(rows: usize, width: usize) -> [usize; 3] {
    [rows, width.div_ceil(COLUMNS), 1]
}

/// `BiasArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct BiasArgs {
    y: Address,
    bias: Address,
    width: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in elementwise.cu.
unsafe impl Arguments for BiasArgs {}

/// Adds `bias` to every row.
pub(crate) fn add_bias<D: Device>(
    device: &D,
    y: &CudaBuffer<D::Memory>,
    bias: &[f32],
) -> Result<(), KernelError> {
    assert_eq!(y.width, bias.len(), "one bias a column");
    let bias = table_of_floats(device, bias)?;
    let args = BiasArgs { y: y.address::<D>(), bias: D::address(&bias), width: y.width as u32, padding: 0 };
    device.launch(Queue::Compute, "add_bias", row_blocks(y.rows, y.width), &args)
}

/// `GatherArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct GatherArgs {
    x: Address,
    out: Address,
    rows: Address,
    width: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in elementwise.cu.
unsafe impl Arguments for GatherArgs {}

/// Rows `rows` of `x`, in that order.
pub(crate) fn gather<D: Device>(
    device: &D,
    x: &CudaBuffer<D::Memory>,
    rows: &[u32],
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    assert!(rows.iter().all(|row| (*row as usize) < x.rows), "rows that are there");
    let out = CudaBuffer::new(device, rows.len(), x.width)?;
    let ids = table_of_integers(device, rows)?;
    let args = GatherArgs {
        x: x.address::<D>(),
        out: out.address::<D>(),
        rows: D::address(&ids),
        width: x.width as u32,
        padding: 0,
    };
    device.launch(Queue::Compute, "gather", row_blocks(rows.len(), x.width), &args)?;
    Ok(out)
}

/// `ScatterArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct ScatterArgs {
    x: Address,
    y: Address,
    rows: Address,
    weights: Address,
    width: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in elementwise.cu.
unsafe impl Arguments for ScatterArgs {}

/// `x[rows[i]] += weights[i] * y[i]`, product and sum rounded one after the other; `rows` are distinct.
pub(crate) fn scatter_add<D: Device>(
    device: &D,
    x: &mut CudaBuffer<D::Memory>,
    y: &CudaBuffer<D::Memory>,
    rows: &[u32],
    weights: &[f32],
) -> Result<(), KernelError> {
    assert_eq!(
        (y.rows, y.width, weights.len()),
        (rows.len(), x.width, rows.len()),
        "one row and weight each"
    );
    assert!(rows.iter().all(|row| (*row as usize) < x.rows), "rows that are there");
    let rows = upload_integers(device, rows)?;
    let weights = upload_floats(device, weights)?;
    let args = ScatterArgs {
        x: x.address::<D>(),
        y: y.address::<D>(),
        rows: D::address(&rows),
        weights: D::address(&weights),
        width: x.width as u32,
        padding: 0,
    };
    device.launch(Queue::Compute, "scatter_add", row_blocks(y.rows, y.width), &args)
}

/// `PlaceArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct PlaceArgs {
    part: Address,
    out: Address,
    width: u32,
    stride: u32,
}

// SAFETY: as the structure of that name in elementwise.cu.
unsafe impl Arguments for PlaceArgs {}

/// Columns of several buffers side by side.
pub(crate) fn concatenate<D: Device>(
    device: &D,
    parts: &[&CudaBuffer<D::Memory>],
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    let rows = parts.iter().map(|part| part.rows).max().unwrap_or(0);
    let wide = parts.iter().filter(|part| part.width > 0);
    assert!(wide.clone().all(|part| part.rows == rows), "rows of every part");
    let parts: Vec<(Address, usize)> = wide.map(|part| (part.address::<D>(), part.width)).collect();
    place_side_by_side(device, rows, &parts)
}

/// Columns of several runs of memory side by side: of each its address and width, f32 [rows, width].
pub(crate) fn place_side_by_side<D: Device>(
    device: &D,
    rows: usize,
    parts: &[(Address, usize)],
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    let stride = parts.iter().map(|(_, width)| width).sum();
    let out = CudaBuffer::new(device, rows, stride)?;
    let mut column = 0;
    for (part, width) in parts.iter().copied().filter(|(_, width)| *width > 0) {
        let to = out.address::<D>().offset(column * 4);
        let args = PlaceArgs { part, out: to, width: width as u32, stride: stride as u32 };
        device.launch(Queue::Compute, "place_columns", row_blocks(rows, width), &args)?;
        column += width;
    }
    Ok(out)
}

/// `FiniteArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct FiniteArgs {
    x: Address,
    count: u64,
    width: u32,
    blocks: u32,
    first: Address,
}

// SAFETY: as the structure of that name in elementwise.cu.
unsafe impl Arguments for FiniteArgs {}

/// The first row that holds a NaN or an infinity, on its way to the host.
#[derive(Debug)]
pub struct CudaWatch<P>(Option<P>);

/// Asks for the first row that holds a NaN or an infinity.
pub(crate) fn watch<D: Device>(
    device: &D,
    x: &CudaBuffer<D::Memory>,
) -> Result<CudaWatch<D::Parcel>, KernelError> {
    let blocks = x.len().div_ceil(FINITE_ELEMENTS).min(FINITE_BLOCKS);
    if blocks == 0 {
        return Ok(CudaWatch(None));
    }
    let first = device.allocate(blocks * 4)?;
    let args = FiniteArgs {
        x: x.address::<D>(),
        count: x.len() as u64,
        width: x.width as u32,
        blocks: blocks as u32,
        first: D::address(&first),
    };
    device.launch(Queue::Compute, "first_non_finite", [blocks, 1, 1], &args)?;
    CudaWatch::sent(device, &first, blocks)
}

impl<P> CudaWatch<P> {
    /// The least of `count` numbers of rows, of which the largest number is none.
    pub(crate) fn sent<D: Device<Parcel = P>>(
        device: &D,
        rows: &D::Memory,
        count: usize,
    ) -> Result<CudaWatch<P>, KernelError> {
        let parcel = (count > 0).then(|| device.send(rows, count * 4)).transpose()?;
        Ok(CudaWatch(parcel))
    }
}

/// The answer to [`watch`].
pub(crate) fn seen<D: Device>(device: &D, watch: CudaWatch<D::Parcel>) -> Result<Option<usize>, KernelError> {
    let Some(parcel) = watch.0 else { return Ok(None) };
    let blocks = device.receive(parcel)?;
    let rows = blocks.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    Ok(rows.min().filter(|row| *row != NONE).map(|row| row as usize))
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/samples.rs"]
pub(crate) mod samples;
#[cfg(all(test, feature = "emulated"))]
#[path = "tests/elementwise.rs"]
mod tests;
