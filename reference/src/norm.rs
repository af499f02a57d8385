//! Root-mean-square norm: `x / sqrt(mean(x^2) + eps) * weight`.
//!
//! Source: `LlamaRMSNorm` in transformers, here in f64.

use ndarray::{Array2, ArrayView2, Zip};

/// Normalises each row of [rows, width] by itself.
pub(crate) fn rms(x: ArrayView2<'_, f64>, weight: &[f32], epsilon: f64) -> Array2<f64> {
    let mut out = x.to_owned();
    for mut row in out.rows_mut() {
        let mean = row.iter().map(|value| value * value).sum::<f64>() / row.len() as f64;
        let factor = 1.0 / (mean + epsilon).sqrt();
        Zip::from(&mut row)
            .and(weight)
            .for_each(|value, weight| *value = *value * factor * f64::from(*weight));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_out_with_the_weight_as_root_mean_square() {
        let x = Array2::from_shape_fn((2, 4), |(row, column)| (row * 4 + column) as f64 - 2.5);
        let out = rms(x.view(), &[2.0; 4], 0.0);
        for row in out.rows() {
            let mean = row.iter().map(|value| value * value).sum::<f64>() / 4.0;
            assert!((mean - 4.0).abs() < 1e-12);
        }
    }
}
