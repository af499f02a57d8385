//! Which kernel computes bf16 attention: a rule from the heads' size and the device, and a choice that replaces it.
//! Never from a batch or a clock: tensor cores may sum in orders of their own, and bits must not depend on how work was
//! cut.

use std::fmt;

use super::hopper;
use crate::backend::AttentionShape;
use crate::cuda::device::Device;

/// Kernels of bf16 attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionPath {
    /// The tensor cores of any GPU: `kernels/cuda/attention_bf16.cu`.
    Mma,
    /// Hopper's warpgroups, for the heads that they take: `kernels/cuda/attention_hopper.cu`.
    Hopper,
}

impl AttentionPath {
    /// Names the path that serves wherever it can, in place of the rule: `mma` or `hopper`.
    pub const VARIABLE: &str = "CTQ_ATTENTION";

    /// What a value of [`AttentionPath::VARIABLE`] asks for; nothing where there is none.
    ///
    /// # Errors
    /// Where it is none of the names.
    pub fn asked_for(value: Option<&str>) -> Result<Option<AttentionPath>, String> {
        match value {
            None | Some("") => Ok(None),
            Some("mma") => Ok(Some(AttentionPath::Mma)),
            Some("hopper") => Ok(Some(AttentionPath::Hopper)),
            Some(other) => {
                Err(format!("{}={other}: say mma or hopper, or unset it", AttentionPath::VARIABLE))
            }
        }
    }
}

impl fmt::Display for AttentionPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AttentionPath::Mma => "mma",
            AttentionPath::Hopper => "hopper",
        })
    }
}

/// The path of heads of a shape.
///
/// The rule without a choice: the kernel that runs everywhere. The other one has not been measured beside it yet, so
/// nothing is given to it.
pub(super) fn path<D: Device>(
    device: &D,
    asked_for: Option<AttentionPath>,
    shape: &AttentionShape,
) -> AttentionPath {
    match asked_for {
        Some(AttentionPath::Hopper) if device.has_warpgroups() && hopper::takes(shape) => {
            AttentionPath::Hopper
        }
        Some(AttentionPath::Hopper | AttentionPath::Mma) | None => AttentionPath::Mma,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_and_others_refused() {
        assert_eq!(AttentionPath::asked_for(None), Ok(None));
        assert_eq!(AttentionPath::asked_for(Some("")), Ok(None));
        for path in [AttentionPath::Mma, AttentionPath::Hopper] {
            assert_eq!(AttentionPath::asked_for(Some(&path.to_string())), Ok(Some(path)));
        }
        let refused = AttentionPath::asked_for(Some("wgmma")).expect_err("no such path");
        assert!(refused.contains("CTQ_ATTENTION=wgmma"), "{refused}");
    }
}
