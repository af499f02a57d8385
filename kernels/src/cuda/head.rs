//! Logits folded into partial log-sum-exps: `kernels/cuda/head.cu` and `head_hopper.cu`. Logits of a whole vocabulary are never stored: the
//! fused kernels fold them where they are made, other products make a part of the vocabulary at a time.
#![expect(unsafe_code, reason = "arguments of kernels")]

use std::ops::Range;

use bytemuck::NoUninit;
use ctq_container::TILE;
use rayon::prelude::*;

use crate::KernelError;
use crate::backend::{HeadTiles, VOCABULARY_TILE};
use crate::cuda::Cuda;
use crate::cuda::buffer::{CudaOperand, download_floats, upload_integers};
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::cuda::linear::format::{Format, format};
use crate::cuda::linear::hopper::{self, ProductArgs, Staged};
use crate::cuda::linear::{Bf16Path, FusedProduct, Input, Output, fused_product, path, product};
use crate::cuda::matrix::{CudaMatrix, MatrixArgs};

/// Tokens that one block covers: `PRODUCT_TOKENS` and `STAGED_TOKENS`.
const PRODUCT_TOKENS: usize = 128;
const FOLD_TOKENS: usize = 64;

/// Tokens whose logits are stored at a time, and bytes of them; a part of the vocabulary is whole chunks of a dense
/// product.
const STORED_TOKENS: usize = 16_384;
const STORED_BYTES: usize = 128 << 20;
const STORED_COLUMNS: usize = 2048;

/// One a format of the kernels on warpgroups.
const HOPPER_KERNELS: [&str; 8] = [
    "head_hopper_int4",
    "head_hopper_int4_f32",
    "head_hopper_e2m1",
    "head_hopper_int8",
    "head_hopper_int8_f32",
    "head_hopper_e4m3",
    "head_hopper_e4m3_f32",
    "head_hopper_bf16",
];

const KERNELS: [&str; 7] =
    ["head_int4", "head_e2m1", "head_int8", "head_e4m3", "head_bf16", "head_f16", "head_f32"];

/// Partials worth a task of their own.
const PAIRED: usize = 1 << 14;

/// `Fold`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Fold {
    targets: Address,
    target_logits: Address,
    largest: Address,
    sums: Address,
    m: u32,
    tiles: u32,
    first_tile: u32,
    columns: u32,
}

/// `HeadArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct HeadArgs {
    matrix: MatrixArgs,
    x: Address,
    fold: Fold,
    divisor: f32,
    padding: u32,
}

// SAFETY: as the structure of that name in head.cu.
unsafe impl Arguments for HeadArgs {}

/// `HeadHopperArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct HeadHopperArgs {
    product: ProductArgs,
    fold: Fold,
    divisor: f32,
    padding: [u32; 3],
}

const _: () = assert!(size_of::<HeadHopperArgs>() == 448, "as the assertion in head_hopper.cu");

// SAFETY: as the structure of that name in head_hopper.cu.
unsafe impl Arguments for HeadHopperArgs {}

/// `FoldLogitsArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct FoldLogitsArgs {
    logits: Address,
    fold: Fold,
}

// SAFETY: as the structure of that name in head.cu.
unsafe impl Arguments for FoldLogitsArgs {}

/// Logits that are stored at a time.
#[derive(Clone, Copy, Debug)]
struct Stored {
    tokens: usize,
    /// Whole vocabulary tiles.
    columns: usize,
}

impl Stored {
    /// What fits into [`STORED_BYTES`], or the least that is worth a product.
    fn of(rows: usize) -> Stored {
        let tokens = rows.clamp(1, STORED_TOKENS);
        let parts = (STORED_BYTES / 4 / tokens / STORED_COLUMNS).max(1);
        Stored { tokens, columns: parts * STORED_COLUMNS }
    }
}

/// Results on the device.
struct Partials<M> {
    targets: M,
    target_logits: M,
    largest: M,
    sums: M,
    rows: usize,
    tiles: usize,
}

