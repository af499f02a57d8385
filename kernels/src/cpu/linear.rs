//! `x * W^T` on packed weights.
//!
//! Decides which arithmetic an operand asks for; the products themselves are in [`super::row_tiles`] and
//! [`super::exact`].

use std::ops::Range;

use crate::backend::KernelError;
use crate::cpu::exact;
use crate::cpu::matrix::CpuMatrix;
use crate::cpu::quantize::{CpuOperand, OperandKind};
use crate::cpu::row_tiles::{sums, tiles};
use crate::cpu::weights::{Decode, RowTile};
use crate::cpu::{CpuBuffer, Isa};

/// Output rows `rows` (of the whole matrix) for every row of `x`, without the bias: [count, rows].
pub(crate) fn linear(
    isa: Isa,
    x: &CpuOperand,
    weight: &CpuMatrix,
    rows: Range<usize>,
) -> Result<CpuBuffer, KernelError> {
    let permuted;
    let x = match &weight.permutation {
        None => x,
        Some(permutation) => {
            permuted = CpuOperand { strips: x.strips.permuted(permutation), kind: x.kind.clone() };
            &permuted
        }
    };
    debug_assert_eq!(x.strips.k, weight.k());
    match &x.kind {
        OperandKind::Values => Ok(tiles(x.rows(), rows, |mut task, workspace| {
            let tile = RowTile::new(isa, weight, task.tile, Decode::Operand);
            sums(isa, &tile, &x.strips, &mut task, workspace);
        })),
        OperandKind::Codes(codes) => exact::codes(isa, &x.strips, codes, weight, rows),
        OperandKind::Scaled { activation, global } => {
            exact::scaled(isa, &x.strips, (*activation, *global), weight, rows)
        }
    }
}
