//! `weight_scale`, whatever its format: read as stored, refused where one is not a finite number.

use ctq_model::matrix::Scales;
use ctq_model::{DType, Result};

use super::{Module, values};

/// Reads the scales; `None` for dense weights.
pub(super) fn read(module: &Module<'_>) -> Result<Option<Scales>> {
    let (scheme, leaf) = (&module.linear.scheme, "weight_scale");
    let Some(stored) = scheme.scale_dtype else { return Ok(None) };
    // Exponents come as U8 and as F8_E8M0, the same bytes.
    let dtype = if stored == DType::F8E8M0 { DType::U8 } else { stored };
    let (rows, columns) = scheme.sharing.shape(module.linear.n, module.linear.k);
    let tensor = module.tensor(leaf, rows * columns * dtype.bytes())?;
    if let Some((index, flaw)) = values::first_flaw(dtype, &tensor.bytes) {
        let (row, column) = (index / columns, index % columns);
        return Err(module.bad(leaf, format!("row {row}, column {column}: the scale is {flaw}")));
    }
    Ok(Some(Scales { dtype, sharing: scheme.sharing, bytes: tensor.bytes.into_owned() }))
}
