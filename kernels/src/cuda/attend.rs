//! Causal attention: `kernels/cuda/attention_bf16.cu` and `kernels/cuda/attention_f32.cu`; `hopper` has the third
//! kernel. Cuts windows into pieces of work and finds the kernel for a head's size.
#![expect(unsafe_code, reason = "arguments of kernels")]

mod hopper;
mod path;

pub use self::path::AttentionPath;

use std::ops::Range;

use crate::backend::{AttentionShape, Span};
use crate::cuda::buffer::{CudaBuffer, upload_floats, upload_integers};
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::{Compute, KernelError};
use bytemuck::NoUninit;

/// Keys of one tile.
const KEYS: usize = 64;

/// `AttendPackArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct AttendPackArgs {
    from: Address,
    to: Address,
    rows: u64,
    heads: u32,
    first_head: u32,
    head_dim: u32,
    padded_dim: u32,
}

// SAFETY: as the structure of that name in attention_bf16.cu.
unsafe impl Arguments for AttendPackArgs {}

/// `AttendBf16Args`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct AttendBf16Args {
    queries: Address,
    keys: Address,
    values: Address,
    output: Address,
    items: Address,
    sinks: Address,
    rows: u64,
    heads: u32,
    first_head: u32,
    group: u32,
    first_kv_head: u32,
    head_dim: u32,
    scoring: Scoring,
}

// SAFETY: as the structure of that name in attention_bf16.cu.
unsafe impl Arguments for AttendBf16Args {}

/// `attention::Scoring`, a part of arguments.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Scoring {
    window: u32,
    scale: f32,
    softcap: f32,
}

impl Scoring {
    fn new(shape: &AttentionShape, extras: Extras<'_>) -> Scoring {
        Scoring { window: positions_seen(shape), scale: scale(shape), softcap: extras.softcap.unwrap_or(0.0) }
    }
}

/// `AttendF32Args`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct AttendF32Args {
    queries: Address,
    keys: Address,
    values: Address,
    output: Address,
    items: Address,
    scores: Address,
    pitch: u64,
    work: u64,
    blocks: u64,
    heads: u32,
    kv_heads: u32,
    first_head: u32,
    group: u32,
    head_dim: u32,
    window: u32,
    scale: f32,
    padding: u32,
}

// SAFETY: as the structure of that name in attention_f32.cu.
unsafe impl Arguments for AttendF32Args {}

/// Which positions are asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    /// Rows of queries, and of the output: one span a window.
    pub(crate) queries: &'a [Span],
    /// Rows of keys and values of each window.
    pub(crate) windows: &'a [Range<usize>],
}

/// What some models add to the softmax.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extras<'a> {
    /// Scores become `softcap * tanh(score / softcap)`.
    pub(crate) softcap: Option<f32>,
    /// One logit for each of the model's query heads, which takes part in the softmax without a value.
    pub(crate) sinks: Option<&'a [f32]>,
}

