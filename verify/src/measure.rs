//! Distances between two arrays of numbers. Knows no bounds.

/// `|a - b| / |b|` in the Frobenius norm; 0 where both are 0.
pub(crate) fn relative_error(a: &[f32], b: &[f64]) -> f64 {
    let (difference, norm) = a.iter().zip(b).fold((0.0, 0.0), |(difference, norm), (a, b)| {
        let d = f64::from(*a) - b;
        (difference + d * d, norm + b * b)
    });
    // Written so that a NaN on either side is a NaN here, which no bound admits.
    if difference == 0.0 { 0.0 } else { libm::sqrt(difference / norm) }
}

/// Cosine of the angle between two arrays.
pub(crate) fn cosine(a: &[f32], b: &[f64]) -> f64 {
    let (dot, aa, bb) = a.iter().zip(b).fold((0.0, 0.0, 0.0), |(dot, aa, bb), (a, b)| {
        let a = f64::from(*a);
        (dot + a * b, aa + a * a, bb + b * b)
    });
    dot / libm::sqrt(aa * bb)
}

/// Largest absolute difference; NaN where there is one.
pub(crate) fn largest_difference(a: &[f32], b: &[f64]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| (f64::from(*a) - b).abs())
        .fold(0.0, |x: f64, y| if x.is_nan() || y.is_nan() { f64::NAN } else { x.max(y) })
}

/// Median of the relative errors of rows of `width`.
pub(crate) fn median_row_error(a: &[f32], b: &[f64], width: usize) -> f64 {
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    let mut errors: Vec<f64> = rows.map(|(a, b)| relative_error(a, b)).collect();
    errors.sort_by(f64::total_cmp);
    match errors.len() {
        0 => 0.0,
        count if count % 2 == 1 => errors[count / 2],
        count => (errors[count / 2 - 1] + errors[count / 2]) / 2.0,
    }
}

/// `ln softmax` of a row of logits.
pub(crate) fn log_softmax(logits: impl Iterator<Item = f64> + Clone) -> Vec<f64> {
    let largest = logits.clone().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.clone().map(|logit| libm::exp(logit - largest)).sum();
    let log_sum = largest + libm::log(sum);
    logits.map(|logit| logit - log_sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_of_small_arrays() {
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((relative_error(&[3.0, 5.0], &[3.0, 4.0]) - 0.2).abs() < 1e-15);
        assert!(relative_error(&[f32::NAN], &[1.0]).is_nan());
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - 0.5_f64.sqrt()).abs() < 1e-15);
        assert_eq!(largest_difference(&[1.0, -2.0], &[1.5, 1.0]), 3.0);
        // Rows are off by 0, 100 % and 20 %: the middle one counts.
        assert!((median_row_error(&[1.0, 0.0, 6.0], &[1.0, 1.0, 5.0], 1) - 0.2).abs() < 1e-15);
    }

    #[test]
    fn probabilities_add_up_to_one() {
        let logs = log_softmax([1000.0, 1001.0, 999.0].into_iter());
        assert!((logs.iter().map(|l| l.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((logs[1] - logs[0] - 1.0).abs() < 1e-12);
    }
}
