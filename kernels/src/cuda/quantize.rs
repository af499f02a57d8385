//! Activation quantization: `kernels/cuda/quantize.cu`. Chooses runs and formulas; the arithmetic is the kernel's.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;
use std::sync::Arc;

use bytemuck::NoUninit;
use ctq_model::matrix::Code;
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};

use crate::backend::{Quantizer, Treatment};
use crate::cuda::buffer::{
    CudaBuffer, CudaOperand, OperandKind, Preparing, Stored, table_of_floats, table_of_integers,
};
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::cuda::elementwise;
use crate::cuda::rows::{self, Making, Runs, Source};
use crate::{Compute, KernelError};

/// Threads of a block: `QUANTIZE_THREADS`.
const THREADS: usize = 256;
/// Lanes of a warp.
const WARP: usize = 32;
/// Columns that a block of `round_operands` covers.
const COLUMNS: usize = 4 * THREADS;
/// Elements that the rows of bf16 operands are padded to.
const PADDED: usize = 64;

/// `QuantizeArgs`.
#[derive(Clone, Copy, Default, NoUninit)]
#[repr(C)]
pub(crate) struct QuantizeArgs {
    x: Address,
    out: Address,
    scales: Address,
    offsets: Address,
    stored: Address,
    ranges: Address,
    windows: Address,
    rows: u64,
    width: u32,
    /// Elements from one row of results to the next.
    pub(crate) stride: u32,
    length: u32,
    runs: u32,
    lanes: u32,
    rounding: Rounding,
    scale: Scale,
    output: Output,
    symmetric: u32,
    stored_runs: u32,
    format: Format,
    low: f32,
    high: f32,
    zero: f32,
    global: f32,
    padding: u32,
}

// SAFETY: as the structure of that name in quantize.cu.
unsafe impl Arguments for QuantizeArgs {}

/// `QUANTIZE_INTEGERS` and what follows.
#[derive(Clone, Copy, Default, NoUninit)]
#[repr(u32)]
enum Rounding {
    #[default]
    Integers = 0,
    E4m3 = 1,
    E2m1 = 2,
}

/// `QUANTIZE_STATIC` and what follows.
#[derive(Clone, Copy, Default, NoUninit, PartialEq, Eq)]
#[repr(u32)]
enum Scale {
    #[default]
    Static = 0,
    Dynamic = 1,
    Local = 2,
    PowerOfTwo = 3,
}

/// `QUANTIZE_VALUES` and what follows.
#[derive(Clone, Copy, Default, NoUninit, PartialEq, Eq)]
#[repr(u32)]
enum Output {
    #[default]
    Values = 0,
    Codes = 1,
    Scaled = 2,
}

/// What values are written as: `FORMAT_F32` and what follows.
#[derive(Clone, Copy, Default, Debug, NoUninit, PartialEq, Eq)]
#[repr(u32)]
enum Format {
    #[default]
    F32 = 0,
    Bf16 = 1,
    F16 = 2,
    /// Integer codes.
    Bytes = 3,
    /// Codes of fp8 numbers.
    E4m3 = 4,
}

impl Format {
    /// Of values in a compute mode.
    fn of(compute: Compute) -> Format {
        match compute {
            Compute::F32 => Format::F32,
            Compute::Bf16 => Format::Bf16,
        }
    }

    /// Elements from one row to the next.
    fn stride(self, k: usize) -> usize {
        match self {
            Format::F32 => k,
            Format::Bf16 | Format::F16 | Format::Bytes | Format::E4m3 => k.next_multiple_of(PADDED),
        }
    }

    /// Memory for rows of `k`.
    fn allocate<D: Device>(self, device: &D, rows: usize, k: usize) -> Result<D::Memory, KernelError> {
        let bytes = match self {
            Format::F32 => 4,
            Format::Bf16 | Format::F16 => 2,
            Format::Bytes | Format::E4m3 => 1,
        };
        device.allocate(rows * self.stride(k) * bytes)
    }
}

/// Where a quantization writes: rows of values or codes, and scales and zero points of codes.
#[derive(Clone, Copy)]
struct Target {
    output: Output,
    values: Address,
    format: Format,
    scales: Address,
    offsets: Address,
}

impl Target {
    /// Values or codes alone.
    fn alone(output: Output, values: Address, format: Format) -> Target {
        Target { output, values, format, scales: Address::NULL, offsets: Address::NULL }
    }
}