/// Attention of the query heads `heads`, whose columns are all that `q` holds, each window by itself and for the
/// positions that are [`Asked`]: [rows of q, heads.len() * head_dim].
///
/// # Errors
/// With bf16 where a head has more than 256 dimensions; where the device fails.
pub(crate) fn attend<D: Device>(
    device: &D,
    [q, k, v]: [&CudaBuffer<D::Memory>; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    compute: Compute,
    asked_for: Option<AttentionPath>,
    asked: Asked<'_>,
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    match compute {
        Compute::Bf16 => {
            let path = path::path(device, asked_for, shape);
            bf16(device, [q, k, v], shape, heads, path, asked, Extras::default())
        }
        Compute::F32 => f32(device, [q, k, v], shape, heads, asked, SCORE_BYTES),
    }
}

/// [`attend`] with bf16 operands.
fn bf16<D: Device>(
    device: &D,
    inputs: [&CudaBuffer<D::Memory>; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    path: AttentionPath,
    asked: Asked<'_>,
    extras: Extras<'_>,
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    match path {
        AttentionPath::Hopper => hopper::attend(device, inputs, shape, heads, asked, extras),
        AttentionPath::Mma => mma(device, inputs, shape, heads, asked, extras),
    }
}

/// Dimensions of a head in shared memory, and the kernel for them; heads are padded to the next.
const SIZES: [(usize, &str); 7] = [
    (32, "attend_bf16_32"),
    (64, "attend_bf16_64"),
    (80, "attend_bf16_80"),
    (96, "attend_bf16_96"),
    (128, "attend_bf16_128"),
    (192, "attend_bf16_192"),
    (256, "attend_bf16_256"),
];

/// [`bf16`] by the kernel that runs everywhere.
fn mma<D: Device>(
    device: &D,
    [q, k, v]: [&CudaBuffer<D::Memory>; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    asked: Asked<'_>,
    extras: Extras<'_>,
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    /// Queries of one block.
    const QUERIES: usize = 64;
    let Some((padded_dim, kernel)) = SIZES.into_iter().find(|(size, _)| shape.head_dim <= *size) else {
        let what = format!(
            "attention with --compute bf16 is there for heads of at most 256 dimensions, not {}",
            shape.head_dim
        );
        return Err(KernelError::Device { device: device.identity().isa, what });
    };
    let output = CudaBuffer::new(device, q.rows, heads.len() * shape.head_dim)?;
    let items = items(asked, QUERIES);
    if output.len() == 0 || items.is_empty() {
        return Ok(output);
    }
    let group = shape.heads / shape.kv_heads;
    let kv_heads = heads.start / group..(heads.end - 1) / group + 1;
    let keys = pack(device, k, shape, kv_heads.clone(), padded_dim)?;
    let values = pack(device, v, shape, kv_heads.clone(), padded_dim)?;
    let sinks = extras.sinks.map(|sinks| upload_floats(device, &sinks[heads.clone()])).transpose()?;
    let table = upload_integers(device, items.as_flattened())?;
    let args = AttendBf16Args {
        queries: q.address::<D>(),
        keys: D::address(&keys),
        values: D::address(&values),
        output: output.address::<D>(),
        items: D::address(&table),
        sinks: sinks.as_ref().map_or(Address::NULL, D::address),
        rows: k.rows as u64,
        heads: heads.len() as u32,
        first_head: heads.start as u32,
        group: group as u32,
        first_kv_head: kv_heads.start as u32,
        head_dim: shape.head_dim as u32,
        scoring: Scoring::new(shape, extras),
    };
    device.launch(Queue::Compute, kernel, [items.len(), heads.len(), 1], &args)?;
    Ok(output)
}

/// Heads `heads` of `x` rounded to bf16, one after the other: [heads][rows][padded_dim].
fn pack<D: Device>(
    device: &D,
    x: &CudaBuffer<D::Memory>,
    shape: &AttentionShape,
    heads: Range<usize>,
    padded_dim: usize,
) -> Result<D::Memory, KernelError> {
    /// Elements that one block writes: eight for each of `ATTEND_PACK_THREADS`.
    const ELEMENTS: usize = 256 * 8;
    let memory = device.allocate(heads.len() * x.rows * padded_dim * 2)?;
    let args = AttendPackArgs {
        from: x.address::<D>(),
        to: D::address(&memory),
        rows: x.rows as u64,
        heads: shape.kv_heads as u32,
        first_head: heads.start as u32,
        head_dim: shape.head_dim as u32,
        padded_dim: padded_dim as u32,
    };
    let blocks = (x.rows * padded_dim).div_ceil(ELEMENTS);
    device.launch(Queue::Compute, "attend_pack", [blocks, heads.len(), 1], &args)?;
    Ok(memory)
}

/// Device memory for scores of f32 attention, where that is enough for a useful number of blocks.
const SCORE_BYTES: usize = 256 << 20;

/// [`attend`] with f32 operands; scores take about `score_bytes` of device memory.
fn f32<D: Device>(
    device: &D,
    [q, k, v]: [&CudaBuffer<D::Memory>; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    asked: Asked<'_>,
    score_bytes: usize,
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    /// Queries of one block, as in the CPU backend.
    const QUERIES: usize = 24;
    /// Fewer blocks would leave most of a device idle.
    const FEWEST_BLOCKS: usize = 16;
    let output = CudaBuffer::new(device, q.rows, heads.len() * shape.head_dim)?;
    let items = items(asked, QUERIES);
    if output.len() == 0 || items.is_empty() {
        return Ok(output);
    }
    let pitch = longest_row(asked.windows, QUERIES, shape.window);
    let bytes = QUERIES * pitch * size_of::<f32>();
    let work = items.len() * heads.len();
    let blocks = work.min((score_bytes / bytes).clamp(FEWEST_BLOCKS, 1 << 16));
    let scores = device.allocate(blocks * bytes)?;
    let table = upload_integers(device, items.as_flattened())?;
    let args = AttendF32Args {
        queries: q.address::<D>(),
        keys: k.address::<D>(),
        values: v.address::<D>(),
        output: output.address::<D>(),
        items: D::address(&table),
        scores: D::address(&scores),
        pitch: pitch as u64,
        work: work as u64,
        blocks: blocks as u64,
        heads: heads.len() as u32,
        kv_heads: shape.kv_heads as u32,
        first_head: heads.start as u32,
        group: (shape.heads / shape.kv_heads) as u32,
        head_dim: shape.head_dim as u32,
        window: positions_seen(shape),
        scale: scale(shape),
        padding: 0,
    };
    device.launch(Queue::Compute, "attend_f32", [blocks, 1, 1], &args)?;
    Ok(output)
}

/// Runs of at most `queries` queries of each window, `attention::Item`: the window's first row and length, the position
/// of the first query, and which positions are there and where. Those that see most keys come first.
fn items(asked: Asked<'_>, queries: usize) -> Vec<[u32; 6]> {
    let of_window = |(window, span): (&Range<usize>, &Span)| -> Vec<[u32; 6]> {
        let there = span.positions();
        let item = |first: usize| {
            [window.start, window.len(), first, there.start, there.end, span.rows.start]
                .map(|number| number as u32)
        };
        let firsts = there.start / queries * queries..there.end;
        let firsts = if there.is_empty() { 0..0 } else { firsts };
        firsts.step_by(queries).rev().map(item).collect()
    };
    asked.windows.iter().zip(asked.queries).flat_map(of_window).collect()
}

/// Keys in the tiles that any run of `queries` queries sees: at most those of its own last tile and all before, or of
/// the tiles that a sliding window and the run touch.
fn longest_row(windows: &[Range<usize>], queries: usize, seen: Option<usize>) -> usize {
    let longest = windows.iter().map(ExactSizeIterator::len).max().unwrap_or(0).next_multiple_of(KEYS);
    let sliding = seen.map_or(usize::MAX, |seen| seen.saturating_add(queries + 2 * KEYS) / KEYS * KEYS);
    longest.min(sliding)
}

/// Positions that a query sees, itself included.
fn positions_seen(shape: &AttentionShape) -> u32 {
    shape.window.map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX))
}

/// `1 / sqrt(head_dim)`.
fn scale(shape: &AttentionShape) -> f32 {
    1.0 / (shape.head_dim as f32).sqrt()
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/attend.rs"]
mod tests;
