//! Which experts a token goes to: `kernels/cuda/route.cu`. The device chooses for each token; lists by expert are made
//! here.
#![expect(unsafe_code, reason = "arguments of kernels")]

use bytemuck::NoUninit;

use crate::KernelError;
use crate::cuda::buffer::{CudaBuffer, download_floats, download_integers};
use crate::cuda::device::{Address, Arguments, Device, Queue};
use crate::route::{ExpertTokens, Renormalize};

/// Tokens that one block covers: warps of `ROUTE_THREADS`.
const TOKENS: usize = 8;

/// `RouteArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct RouteArgs {
    logits: Address,
    ids: Address,
    weights: Address,
    tokens: u64,
    experts: u32,
    top_k: u32,
    renormalize: u32,
    padding: u32,
}

// SAFETY: as the structure of that name in route.cu.
unsafe impl Arguments for RouteArgs {}

/// Softmax over all experts in f64, the `top_k` largest (the lower index of equals), divided as `renormalize` says.
/// `logits` is [tokens, experts].
pub(crate) fn route<D: Device>(
    device: &D,
    logits: &CudaBuffer<D::Memory>,
    top_k: usize,
    renormalize: Renormalize,
) -> Result<Vec<ExpertTokens>, KernelError> {
    let (tokens, experts) = (logits.rows, logits.width);
    let top_k = top_k.min(experts);
    let mut lists = vec![ExpertTokens::default(); experts];
    if tokens * top_k == 0 {
        return Ok(lists);
    }
    let (ids, weights) = (device.allocate(tokens * top_k * 4)?, device.allocate(tokens * top_k * 4)?);
    let args = RouteArgs {
        logits: logits.address::<D>(),
        ids: D::address(&ids),
        weights: D::address(&weights),
        tokens: tokens as u64,
        experts: experts as u32,
        top_k: top_k as u32,
        renormalize: match renormalize {
            Renormalize::All => 0,
            Renormalize::Chosen => 1,
        },
        padding: 0,
    };
    device.launch(Queue::Compute, "route", [tokens.div_ceil(TOKENS), 1, 1], &args)?;
    let ids = download_integers(device, &ids, tokens * top_k)?;
    let weights = download_floats(device, &weights, tokens * top_k)?;
    for (row, (ids, weights)) in (0..).zip(ids.chunks_exact(top_k).zip(weights.chunks_exact(top_k))) {
        for (id, weight) in ids.iter().zip(weights) {
            let list = &mut lists[*id as usize];
            list.rows.push(row);
            list.weights.push(*weight);
        }
    }
    Ok(lists)
}

#[cfg(all(test, feature = "emulated"))]
#[path = "tests/route.rs"]
mod tests;
