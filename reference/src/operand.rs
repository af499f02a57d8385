//! The weight of one linear as compressed-tensors decompresses it, the operand of its product.
//!
//! Puts codes and scales together; knows neither activations nor products.

use ctq_model::inventory::Linear;
use ctq_model::{DType, TensorSource};

use crate::codes::Codes;
use crate::scaling::Scaling;
use crate::{Error, Result};

/// A decompressed weight, [n, k].
#[derive(Clone, Debug, PartialEq)]
pub struct OperandMatrix {
    /// Output rows.
    pub n: usize,
    /// Inputs, the reduction axis.
    pub k: usize,
    /// Dtype in which the library yields it: that of the scales for integer and fp8 schemes, BF16 for NVFP4 and MX,
    /// its own for a dense weight. Every value is exact in it.
    pub dtype: DType,
    /// Row-major `n * k` values, upcast to f32, which is exact. Columns are in the order of the inputs.
    pub values: Vec<f32>,
}

/// Decompresses the weight of one linear, bit for bit as compressed-tensors' `decompress` does.
///
/// # Errors
/// Where a tensor is missing or contradicts the scheme, and where a weight is not finite.
pub fn decompress(source: &dyn TensorSource, linear: &Linear) -> Result<OperandMatrix> {
    let rows = Rows::open(source, linear)?;
    let mut values = vec![0.0; linear.n * linear.k];
    for (n, row) in values.chunks_exact_mut(linear.k).enumerate() {
        rows.read(n, row)?;
    }
    Ok(OperandMatrix { n: linear.n, k: linear.k, dtype: linear.scheme.operand_dtype(), values })
}

/// A weight that stays packed until a row of it is asked for.
pub(crate) struct Rows<'a> {
    linear: &'a Linear,
    codes: Codes<'a>,
    scaling: Scaling,
}

impl<'a> Rows<'a> {
    /// Finds the tensors of `linear` and reads its scales.
    ///
    /// # Errors
    /// Where a tensor is missing or contradicts the scheme.
    pub(crate) fn open(source: &'a dyn TensorSource, linear: &'a Linear) -> Result<Rows<'a>> {
        let codes = Codes::open(source, linear)?;
        let scaling = Scaling::open(source, linear)?;
        Ok(Rows { linear, codes, scaling })
    }

    /// Decompresses row `n` into `out`, k values.
    ///
    /// # Errors
    /// Where a weight is not finite.
    pub(crate) fn read(&self, n: usize, out: &mut [f32]) -> Result<()> {
        self.codes.row(n, out);
        self.scaling.apply(n, out);
        match out.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(column) => Err(Error::NonFiniteWeight {
                file: self.codes.file().to_owned(),
                module: self.linear.module.clone(),
                row: n,
                column,
                value: out[column],
            }),
        }
    }
}
