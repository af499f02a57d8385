//! Sums, errors and refusals on numbers worked by hand.

use ctq_eval::Error;
use ctq_eval::statistics::{BLOCK_TOKENS, ScoredToken, paired, scored_tokens, summarize};
use ctq_model::window::{Window, WindowScores};

/// exp(1/2).
const SQRT_E: f64 = 1.648_721_270_700_128_2;

fn window(index: usize, start: usize, length: usize) -> Window {
    Window { index, start, ids: vec![0; length], scored: 1..length }
}

fn scores(window: usize, nll: &[f64]) -> WindowScores {
    WindowScores { window, first: 1, nll: nll.to_vec() }
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-14 * expected.abs(), "{found} is not {expected}");
}

/// Scores ln 2, ln 8 in one block and ln 4, ln 4 in the next: mean ln 4, perplexity 4.
///
/// iid: variance 2 (ln 2)^2 / 4, over n - 1 = 3. Blocks: both sums equal, so no residual.
#[test]
fn four_scores_by_hand() {
    let ln2 = std::f64::consts::LN_2;
    let windows = [window(0, 0, 3), window(1, BLOCK_TOKENS, 3)];
    let given = [scores(0, &[ln2, 3.0 * ln2]), scores(1, &[2.0 * ln2, 2.0 * ln2])];
    let tokens = scored_tokens(&windows, &given).expect("they fit");
    assert_eq!(tokens.iter().map(|scored| scored.token).collect::<Vec<_>>(), [1, 2, 513, 514]);
    let summary = summarize(&tokens).expect("a summary");
    close(summary.perplexity, 4.0);
    close(summary.total_nll, 8.0 * ln2);
    assert_eq!(summary.count, 4);
    close(summary.iid_error.expect("an error"), 4.0 * (ln2 * ln2 / 2.0 / 3.0).sqrt());
    assert_eq!(summary.block_error, Some(0.0));
}

/// Two blocks of one score each, means 1 and 3: SE = sqrt(2 / 1 * 2) / 2 = 1.
#[test]
fn the_block_error_scales_with_the_perplexity() {
    let token = |token, nll| ScoredToken { window: 0, position: token, token, nll };
    let summary = summarize(&[token(1, 1.0), token(BLOCK_TOKENS, 3.0)]).expect("a summary");
    close(summary.perplexity, 7.389_056_098_930_65);
    close(summary.block_error.expect("an error"), summary.perplexity);
    let alone = summarize(&[token(1, 1.0)]).expect("a summary");
    assert_eq!((alone.block_error, alone.iid_error), (None, None));
}

#[test]
fn a_paired_difference_cancels_what_both_find_hard() {
    let tokens = |offsets: [f64; 2]| -> Vec<ScoredToken> {
        let hard = [1.0, 9.0];
        let nll = |block: usize| hard[block] + offsets[block];
        let token =
            |block| ScoredToken { window: 0, position: 1, token: block * BLOCK_TOKENS, nll: nll(block) };
        [0, 1].map(token).to_vec()
    };
    let same = paired(&tokens([0.5, 0.5]), &tokens([0.0, 0.0])).expect("comparable");
    close(same.difference, 0.5);
    close(same.ratio, SQRT_E);
    assert_eq!(same.ratio_error, Some(0.0));
    // Differences 0.25 and 0.75: mean 0.5, residuals 0.25, SE = sqrt(2 * 2 * 0.0625) / 2 = 0.25.
    let unequal = paired(&tokens([0.25, 0.75]), &tokens([0.0, 0.0])).expect("comparable");
    close(unequal.difference_error.expect("an error"), 0.25);
    close(unequal.ratio_error.expect("an error"), 0.25 * SQRT_E);
}

#[test]
fn only_equal_positions_are_paired() {
    let token = |token| ScoredToken { window: 0, position: token, token, nll: 1.0 };
    assert!(matches!(paired(&[token(1)], &[token(2)]), Err(Error::NotComparable { .. })));
    assert!(matches!(paired(&[token(1), token(2)], &[token(1)]), Err(Error::NotComparable { .. })));
}

#[test]
fn a_score_that_is_no_number_is_named_and_has_no_perplexity() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = scored_tokens(&[window(0, 40, 4)], &[scores(0, &[1.0, value, f64::NAN])]);
        let error = error.expect_err("invalid");
        assert!(error.is_invalid_result());
        assert!(matches!(error, Error::NonFiniteScore { window: 0, position: 2, token: 42, .. }), "{error}");
    }
    let huge =
        summarize(&[ScoredToken { window: 0, position: 1, token: 1, nll: 800.0 }]).expect_err("overflow");
    assert!(huge.is_invalid_result());
}

#[test]
fn scores_of_other_windows_are_refused() {
    let windows = [window(0, 0, 3)];
    for foreign in [
        vec![],
        vec![scores(1, &[1.0, 1.0])],
        vec![scores(0, &[1.0])],
        vec![WindowScores { window: 0, first: 2, nll: vec![1.0, 1.0] }],
    ] {
        let result = scored_tokens(&windows, &foreign);
        assert!(matches!(result, Err(Error::ScoresMismatch { .. })), "{foreign:?}");
    }
    assert!(matches!(summarize(&[]), Err(Error::ScoresMismatch { .. })));
}
