//! Choices of arithmetic that a result must name. What each means is in NUMERICS.md.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Revision of NUMERICS.md: raised whenever the bits of a score may change.
pub const NUMERICS_REVISION: u32 = 2;

/// Precision of the operands of linears and attention; sums are f32 in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Operands are rounded to bf16.
    Bf16,
    /// Operands are f32: nothing is rounded but sums and products.
    F32,
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compute::Bf16 => "bf16",
            Compute::F32 => "f32",
        })
    }
}