/// Inputs of linears after their treatment, [rows, k]; scales of a whole tensor are found window by window.
pub(crate) fn prepare<D: Device>(
    device: &D,
    x: &CudaBuffer<D::Memory>,
    treatment: &Treatment,
    preparing: impl Into<Preparing>,
    windows: &[Range<usize>],
) -> Result<CudaOperand<D::Memory>, KernelError> {
    prepare_rows(device, &Source::given(x), treatment, preparing.into(), windows)
}

/// How far a treatment looks in rows of `width`.
pub(crate) fn runs_of(treatment: &Treatment, width: usize) -> Runs {
    let (quantizer, output) = match treatment {
        Treatment::Plain => return Runs::Plain,
        Treatment::FakeQuantized(quantizer) => (quantizer, Output::Values),
        Treatment::Exact(quantizer) => (quantizer, exact_output(quantizer.activation)),
    };
    if looks_at_windows(quantizer.activation, output) {
        return Runs::BeyondRows;
    }
    Runs::Of(shared_length(quantizer, output, width, width))
}

/// What an exact product takes.
fn exact_output(activation: Activation) -> Output {
    match activation.scale {
        ActivationScale::Local | ActivationScale::PowerOfTwo => Output::Scaled,
        ActivationScale::Static | ActivationScale::Dynamic => Output::Codes,
    }
}

/// Whether a scale is found from all rows of a window.
fn looks_at_windows(activation: Activation, output: Output) -> bool {
    match activation.sharing {
        // Local scales of an exact product are never wider than a token.
        ActivationSharing::Tensor => activation.scale != ActivationScale::Static && output != Output::Scaled,
        ActivationSharing::Token | ActivationSharing::Group { .. } | ActivationSharing::Head => false,
    }
}

/// Consecutive elements of a row that share a scale, stored or found.
fn shared_length(quantizer: &Quantizer, output: Output, width: usize, head_dim: usize) -> usize {
    if has_stored_runs(quantizer, output) {
        head_dim
    } else {
        run_length(quantizer.activation, width, head_dim)
    }
}

/// Whether every run of a row has a stored scale of its own. The sums of an exact product have one scale a segment, which
/// is not a head's.
fn has_stored_runs(quantizer: &Quantizer, output: Output) -> bool {
    quantizer.scales.len() > 1 && output != Output::Codes
}

/// Inputs of linears after their treatment.
pub(crate) fn prepare_rows<D: Device>(
    device: &D,
    source: &Source<'_, D::Memory>,
    treatment: &Treatment,
    preparing: Preparing,
    windows: &[Range<usize>],
) -> Result<CudaOperand<D::Memory>, KernelError> {
    let (rows, k, compute) = (source.x.rows, source.x.width, preparing.compute);
    let kind = match compute {
        Compute::F32 => OperandKind::F32,
        Compute::Bf16 => OperandKind::Bf16,
    };
    match treatment {
        Treatment::Plain => Ok(CudaOperand { rows, k, kind, values: plain(device, source, compute)? }),
        Treatment::FakeQuantized(quantizer) => {
            let format = Format::of(compute);
            let values = format.allocate(device, rows, k)?;
            let target = Target::alone(Output::Values, D::address(&values), format);
            quantize(device, source, target, quantizer, k, windows)?;
            Ok(CudaOperand { rows, k, kind, values })
        }
        Treatment::Exact(quantizer) => match exact_output(quantizer.activation) {
            Output::Scaled => scaled(device, source, quantizer, compute, windows),
            Output::Codes | Output::Values => codes(device, source, quantizer, preparing, windows),
        },
    }
}

/// `OperandArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct OperandArgs {
    x: Address,
    out: Address,
    width: u32,
    stride: u32,
}

// SAFETY: as the structure of that name in quantize.cu.
unsafe impl Arguments for OperandArgs {}

/// Nothing but the rounding of the compute mode.
fn plain<D: Device>(
    device: &D,
    source: &Source<'_, D::Memory>,
    compute: Compute,
) -> Result<D::Memory, KernelError> {
    let Source { x, making } = source;
    if let (Making::Given, Compute::F32) = (making, compute) {
        return Ok(elementwise::concatenate(device, &[x])?.memory);
    }
    let format = Format::of(compute);
    let (out, stride) = (format.allocate(device, x.rows, x.width)?, format.stride(x.width));
    if let Making::Given = making {
        let args = OperandArgs {
            x: x.address::<D>(),
            out: D::address(&out),
            width: x.width as u32,
            stride: stride as u32,
        };
        device.launch(Queue::Compute, "round_operands", [x.rows, stride.div_ceil(COLUMNS), 1], &args)?;
    } else {
        let args = QuantizeArgs {
            x: x.address::<D>(),
            out: D::address(&out),
            rows: x.rows as u64,
            width: x.width as u32,
            stride: stride as u32,
            format,
            ..QuantizeArgs::default()
        };
        rows::launch(device, source, Runs::Plain, args)?;
    }
    Ok(out)
}

