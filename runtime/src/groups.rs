//! Windows that run together: as many as keep to a number of tokens. The scores cannot tell.

use std::ops::Range;

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
