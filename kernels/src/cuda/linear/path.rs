//! Which kernels multiply, of operands of bf16 most of all: a rule from the scheme, the whole matrix and the device, and a choice that
//! replaces it. Never from a batch, a shard or a clock: paths sum in orders of their own, and bits must not depend on
//! how work was cut.

use std::fmt;

use super::dense;
use crate::cuda::Cuda;
use crate::cuda::buffer::OperandKind;
use crate::cuda::device::Device;
use crate::cuda::matrix::CudaMatrix;

/// Kernels for products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearPath {
    /// The matrix is decoded first; the device's library multiplies.
    Library,
    /// Weights are decoded in registers, Hopper's warpgroups multiply.
    Hopper,
    /// Weights are decoded in registers, the tensor cores of any GPU multiply.
    Fused,
    /// Codes of fp8 meet as such on Hopper's tensor cores, which keep few bits of a sum; everything else by the rule.
    Fp8,
}

/// What multiplies operands of bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bf16Path {
    /// As [`LinearPath::Library`].
    Library,
    /// As [`LinearPath::Hopper`].
    Hopper,
    /// As [`LinearPath::Fused`].
    Fused,
}

impl LinearPath {
    /// Names the path that serves wherever it can, in place of the rule: `library`, `hopper`, `fused` or `fp8`.
    pub const VARIABLE: &str = "CTQ_LINEAR";

    /// What a value of [`LinearPath::VARIABLE`] asks for; nothing where there is none.
    ///
    /// # Errors
    /// Where it is none of the names.
    pub fn asked_for(value: Option<&str>) -> Result<Option<LinearPath>, String> {
        match value {
            None | Some("") => Ok(None),
            Some("library") => Ok(Some(LinearPath::Library)),
            Some("hopper") => Ok(Some(LinearPath::Hopper)),
            Some("fused") => Ok(Some(LinearPath::Fused)),
            Some("fp8") => Ok(Some(LinearPath::Fp8)),
            Some(other) => {
                let variable = LinearPath::VARIABLE;
                Err(format!("{variable}={other}: say library, hopper, fused or fp8, or unset it"))
            }
        }
    }
}

impl fmt::Display for LinearPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LinearPath::Library => "library",
            LinearPath::Hopper => "hopper",
            LinearPath::Fused => "fused",
            LinearPath::Fp8 => "fp8",
        })
    }
}

/// The path of a product of bf16 operands on tensor cores. Other operands have kernels of their own; those of codes are
/// Hopper's where that is asked for.
///
/// The rule without a choice: the library where the device has one and the whole matrix is large, else the fused
/// kernels. Hopper's kernels have not been measured beside them yet, so nothing is given to them.
pub(crate) fn path<D: Device>(
    cuda: &Cuda<D>,
    kind: &OperandKind<D::Memory>,
    weight: &CudaMatrix<D::Memory>,
) -> Bf16Path {
    let device = cuda.device();
    let library = matches!(kind, OperandKind::Bf16) && device.has_dense_product(weight.stride());
    match cuda.linears {
        Some(LinearPath::Library) if library => Bf16Path::Library,
        Some(LinearPath::Hopper) if device.has_warpgroups() => Bf16Path::Hopper,
        Some(LinearPath::Fused) => Bf16Path::Fused,
        Some(LinearPath::Library | LinearPath::Hopper | LinearPath::Fp8) | None => {
            if library && dense::is_large(weight) { Bf16Path::Library } else { Bf16Path::Fused }
        }
    }
}