/// NVFP4 and MX as serving kernels have them: codes times their local scale.
fn scaled<D: Device>(
    device: &D,
    source: &Source<'_, D::Memory>,
    quantizer: &Quantizer,
    compute: Compute,
    windows: &[Range<usize>],
) -> Result<CudaOperand<D::Memory>, KernelError> {
    let (x, activation) = (source.x, quantizer.activation);
    let global = match activation.scale {
        ActivationScale::Local => quantizer.global_scale,
        ActivationScale::PowerOfTwo | ActivationScale::Static | ActivationScale::Dynamic => 1.0,
    };
    let kind = match compute {
        Compute::F32 => OperandKind::ScaledF32 { activation, global },
        Compute::Bf16 => OperandKind::ScaledBf16 { activation, global },
    };
    let format = Format::of(compute);
    let values = format.allocate(device, x.rows, x.width)?;
    let target = Target::alone(Output::Scaled, D::address(&values), format);
    quantize(device, source, target, quantizer, x.width, windows)?;
    Ok(CudaOperand { rows: x.rows, k: x.width, kind, values })
}

/// Integers and fp8 as serving kernels have them: codes, and the scales that their sums are multiplied with.
fn codes<D: Device>(
    device: &D,
    source: &Source<'_, D::Memory>,
    quantizer: &Quantizer,
    Preparing { compute, fp8 }: Preparing,
    windows: &[Range<usize>],
) -> Result<CudaOperand<D::Memory>, KernelError> {
    let (x, activation) = (source.x, quantizer.activation);
    let segment = run_length(activation, x.width, x.width);
    assert!(x.width.is_multiple_of(segment), "whole groups of {segment} in {} inputs", x.width);
    let (format, stored, shifted) = match (activation.code, fp8) {
        (Code::Int { .. }, _) => (Format::Bytes, Stored::Bytes, has_zero_points(quantizer)),
        (Code::E4m3, Stored::Bytes) => (Format::E4m3, Stored::Bytes, false),
        (Code::E4m3 | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32, _) => {
            (Format::F16, Stored::Halves, false)
        }
    };
    let values = format.allocate(device, x.rows, x.width)?;
    let scale_bytes = x.rows * (x.width / segment) * 4;
    let scales = device.allocate(scale_bytes)?;
    let offsets = if shifted { Some(device.allocate(scale_bytes)?) } else { None };
    let target = Target {
        output: Output::Codes,
        values: D::address(&values),
        format,
        scales: D::address(&scales),
        offsets: offsets.as_ref().map_or(Address::NULL, D::address),
    };
    quantize(device, source, target, quantizer, x.width, windows)?;
    let kind = OperandKind::Codes { activation, segment, stored, scales, offsets, compute };
    Ok(CudaOperand { rows: x.rows, k: x.width, kind, values })
}

/// Whether integer codes may have zero points other than 0.
fn has_zero_points(quantizer: &Quantizer) -> bool {
    match quantizer.activation.scale {
        ActivationScale::Static => quantizer.zero != 0.0,
        ActivationScale::Dynamic | ActivationScale::Local | ActivationScale::PowerOfTwo => {
            !quantizer.activation.symmetric
        }
    }
}

/// Quantizes and dequantizes in place; where scales are per head, each run of `head_dim` elements has its own.
pub(crate) fn fake_quantize<D: Device>(
    device: &D,
    x: &mut CudaBuffer<D::Memory>,
    quantizer: &Quantizer,
    head_dim: usize,
    windows: &[Range<usize>],
) -> Result<(), KernelError> {
    let target = Target::alone(Output::Values, x.address::<D>(), Format::F32);
    quantize(device, &Source::given(x), target, quantizer, head_dim, windows)
}

/// Consecutive elements of a row that share a scale.
fn run_length(activation: Activation, width: usize, head_dim: usize) -> usize {
    match activation.sharing {
        ActivationSharing::Tensor | ActivationSharing::Token => width,
        ActivationSharing::Group { size } => size,
        ActivationSharing::Head => head_dim,
    }
}

/// Rounding and range of codes.
fn code(code: Code) -> (Rounding, f32, f32) {
    match code {
        Code::Int { bits } => {
            let half = f32::from(1_u16 << (bits - 1));
            (Rounding::Integers, -half, half - 1.0)
        }
        Code::E2m1 => (Rounding::E2m1, -6.0, 6.0),
        Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => (Rounding::E4m3, -448.0, 448.0),
    }
}

