//! One linear: `y = FQ_out(FQ_in(x) W^T + bias)`, the product in f64 over weights that are decompressed row by row.
//!
//! Knows one module at a time; which module follows which is in [`crate::attention`] and [`crate::feed_forward`].

use ctq_model::TensorSource;
use ctq_model::inventory::Linear;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

use crate::activation::{self, Side, quantized};
use crate::operand::Rows;
use crate::stored;
use crate::{Acts, Error, Result};

/// Output rows that are decompressed together: 57 MiB of f64 a thread for 28672 inputs.
const BLOCK: usize = 256;

/// Applies `linear` to [tokens, k], giving [tokens, n].
///
/// # Errors
/// Where a tensor is missing or contradicts the scheme, and where a weight or an output is not finite.
pub(crate) fn forward(
    source: &dyn TensorSource,
    linear: &Linear,
    x: &Array2<f64>,
    acts: Acts,
) -> Result<Array2<f64>> {
    if x.ncols() != linear.k {
        return Err(Error::Width { module: linear.module.clone(), expected: linear.k, found: x.ncols() });
    }
    let quantizers = match acts {
        Acts::Off => (None, None),
        Acts::Library => (
            activation::of_linear(source, linear, Side::Input)?,
            activation::of_linear(source, linear, Side::Output)?,
        ),
    };
    let rows = Rows::open(source, linear)?;
    let mut y = match &quantizers.0 {
        Some(quantizer) => product(&rows, linear, quantized(quantizer, x).view())?,
        None => product(&rows, linear, x.view())?,
    };
    if linear.bias {
        let bias = stored::floats(source, &format!("{}.bias", linear.module), linear.n)?;
        for mut row in y.rows_mut() {
            row.iter_mut().zip(&bias).for_each(|(value, bias)| *value += f64::from(*bias));
        }
    }
    if let Some(quantizer) = &quantizers.1 {
        y = quantized(quantizer, &y);
    }
    check_finite(linear, y.view())?;
    Ok(y)
}

/// `x W^T`, a block of output rows at a time.
fn product(rows: &Rows<'_>, linear: &Linear, x: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    let mut y = Array2::zeros((x.nrows(), linear.n));
    let blocks: Vec<(usize, ArrayViewMut2<'_, f64>)> =
        y.axis_chunks_iter_mut(Axis(1), BLOCK).enumerate().collect();
    blocks.into_par_iter().try_for_each(|(block, mut y)| -> Result<()> {
        let mut weight = Array2::zeros((y.ncols(), linear.k));
        let mut row = vec![0.0_f32; linear.k];
        for (index, mut out) in weight.rows_mut().into_iter().enumerate() {
            rows.read(block * BLOCK + index, &mut row)?;
            out.iter_mut().zip(&row).for_each(|(out, value)| *out = f64::from(*value));
        }
        general_mat_mul(1.0, &x, &weight.t(), 0.0, &mut y);
        Ok(())
    })?;
    Ok(y)
}

fn check_finite(linear: &Linear, y: ArrayView2<'_, f64>) -> Result<()> {
    match y.indexed_iter().find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some(((position, feature), value)) => {
            let module = linear.module.clone();
            Err(Error::NonFiniteActivation { module, position, feature, value: *value })
        }
    }
}
