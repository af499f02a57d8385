//! Products of packed inputs and packed weights, `out[m][n] += sum over k of x[m][k] * w[n][k]`: the one register-blocked
//! kernel that linears, scores, values and logits go through. Knows words and sums; no codes, no scales, no tiles.
//!
//! Inputs lie in strips of [`STRIP`] rows, weights in halves of [`HALF`] outputs; both step by step along k, a 32-bit
//! word of each row or output a step. What a word holds is its [`Unit`]. Lanes run across outputs and never along a
//! sum, so every instruction set gives the same bits.

mod dot;
mod strip;
#[cfg(test)]
mod tests;
mod times;
mod transpose;

pub(crate) use self::strip::{Strips, Words, pack_rows};
pub(crate) use self::times::{Begin, Out, Product, finish, multiply};
pub(crate) use self::transpose::transpose;

use crate::Compute;
use crate::cpu::Isa;

/// Rows of inputs that lie together.
pub(crate) const STRIP: usize = 12;

/// Outputs whose weights lie together.
pub(crate) const HALF: usize = 32;

/// What a 32-bit word along k holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// One f32; k ascends.
    Float,
    /// One f32; the odd k of a pair comes before the even one, which is the order of `vdpbf16ps`.
    SwappedFloat,
    /// Two bf16, the even k in the low half.
    Pair,
    /// Four bytes: inputs unsigned, weights signed.
    Quad,
    /// Two 16-bit integers, the even k in the low half.
    Short,
}

impl Unit {
    /// For floats in a compute mode's order of sums; bf16 operands where the mode rounds to them.
    pub(crate) fn floats(isa: Isa, compute: Compute) -> Unit {
        match (compute, isa) {
            (Compute::F32, _) => Unit::Float,
            (Compute::Bf16, Isa::Avx512Bf16) => Unit::Pair,
            (Compute::Bf16, Isa::Avx512 | Isa::Avx2 | Isa::Portable) => Unit::SwappedFloat,
        }
    }

    /// For codes that are integers.
    pub(crate) fn integers(isa: Isa) -> Unit {
        match isa {
            Isa::Avx512Bf16 => Unit::Quad,
            Isa::Avx512 | Isa::Avx2 | Isa::Portable => Unit::Short,
        }
    }

    /// k of one word.
    pub(crate) const fn k(self) -> usize {
        match self {
            Unit::Float | Unit::SwappedFloat => 1,
            Unit::Pair | Unit::Short => 2,
            Unit::Quad => 4,
        }
    }

    /// Words that `k` inputs take; a pair is never cut.
    pub(crate) const fn steps(self, k: usize) -> usize {
        match self {
            Unit::Float => k,
            Unit::SwappedFloat => k.next_multiple_of(2),
            Unit::Pair | Unit::Short | Unit::Quad => k.div_ceil(self.k()),
        }
    }
}
