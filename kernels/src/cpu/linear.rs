//! `x * W^T` on packed weights.
//!
//! Decides which arithmetic an operand asks for; the products themselves are in [`super::row_tiles`] and
//! [`super::exact`].

use std::ops::Range;

use rayon::prelude::*;

use crate::Compute;
use crate::backend::KernelError;
use crate::cpu::decode::{Decode, RowTile};
use crate::cpu::exact;
use crate::cpu::matrix::CpuMatrix;
use crate::cpu::quantize::{CpuOperand, OperandKind};
use crate::cpu::row_tiles::{blocked_chains, chains, tiles};
use crate::cpu::{CpuBuffer, Isa};

/// Output rows `rows` (of the whole matrix) for every row of `x`, without the bias: [count, rows].
pub(crate) fn linear(
    isa: Isa,
    x: &CpuOperand,
    weight: &CpuMatrix,
    rows: Range<usize>,
    compute: Compute,
) -> Result<CpuBuffer, KernelError> {
    let permuted;
    let x = match &weight.permutation {
        None => x,
        Some(permutation) => {
            permuted = permute(x, permutation);
            &permuted
        }
    };
    match &x.kind {
        OperandKind::Values => Ok(tiles(x, weight, rows, |tile, inputs, out| {
            let tile = RowTile::new(weight, tile, Decode::Operand(compute));
            match compute {
                Compute::F32 => blocked_chains(isa, &tile, x.k, x.range(inputs), out),
                Compute::Bf16 => chains(isa, &tile, x.k, x.range(inputs), out),
            }
        })),
        OperandKind::Codes { .. } | OperandKind::Scaled { .. } => exact::linear(isa, x, weight, rows),
    }
}

/// Columns in the order of the tiles: act-order.
fn permute(x: &CpuOperand, permutation: &[u32]) -> CpuOperand {
    let mut values = vec![0.0; x.values.len()];
    values.par_chunks_mut(x.k).zip(x.values.par_chunks(x.k)).for_each(|(out, row)| {
        for (out, input) in out.iter_mut().zip(permutation) {
            *out = row[*input as usize];
        }
    });
    CpuOperand { k: x.k, values, kind: x.kind.clone() }
}