/// Quantizes all rows, which `windows` share out among them.
fn quantize<D: Device>(
    device: &D,
    source: &Source<'_, D::Memory>,
    target: Target,
    quantizer: &Quantizer,
    head_dim: usize,
    windows: &[Range<usize>],
) -> Result<(), KernelError> {
    let (x, activation) = (source.x, quantizer.activation);
    if x.len() == 0 {
        return Ok(());
    }
    let stored_runs = has_stored_runs(quantizer, target.output);
    let length = shared_length(quantizer, target.output, x.width, head_dim);
    let runs = x.width.div_ceil(length);
    let scale = match activation.scale {
        ActivationScale::Static => Scale::Static,
        ActivationScale::Dynamic => Scale::Dynamic,
        ActivationScale::Local => Scale::Local,
        ActivationScale::PowerOfTwo => Scale::PowerOfTwo,
    };
    let stored =
        (!quantizer.scales.is_empty()).then(|| table_of_floats(device, &quantizer.scales)).transpose()?;
    let looks_at_windows = looks_at_windows(activation, target.output);
    let whole = looks_at_windows.then(|| window_ranges(device, x, windows)).transpose()?;
    let (rounding, low, high) = code(activation.code);
    let lanes = length.next_power_of_two().min(WARP);
    let args = QuantizeArgs {
        x: x.address::<D>(),
        out: target.values,
        scales: target.scales,
        offsets: target.offsets,
        stored: stored.as_ref().map_or(Address::NULL, |stored| D::address(stored)),
        ranges: whole.as_ref().map_or(Address::NULL, |whole| D::address(&whole.ranges)),
        windows: whole.as_ref().map_or(Address::NULL, |whole| D::address(&whole.of_rows)),
        rows: x.rows as u64,
        width: x.width as u32,
        stride: target.format.stride(x.width) as u32,
        length: length as u32,
        runs: runs as u32,
        lanes: lanes as u32,
        rounding,
        scale,
        output: target.output,
        symmetric: u32::from(activation.symmetric),
        stored_runs: u32::from(stored_runs),
        format: target.format,
        low,
        high,
        zero: quantizer.zero,
        global: quantizer.global_scale,
        padding: 0,
    };
    match source.making {
        Making::Given => {
            let blocks = (x.rows * runs).div_ceil(THREADS / lanes);
            device.launch(Queue::Compute, "quantize_runs", [blocks, 1, 1], &args)
        }
        Making::Normed { .. } | Making::Gated { .. } => rows::launch(device, source, Runs::Of(length), args),
    }
}

/// Smallest and largest values, f32 [windows, 2], and the window of every row, u32 [rows].
struct WindowRanges<M> {
    ranges: M,
    of_rows: Arc<M>,
}

/// `RangeArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct RangeArgs {
    x: Address,
    ranges: Address,
    rows: u64,
    width: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in quantize.cu.
unsafe impl Arguments for RangeArgs {}

/// `FoldArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct FoldArgs {
    rows: Address,
    windows: Address,
    ranges: Address,
}

// SAFETY: as the structure of that name in quantize.cu.
unsafe impl Arguments for FoldArgs {}

/// Smallest and largest value of each window.
fn window_ranges<D: Device>(
    device: &D,
    x: &CudaBuffer<D::Memory>,
    windows: &[Range<usize>],
) -> Result<WindowRanges<D::Memory>, KernelError> {
    let mut of_rows = vec![u32::MAX; x.rows];
    let mut bounds = Vec::with_capacity(2 * windows.len());
    for (window, index) in windows.iter().zip(0..) {
        of_rows[window.clone()].fill(index);
        bounds.extend([window.start as u32, window.end as u32]);
    }
    assert!(!of_rows.contains(&u32::MAX), "every row belongs to a window");
    let (of_rows, bounds) = (table_of_integers(device, &of_rows)?, table_of_integers(device, &bounds)?);
    let rows = device.allocate(x.rows * 8)?;
    let args = RangeArgs {
        x: x.address::<D>(),
        ranges: D::address(&rows),
        rows: x.rows as u64,
        width: x.width as u32,
        padding: 0,
    };
    device.launch(Queue::Compute, "range_rows", [x.rows.div_ceil(THREADS / WARP), 1, 1], &args)?;
    let ranges = device.allocate(windows.len() * 8)?;
    let args =
        FoldArgs { rows: D::address(&rows), windows: D::address(&bounds), ranges: D::address(&ranges) };
    device.launch(Queue::Compute, "range_windows", [windows.len(), 1, 1], &args)?;
    Ok(WindowRanges { ranges, of_rows })
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/quantize.rs"]
mod tests;
