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
    /// Whether codes have zero points.
    pub(crate) zeros: bool,
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
        self.fit_in_32_bits(activation, step)?;
        Ok(CodeProduct { sums, step })
    }

    /// # Errors
    /// Where the sum of `step` products of integers could leave 32 bits.
    fn fit_in_32_bits(self, activation: Activation, step: usize) -> Result<(), KernelError> {
        let magnitude = |code: Code, shifted: bool| match code {
            // A code less its zero point may span the whole range.
            Code::Int { bits } => 1_u64 << (bits - u8::from(!shifted)),
            Code::E4m3 | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32 => 0,
        };
        let product = magnitude(activation.code, !activation.symmetric) * magnitude(self.code, self.zeros);
        let k = step.min(self.k);
        if product * k as u64 > i32::MAX as u64 {
            return Err(KernelError::LongSum { activation, k });
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use ctq_model::scheme::{ActivationScale, ActivationSharing};

    use super::*;

    fn int8(symmetric: bool) -> Activation {
        let (sharing, scale) = (ActivationSharing::Token, ActivationScale::Dynamic);
        Activation { code: Code::Int { bits: 8 }, symmetric, sharing, scale }
    }

    fn weights(k: usize, group: usize, zeros: bool) -> Weights {
        let code = Code::Int { bits: 8 };
        Weights { code, formula: Formula::Affine, k, group, permuted: false, zeros }
    }

    /// 128 times 128 times k stays below 2^31 up to k = 131,071; zero points double a side.
    #[test]
    fn sums_that_32_bits_may_not_hold_are_refused() {
        let fits = |k: usize, symmetric: bool, zeros: bool| {
            let product = weights(k, k, zeros).codes(int8(symmetric), k);
            assert!(product.is_ok() || matches!(product, Err(KernelError::LongSum { .. })));
            product.is_ok()
        };
        assert!(fits(131_071, true, false) && !fits(131_072, true, false));
        assert!(fits(65_535, false, false) && !fits(65_536, false, false));
        assert!(fits(32_767, false, true) && !fits(32_768, false, true));
        // What counts is one segment.
        assert_eq!(weights(1 << 20, 128, false).codes(int8(true), 1 << 20).expect("a product").step, 128);
    }

    #[test]
    fn segments_are_whole_words() {
        for (group, defined) in [(36, true), (33, false), (2, false)] {
            let product = weights(396, group, false).codes(int8(true), 396);
            assert_eq!(product.is_ok(), defined, "groups of {group}");
            assert!(defined || matches!(product, Err(KernelError::OddGroups { .. })));
        }
    }
}
