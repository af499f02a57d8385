//! Which products of codes are defined, and over which runs of k they are summed: the same for every backend. Knows
//! codes and scales, not how a product is computed.

use ctq_model::matrix::{Code, Formula};
use ctq_model::scheme::Activation;

use crate::KernelError;

/// Codes that are multiplied at once, at most; no segment begins among them.
const WORD: usize = 4;

/// What a product must know of its weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights {
    pub(crate) code: Code,
    pub(crate) formula: Formula,
    pub(crate) k: usize,
    /// k of one run that shares a scale.
    pub(crate) group: usize,
    /// Whether act-order has changed the order of the inputs.
    pub(crate) permuted: bool,
}

/// How sums of products of codes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sums {
    /// Both sides are integers: exact.
    Integers,
    /// Chains of f32.
    Floats,
}

/// A product of codes that is defined.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodeProduct {
    pub(crate) sums: Sums,
    /// k of one segment, the longest run in which neither side changes its scale.
    pub(crate) step: usize,
}

impl Weights {
    /// Codes whose scales are applied to the sums; a scale of the activations covers `segment` of k.
    pub(crate) fn codes(self, activation: Activation, segment: usize) -> Result<CodeProduct, KernelError> {
        if self.formula != Formula::Affine {
            return Err(self.undefined(activation));
        }
        let sums = match (activation.code, self.code) {
            (Code::Int { .. }, Code::Int { .. }) => Sums::Integers,
            (Code::E4m3, _) => Sums::Floats,
            (Code::Int { .. } | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32, _) => {
                return Err(self.undefined(activation));
            }
        };
        // Groups of activations follow the inputs, groups of act-ordered weights do not.
        let crossed = self.permuted && segment < self.k;
        let step = if crossed { None } else { common_run(segment, self.group, self.k) };
        let step = step.ok_or(KernelError::GroupsDoNotMeet {
            activation,
            group: self.group,
            permuted: self.permuted,
        })?;
        if step < self.k && !step.is_multiple_of(WORD) {
            return Err(KernelError::OddGroups { activation, group: step });
        }
        Ok(CodeProduct { sums, step })
    }

    /// Codes times their local scales on both sides.
    pub(crate) fn scaled(self, activation: Activation) -> Result<(), KernelError> {
        match self.formula {
            Formula::Nvfp4 | Formula::Mx => Ok(()),
            Formula::Affine | Formula::Dense => Err(self.undefined(activation)),
        }
    }

    fn undefined(self, activation: Activation) -> KernelError {
        KernelError::NoExactProduct { weight: (self.code, self.formula), activation }
    }
}

/// The longest run of `k` in which neither side changes its scale, the last of which may be cut short; `None` where
/// runs would straddle one another.
fn common_run(a: usize, b: usize, k: usize) -> Option<usize> {
    let (short, long) = (a.min(b), a.max(b));
    (long >= k || long.is_multiple_of(short)).then_some(short)
}
