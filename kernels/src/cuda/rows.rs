//! Where the rows of an operand come from: they lie in memory, or are made on the way by a norm or a gate, in the same
//! pass: the kernels over rows of `kernels/cuda/quantize.cu`. Knows which rows a block has room for, no formula.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;

use bytemuck::NoUninit;

use crate::KernelError;
use crate::backend::Treatment;
use crate::cuda::buffer::{CudaBuffer, CudaOperand, Preparing, table_of_floats};
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::cuda::elementwise::CudaWatch;
use crate::cuda::quantize::{self, QuantizeArgs};
use crate::cuda::{elementwise, norm};

/// Elements that a block has room for, and its kernels for norms and for gates.
const ROOMS: [(usize, &str, &str); 3] = [
    (4096, "norm_operand_4096", "gate_operand_4096"),
    (8192, "norm_operand_8192", "gate_operand_8192"),
    (16_384, "norm_operand_16384", "gate_operand_16384"),
];

/// Columns that a block of `gate_operand_plain` covers.
const PLAIN_COLUMNS: usize = 1024;

/// `RowArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct RowArgs {
    quantize: QuantizeArgs,
    other: Address,
    bad_rows: Address,
    epsilon: f32,
    plain: u32,
    columns: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in quantize.cu.
unsafe impl Arguments for RowArgs {}

/// An operand, and the first row of what it was made of that is not finite.
type Watched<D> = (CudaOperand<<D as Device>::Memory>, CudaWatch<<D as Device>::Parcel>);

/// Rows that are prepared.
#[derive(Debug)]
pub(crate) struct Source<'a, M> {
    /// f32 [rows, width]: what is prepared, or what it is made of.
    pub(crate) x: &'a CudaBuffer<M>,
    pub(crate) making: Making<'a, M>,
}

/// What is done to rows before they are prepared.
#[derive(Debug)]
pub(crate) enum Making<'a, M> {
    /// Nothing.
    Given,
    /// A norm over each row, with this weight. Leaves of each row its number where it is not finite, else the largest: u32
    /// [rows].
    Normed { weight: &'a M, epsilon: f32, bad_rows: &'a M },
    /// `silu(x) * up`.
    Gated { up: &'a CudaBuffer<M> },
}

/// What happens to a row after it is made.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Runs {
    /// Nothing but rounding.
    Plain,
    /// Elements of this many columns share a scale.
    Of(usize),
    /// Something that looks beyond a row.
    BeyondRows,
}

impl<'a, M> Source<'a, M> {
    /// Rows as they are.
    pub(crate) fn given(x: &'a CudaBuffer<M>) -> Source<'a, M> {
        Source { x, making: Making::Given }
    }
}

/// [`prepare`](quantize::prepare) after a norm over whole rows, and the first row that is not finite before it.
pub(crate) fn normed_operand<D: Device>(
    device: &D,
    x: &CudaBuffer<D::Memory>,
    (weight, epsilon): (&[f32], f32),
    treatment: &Treatment,
    preparing: impl Into<Preparing>,
    windows: &[Range<usize>],
) -> Result<Watched<D>, KernelError> {
    if weight.len() != x.width || !takes_norm(x.width, quantize::runs_of(treatment, x.width)) {
        let watch = elementwise::watch(device, x)?;
        let normed = norm::norm(device, x, weight, epsilon)?;
        return Ok((quantize::prepare(device, &normed, treatment, preparing, windows)?, watch));
    }
    let weight = table_of_floats(device, weight)?;
    let bad_rows = device.allocate(x.rows * 4)?;
    let making = Making::Normed { weight: &*weight, epsilon, bad_rows: &bad_rows };
    let operand =
        quantize::prepare_rows(device, &Source { x, making }, treatment, preparing.into(), windows)?;
    Ok((operand, CudaWatch::sent(device, &bad_rows, x.rows)?))
}

/// [`prepare`](quantize::prepare) of `silu(gate) * up`.
pub(crate) fn gated_operand<D: Device>(
    device: &D,
    gate: CudaBuffer<D::Memory>,
    up: &CudaBuffer<D::Memory>,
    treatment: &Treatment,
    preparing: impl Into<Preparing>,
    windows: &[Range<usize>],
) -> Result<CudaOperand<D::Memory>, KernelError> {
    if !takes_gate(gate.width, quantize::runs_of(treatment, gate.width)) {
        return quantize::prepare(
            device,
            &elementwise::gate(device, gate, up)?,
            treatment,
            preparing,
            windows,
        );
    }
    assert_eq!((gate.rows, gate.width), (up.rows, up.width), "shapes of a gate");
    let source = Source { x: &gate, making: Making::Gated { up } };
    quantize::prepare_rows(device, &source, treatment, preparing.into(), windows)
}

/// Whether a norm over rows of `width` can be made on the way.
fn takes_norm(width: usize, runs: Runs) -> bool {
    let fits = width.is_multiple_of(4) && room(width).is_some();
    match runs {
        Runs::Plain | Runs::Of(_) => fits,
        Runs::BeyondRows => false,
    }
}

/// Whether gates of `width` can be made on the way.
fn takes_gate(width: usize, runs: Runs) -> bool {
    match runs {
        Runs::Plain => width.is_multiple_of(4),
        Runs::Of(length) => room(length.min(width)).is_some(),
        Runs::BeyondRows => false,
    }
}

/// The least room for so many elements.
fn room(elements: usize) -> Option<(usize, &'static str, &'static str)> {
    ROOMS.into_iter().find(|(room, ..)| elements <= *room)
}

/// Makes rows and does to them what `quantize` says, whose `x` they are. Only where [`takes_norm`] or [`takes_gate`] say
/// so.
pub(crate) fn launch<D: Device>(
    device: &D,
    source: &Source<'_, D::Memory>,
    runs: Runs,
    quantize: QuantizeArgs,
) -> Result<(), KernelError> {
    let (rows, width) = (source.x.rows, source.x.width);
    let plain = u32::from(matches!(runs, Runs::Plain));
    let args = RowArgs {
        quantize,
        other: Address::NULL,
        bad_rows: Address::NULL,
        epsilon: 0.0,
        plain,
        columns: width as u32,
        padding: 0,
    };
    match (&source.making, runs) {
        (Making::Given, _) | (_, Runs::BeyondRows) => unreachable!("nothing to make on the way"),
        (Making::Normed { weight, epsilon, bad_rows }, Runs::Plain | Runs::Of(_)) => {
            let (_, kernel, _) = room(width).expect("asked before");
            let (other, bad_rows) = (D::address(weight), D::address(bad_rows));
            let args = RowArgs { other, bad_rows, epsilon: *epsilon, ..args };
            device.launch(Queue::Compute, kernel, [rows, 1, 1], &args)
        }
        (Making::Gated { up }, Runs::Plain) => {
            let args = RowArgs { other: up.address::<D>(), ..args };
            let blocks = (quantize.stride as usize).div_ceil(PLAIN_COLUMNS);
            device.launch(Queue::Compute, "gate_operand_plain", [rows, blocks, 1], &args)
        }
        (Making::Gated { up }, Runs::Of(length)) => {
            let (room, _, kernel) = room(length.min(width)).expect("asked before");
            let columns = width.min(room / length.min(width) * length);
            let args = RowArgs { other: up.address::<D>(), columns: columns as u32, ..args };
            device.launch(Queue::Compute, kernel, [rows, width.div_ceil(columns.max(1)), 1], &args)
        }
    }
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/rows.rs"]
mod tests;
