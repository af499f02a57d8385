//! How many windows run together: as many as fit the memory budget. The scores cannot tell.

use std::ops::Range;

use ctq_model::Spec;
use ctq_model::spec::FfnSpec;

/// Bytes of hidden states and scratch that one token takes while a layer runs, on the CPU backend.
///
/// Residual, normed input, prepared operand and the widest intermediate results, in f32. Gathered outputs exist
/// twice for a moment, once in blocks and once in place. Each of `ranks` holds all of it.
pub fn bytes_per_token(spec: &Spec, ranks: usize) -> usize {
    let widest = spec.blocks.iter().map(|block| {
        let attention = &block.attention;
        let projections = (2 * attention.heads + 2 * attention.kv_heads) * attention.head_dim;
        let ffn = match &block.ffn {
            FfnSpec::Gated(gated) => 4 * gated.width,
            FfnSpec::Moe { top_k, experts, .. } => {
                spec.hidden + 4 * top_k * experts.first().map_or(0, |expert| expert.width)
            }
        };
        2 * projections.max(ffn)
    });
    4 * ranks * (5 * spec.hidden + widest.max().unwrap_or(0))
}

/// Cuts windows of `lengths` tokens into groups of at most `tokens` tokens, at least one window each, in order.
pub fn groups(lengths: &[usize], tokens: usize) -> Vec<Range<usize>> {
    let mut groups = Vec::new();
    let (mut start, mut sum) = (0, 0);
    for (index, length) in lengths.iter().enumerate() {
        if index > start && sum + length > tokens {
            groups.push(start..index);
            (start, sum) = (index, 0);
        }
        sum += length;
    }
    if start < lengths.len() {
        groups.push(start..lengths.len());
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_cover_all_windows_in_order_and_keep_to_the_budget() {
        assert_eq!(groups(&[4, 4, 4, 4, 4], 9), [0..2, 2..4, 4..5]);
        assert_eq!(groups(&[4, 9, 1], 4), [0..1, 1..2, 2..3]);
        assert_eq!(groups(&[4, 4, 1], usize::MAX).first(), Some(&(0..3)));
        assert_eq!(groups(&[], 4), Vec::<Range<usize>>::new());
    }
}