/// Partial log-sum-exps over rows `vocabulary` of `head`, counted from its own first row, as `targets` are. The compute
/// mode has become the operand's kind already.
pub(crate) fn head<D: Device>(
    cuda: &Cuda<D>,
    x: &CudaOperand<D::Memory>,
    head: &CudaMatrix<D::Memory>,
    vocabulary: Range<usize>,
    targets: &[Option<u32>],
) -> Result<HeadTiles, KernelError> {
    let device = cuda.device();
    let input = Input::new(device, x, head)?;
    let inside = |target: &Option<u32>| {
        target.map(|target| target as usize).filter(|target| vocabulary.contains(target))
    };
    let inside: Vec<Option<usize>> =
        targets.iter().map(|target| inside(target).map(|target| target - vocabulary.start)).collect();
    let partials = Partials::new(device, x.rows, &inside, vocabulary.len().div_ceil(VOCABULARY_TILE))?;
    let nowhere = Output { address: Address::NULL, stride: 0 };
    let product = fused_product(input.kind(), head, vocabulary.clone(), nowhere)?;
    match product.filter(begins_tiles).and_then(|product| Some((folding(cuda, &input, &product)?, product))) {
        Some((Folding::Fused, product)) => partials.fold_product(device, &input, &product)?,
        Some((Folding::Hopper(format), product)) => {
            partials.fold_on_warpgroups(device, &input, &product, format)?;
        }
        None => partials.fold_stored(cuda, &input, head, vocabulary, Stored::of(x.rows))?,
    }
    partials.download(device, &inside)
}

/// Kernels that fold logits where they are made.
enum Folding {
    Fused,
    Hopper(Format),
}

/// Those of the path that the product takes, where they take its scales: stored logits have the same bits.
fn folding<D: Device>(
    cuda: &Cuda<D>,
    x: &Input<'_, D::Memory>,
    product: &FusedProduct<'_, D::Memory>,
) -> Option<Folding> {
    match path(cuda, x.kind(), product.weight) {
        Bf16Path::Library => None,
        Bf16Path::Hopper => format(product.weight, product.worth).map(Folding::Hopper),
        Bf16Path::Fused => product.weight.has_whole_slices().then_some(Folding::Fused),
    }
}

