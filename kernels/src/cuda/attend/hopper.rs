//! bf16 attention on warpgroups: `kernels/cuda/attention_hopper.cu`. Lays windows out in tiles and shares the pieces of
//! work among as many blocks as run at once.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::cmp::Reverse;
use std::ops::Range;

use super::{Asked, Extras, KEYS, Scoring, items};
use crate::KernelError;
use crate::backend::AttentionShape;
use crate::cuda::buffer::{CudaBuffer, upload_floats, upload_integers};
use crate::cuda::device::{Address, Arguments, Device, Queue, TensorElement, TensorMap, TensorTile};
use bytemuck::NoUninit;

/// Queries of one piece of work: 64 for each of two warpgroups.
const QUERIES: usize = 128;

/// `AttendWindowsArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct AttendWindowsArgs {
    keys: Address,
    values: Address,
    packed_keys: Address,
    packed_values: Address,
    tiles: Address,
    tile_count: u32,
    heads: u32,
    first_head: u32,
    head_dim: u32,
    padded_dim: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in attention_hopper.cu.
unsafe impl Arguments for AttendWindowsArgs {}

/// `AttendHopperArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct AttendHopperArgs {
    keys: TensorMap,
    values: TensorMap,
    queries: Address,
    output: Address,
    items: Address,
    sinks: Address,
    padded_rows: u32,
    work: u32,
    blocks: u32,
    heads: u32,
    first_head: u32,
    group: u32,
    first_kv_head: u32,
    head_dim: u32,
    scoring: Scoring,
    padding: [u32; 13],
}

// SAFETY: as the structure of that name in attention_hopper.cu.
unsafe impl Arguments for AttendHopperArgs {}

/// Dimensions of a head in memory, and the kernel for them; heads are padded to the next.
const SIZES: [(usize, &str); 3] =
    [(64, "attend_hopper_64"), (96, "attend_hopper_96"), (128, "attend_hopper_128")];

/// Whether heads of this shape are computed here. Depends on nothing else, so that bits do not either.
pub(super) fn takes(shape: &AttentionShape) -> bool {
    size_of_heads(shape).is_some()
}

fn size_of_heads(shape: &AttentionShape) -> Option<(usize, &'static str)> {
    // Rows are read in runs of eight dimensions.
    let whole = shape.head_dim.is_multiple_of(8);
    SIZES.into_iter().find(|(size, _)| whole && shape.head_dim <= *size)
}

/// [`super::bf16`] of heads that this [`takes`], on a device with warpgroups.
pub(super) fn attend<D: Device>(
    device: &D,
    [q, k, v]: [&CudaBuffer<D::Memory>; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    asked: Asked<'_>,
    extras: Extras<'_>,
) -> Result<CudaBuffer<D::Memory>, KernelError> {
    let (padded_dim, kernel) = size_of_heads(shape).expect("the caller has asked whether they are taken");
    let output = CudaBuffer::new(device, q.rows, heads.len() * shape.head_dim)?;
    let tiles = Tiles::of(asked.windows);
    let items = tiles.sorted_items(asked, shape);
    if output.len() == 0 || items.is_empty() {
        return Ok(output);
    }
    let group = shape.heads / shape.kv_heads;
    let kv_heads = heads.start / group..(heads.end - 1) / group + 1;
    let [keys, values] = pack(device, [k, v], shape, kv_heads.clone(), padded_dim, &tiles)?;
    let map = |memory: &D::Memory| {
        device.tensor_map(&TensorTile {
            address: D::address(memory),
            rows: kv_heads.len() * tiles.rows(),
            columns: padded_dim,
            row_bytes: padded_dim * 2,
            box_rows: KEYS,
            element: TensorElement::Bf16,
        })
    };
    let sinks = extras.sinks.map(|sinks| upload_floats(device, &sinks[heads.clone()])).transpose()?;
    let table = upload_integers(device, items.as_flattened())?;
    let work = items.len() * heads.len();
    let blocks = work.min(device.multiprocessors());
    let args = AttendHopperArgs {
        keys: map(&keys)?,
        values: map(&values)?,
        queries: q.address::<D>(),
        output: output.address::<D>(),
        items: D::address(&table),
        sinks: sinks.as_ref().map_or(Address::NULL, D::address),
        padded_rows: tiles.rows() as u32,
        work: work as u32,
        blocks: blocks as u32,
        heads: heads.len() as u32,
        first_head: heads.start as u32,
        group: group as u32,
        first_kv_head: kv_heads.start as u32,
        head_dim: shape.head_dim as u32,
        scoring: Scoring::new(shape, extras),
        padding: [0; 13],
    };
    device.launch(Queue::Compute, kernel, [blocks, 1, 1], &args)?;
    Ok(output)
}

/// Where windows lie when each begins a tile of its own.
struct Tiles {
    /// Of each tile its first row of what is packed, and how many there are.
    sources: Vec<[u32; 2]>,
    /// Rows of each window among the tiles, those that are there.
    windows: Vec<Range<usize>>,
}

impl Tiles {
    fn of(windows: &[Range<usize>]) -> Tiles {
        let mut tiles = Tiles { sources: Vec::new(), windows: Vec::with_capacity(windows.len()) };
        for window in windows {
            let start = tiles.rows();
            tiles.windows.push(start..start + window.len());
            let tile = |first: usize| [first as u32, KEYS.min(window.end - first) as u32];
            tiles.sources.extend(window.clone().step_by(KEYS).map(tile));
        }
        tiles
    }

    /// Rows of all tiles.
    fn rows(&self) -> usize {
        self.sources.len() * KEYS
    }

    /// Runs of queries, those that see most tiles first.
    fn sorted_items(&self, asked: Asked<'_>, shape: &AttentionShape) -> Vec<[u32; 6]> {
        let mut items = items(Asked { windows: &self.windows, ..asked }, QUERIES);
        items.sort_by_key(|[_, length, first, ..]| {
            let last = (*first as usize + QUERIES).min(*length as usize) - 1;
            let earliest = shape.window.map_or(0, |seen| (*first as usize + 1).saturating_sub(seen));
            Reverse(last / KEYS - earliest / KEYS)
        });
        items
    }
}

/// Heads `heads` of keys and of values rounded to bf16, one after the other: [heads][rows of tiles][padded_dim].
fn pack<D: Device>(
    device: &D,
    [k, v]: [&CudaBuffer<D::Memory>; 2],
    shape: &AttentionShape,
    heads: Range<usize>,
    padded_dim: usize,
    tiles: &Tiles,
) -> Result<[D::Memory; 2], KernelError> {
    let bytes = heads.len() * tiles.rows() * padded_dim * 2;
    let packed = [device.allocate(bytes)?, device.allocate(bytes)?];
    let table = upload_integers(device, tiles.sources.as_flattened())?;
    let args = AttendWindowsArgs {
        keys: k.address::<D>(),
        values: v.address::<D>(),
        packed_keys: D::address(&packed[0]),
        packed_values: D::address(&packed[1]),
        tiles: D::address(&table),
        tile_count: tiles.sources.len() as u32,
        heads: shape.kv_heads as u32,
        first_head: heads.start as u32,
        head_dim: shape.head_dim as u32,
        padded_dim: padded_dim as u32,
        padding: 0,
    };
    device.launch(Queue::Compute, "attend_windows", [tiles.sources.len(), heads.len(), 2], &args)?;
    Ok(packed)
}
