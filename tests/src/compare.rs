//! How far two lists of numbers are from one another.

/// Frobenius norm of the difference over that of `expected`.
///
/// # Panics
/// If they differ in length.
pub fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let pairs = found.iter().zip(expected).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let (difference, size) =
        pairs.fold((0.0, 0.0), |(difference, size), (a, b)| (difference + square(a - b), size + square(b)));
    (difference / size).sqrt()
}

/// Mean over positions of the Kullback-Leibler divergence of `found` from `expected`, in nats; both are logits
/// [positions, vocabulary].
///
/// # Panics
/// If they differ in length.
pub fn mean_divergence(found: &[f32], expected: &[f32], vocabulary: usize) -> f64 {
    assert_eq!(found.len(), expected.len());
    let rows = found.chunks_exact(vocabulary).zip(expected.chunks_exact(vocabulary));
    let divergence = |(found, expected): (&[f32], &[f32])| -> f64 {
        let (found, expected) = (log_softmax(found), log_softmax(expected));
        found.iter().zip(&expected).map(|(found, expected)| expected.exp() * (expected - found)).sum()
    };
    rows.map(divergence).sum::<f64>() / (found.len() / vocabulary) as f64
}

/// Negative log-likelihood of each next token, row by row, of logits [rows, length, vocabulary].
pub fn nll(logits: &[f32], rows: &[Vec<u32>], vocabulary: usize) -> Vec<f64> {
    let length = rows.first().map_or(1, Vec::len);
    let windows = logits.chunks_exact(length * vocabulary).zip(rows);
    let of_row = |(logits, ids): (&[f32], &Vec<u32>)| -> Vec<f64> {
        let next = logits.chunks_exact(vocabulary).zip(&ids[1..]);
        next.map(|(logits, id)| -log_softmax(logits)[*id as usize]).collect()
    };
    windows.flat_map(of_row).collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f64::NEG_INFINITY, |largest, logit| largest.max(f64::from(*logit)));
    let total: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    logits.iter().map(|logit| f64::from(*logit) - largest - total.ln()).collect()
}

/// True where every bit agrees.
pub fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_divergence_is_that_of_the_definition() {
        // (1/2, 1/2) from (1/4, 3/4): 1/4 ln(1/2) + 3/4 ln(3/2).
        let found = [0.0, 0.0];
        let expected = [1.0_f32.ln(), 3.0_f32.ln()];
        let by_hand = 0.25 * 0.5_f64.ln() + 0.75 * 1.5_f64.ln();
        assert!((mean_divergence(&found, &expected, 2) - by_hand).abs() < 1e-7);
        assert_eq!(mean_divergence(&expected, &expected, 2), 0.0);
    }

    #[test]
    fn a_relative_error_is_of_norms() {
        assert!((relative(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
        assert!(!same_bits(&[0.0], &[-0.0]));
    }
}