/// The fused kernel of a product: one that knows the scheme, where there is one.
fn kernel<M>(product: &FusedProduct<'_, M>) -> &'static str {
    match format(product.weight, product.worth) {
        Some(Format::Int4) => "head_int4_bf16",
        Some(Format::E2m1) => "head_e2m1_table",
        Some(Format::Int8) => "head_int8_bf16",
        Some(Format::E4m3) => "head_e4m3_bf16",
        Some(Format::Int4F32 | Format::Int8F32 | Format::E4m3F32 | Format::Bf16) | None => {
            product.weight.class().pick(&KERNELS)
        }
    }
}

/// Whether vocabulary tiles are pairs of row tiles.
fn begins_tiles<M>(product: &FusedProduct<'_, M>) -> bool {
    (product.weight.rows.start + product.rows.start).is_multiple_of(TILE) && !product.rows.is_empty()
}

impl<M> Partials<M> {
    /// Room for `tiles` of each row; `targets` count from the first logit.
    fn new<D: Device<Memory = M>>(
        device: &D,
        rows: usize,
        targets: &[Option<usize>],
        tiles: usize,
    ) -> Result<Partials<M>, KernelError> {
        let targets: Vec<u32> =
            targets.iter().map(|target| target.map_or(u32::MAX, |target| target as u32)).collect();
        Ok(Partials {
            targets: upload_integers(device, &targets)?,
            target_logits: device.allocate(rows * 4)?,
            largest: device.allocate(rows * tiles * 4)?,
            sums: device.allocate(rows * tiles * 8)?,
            rows,
            tiles,
        })
    }

    /// Where `columns` logits of `tokens` go, the first of which belongs to `first_tile`.
    fn fold<D: Device<Memory = M>>(&self, tokens: Range<usize>, first_tile: usize, columns: usize) -> Fold {
        let at = |memory: &M, bytes: usize| D::address(memory).offset(tokens.start * bytes);
        Fold {
            targets: at(&self.targets, 4),
            target_logits: at(&self.target_logits, 4),
            largest: at(&self.largest, self.tiles * 4),
            sums: at(&self.sums, self.tiles * 8),
            m: tokens.len() as u32,
            tiles: self.tiles as u32,
            first_tile: first_tile as u32,
            columns: columns as u32,
        }
    }

    /// On tensor cores, logits folded in shared memory.
    fn fold_product<D: Device<Memory = M>>(
        &self,
        device: &D,
        x: &Input<'_, M>,
        product: &FusedProduct<'_, M>,
    ) -> Result<(), KernelError> {
        let args = HeadArgs {
            matrix: product.weight.args::<D>(product.rows.clone(), product.worth),
            x: x.values::<D>(0),
            fold: self.fold::<D>(0..self.rows, 0, product.rows.len()),
            divisor: product.divisor,
            padding: 0,
        };
        let blocks = [self.tiles, self.rows.div_ceil(PRODUCT_TOKENS), 1];
        device.launch(Queue::Compute, kernel(product), blocks, &args)
    }

    /// The same on warpgroups.
    fn fold_on_warpgroups<D: Device<Memory = M>>(
        &self,
        device: &D,
        x: &Input<'_, M>,
        product: &FusedProduct<'_, M>,
        format: Format,
    ) -> Result<(), KernelError> {
        if self.rows == 0 {
            return Ok(());
        }
        let weight = product.weight;
        let staged =
            Staged::new(device, weight, weight.args::<D>(product.rows.clone(), product.worth), format)?;
        let args = HeadHopperArgs {
            product: hopper::product_args(device, x, &(0..self.rows), weight.stride(), &staged)?,
            fold: self.fold::<D>(0..self.rows, 0, product.rows.len()),
            divisor: product.divisor,
            padding: [0; 3],
        };
        let blocks = [args.product.blocks as usize, 1, 1];
        device.launch(Queue::Compute, format.pick(&HOPPER_KERNELS), blocks, &args)
    }

    /// Any other product: logits of some tokens and a part of the vocabulary, then folded.
    fn fold_stored<D: Device<Memory = M>>(
        &self,
        cuda: &Cuda<D>,
        x: &Input<'_, M>,
        head: &CudaMatrix<M>,
        vocabulary: Range<usize>,
        stored: Stored,
    ) -> Result<(), KernelError> {
        let device = cuda.device();
        let part = stored.columns.min(vocabulary.len().max(1));
        let logits = device.allocate(stored.tokens.min(self.rows) * part * 4)?;
        for token in (0..self.rows).step_by(stored.tokens) {
            let tokens = token..self.rows.min(token + stored.tokens);
            for start in vocabulary.clone().step_by(part) {
                let rows = start..vocabulary.end.min(start + part);
                let columns = rows.len();
                let y = Output { address: D::address(&logits), stride: columns };
                product(cuda, x, tokens.clone(), head, rows, y)?;
                let first_tile = (start - vocabulary.start) / VOCABULARY_TILE;
                let args = FoldLogitsArgs {
                    logits: y.address,
                    fold: self.fold::<D>(tokens.clone(), first_tile, columns),
                };
                let blocks = [columns.div_ceil(VOCABULARY_TILE), tokens.len().div_ceil(FOLD_TOKENS), 1];
                device.launch(Queue::Compute, "fold_logits", blocks, &args)?;
            }
        }
        Ok(())
    }

    fn download<D: Device<Memory = M>>(
        &self,
        device: &D,
        targets: &[Option<usize>],
    ) -> Result<HeadTiles, KernelError> {
        let count = self.rows * self.tiles;
        let (mut largest, mut sums) = (vec![0_f32; count], vec![0_f64; count]);
        device.download(&self.largest, 0, bytemuck::cast_slice_mut(&mut largest))?;
        device.download(&self.sums, 0, bytemuck::cast_slice_mut(&mut sums))?;
        let logits = download_floats(device, &self.target_logits, self.rows)?;
        Ok(HeadTiles {
            tiles: self.tiles,
            // The device waits meanwhile.
            partials: largest.into_par_iter().zip(sums).with_min_len(PAIRED).collect(),
            targets: targets.iter().zip(logits).map(|(target, logit)| target.map(|_| logit)).collect(),
        })
    }
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/head.rs"]
mod tests;
