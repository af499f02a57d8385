//! Parts come back from their files bit for bit, and together give what the scores give at once.

use std::path::PathBuf;

use ctq_eval::Error;
use ctq_eval::part::{NamedPart, PART_VERSION, Part, PartModel, PartResult, PartWindow, merge, read, write};
use ctq_eval::record::{Record, Status};
use ctq_eval::shard::Shard;
use ctq_eval::statistics::{ScoredToken, summarize};
use proptest::prelude::*;

/// Scores of windows of 3 positions, 300 tokens apart, two of them scored.
fn tokens(nll: &[f64]) -> Vec<ScoredToken> {
    let places = nll.iter().enumerate().map(|(index, &nll)| (index / 2, 1 + index % 2, nll));
    places
        .map(|(window, position, nll)| ScoredToken { window, position, token: 300 * window + position, nll })
        .collect()
}

fn named(shard: Shard, record: &Record, tokens: &[ScoredToken]) -> NamedPart {
    let range = shard.range(usize::try_from(record.windows.expect("windows")).expect("a count"));
    let mine: Vec<ScoredToken> = tokens.iter().copied().filter(|t| range.contains(&t.window)).collect();
    let result = PartResult { record: record.clone(), tokens_fed: 7, windows: PartWindow::of(&mine) };
    let models = vec![PartModel { model_id: Some("a model".to_owned()), results: vec![result] }];
    let part = Part { part_version: PART_VERSION, shard, models };
    NamedPart { path: PathBuf::from(format!("{}.json", shard.part())), part }
}

fn partial(windows: usize) -> Record {
    let mut record = Record::new("model", "here/model", "disjoint", "not finished");
    record.windows = Some(windows as u64);
    record.seconds = Some(0.5);
    record.set_partial();
    record
}

/// Parts of `tokens`, through files.
fn through_files(of: usize, record: &Record, tokens: &[ScoredToken]) -> Vec<NamedPart> {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let part = |part: usize| {
        let named = named(Shard::new(part, of).expect("a share"), record, tokens);
        let path = folder.path().join(&named.path);
        write(&path, &named.part).expect("written");
        NamedPart { part: read(&path).expect("read"), ..named }
    };
    (1..=of).rev().map(part).collect()
}

proptest! {
    #[test]
    fn every_score_comes_back_bit_for_bit(bits in prop::collection::vec(any::<u64>(), 2..40), of in 1_usize..9) {
        let finite = |bits: u64| Some(f64::from_bits(bits)).filter(|nll| nll.is_finite()).unwrap_or(-0.0);
        let nll: Vec<f64> = bits.chunks_exact(2).flatten().map(|&bits| finite(bits)).collect();
        let tokens = tokens(&nll);
        let parts = through_files(of, &partial(nll.len() / 2), &tokens);
        let found = parts.iter().rev().flat_map(|named| &named.part.models[0].results[0].windows);
        let found: Vec<u64> = found.flat_map(|window| &window.nll).map(|nll| nll.to_bits()).collect();
        prop_assert_eq!(found, nll.iter().map(|nll| nll.to_bits()).collect::<Vec<_>>());
    }

    #[test]
    fn merged_numbers_are_those_of_all_scores(nll in prop::collection::vec(1e-9..30.0_f64, 2..40), of in 1_usize..9) {
        let tokens = tokens(&nll[..nll.len() / 2 * 2]);
        let summary = summarize(&tokens).expect("numbers");
        let models = merge(through_files(of, &partial(tokens.len() / 2), &tokens)).expect("all parts");
        let merged = &models[0].results[0];
        prop_assert_eq!(&merged.tokens, &tokens);
        prop_assert_eq!(merged.record.status, Status::Ok);
        let bits = |number: Option<f64>| number.map(f64::to_bits);
        prop_assert_eq!(bits(merged.record.perplexity), Some(summary.perplexity.to_bits()));
        prop_assert_eq!(bits(merged.record.perplexity_error), bits(summary.block_error));
        prop_assert_eq!(bits(merged.record.perplexity_error_iid), bits(summary.iid_error));
        prop_assert_eq!(bits(merged.record.total_nll), Some(summary.total_nll.to_bits()));
        prop_assert_eq!(merged.record.seconds, Some(0.5 * of as f64));
        prop_assert_eq!(merged.record.tokens_per_second, Some(14.0));
    }
}

#[test]
fn a_mean_without_a_finite_exponential_is_invalid_only_as_a_whole() {
    let tokens = tokens(&[1.0, 1.0, 1e4, 1e4]);
    let models = merge(through_files(2, &partial(2), &tokens)).expect("all parts");
    let record = &models[0].results[0].record;
    assert_eq!((record.status, record.perplexity), (Status::Invalid, None));
    let reason = record.reason.as_deref().unwrap_or_default();
    assert!(reason.starts_with("here/model: the result is INVALID: a mean "), "{reason}");
}

#[test]
fn ranks_are_told_where_all_parts_that_scored_agree() {
    let tokens = tokens(&[1.0, 2.0, 3.0, 4.0]);
    let mut parts = through_files(3, &partial(2), &tokens);
    let tp = |parts: &[NamedPart]| merge(parts.to_vec()).expect("all parts")[0].results[0].record.tp;
    // Of two windows in three parts, the first part has none.
    for named in &mut parts {
        let empty = named.part.shard.part() == 1;
        named.part.models[0].results[0].record.tp = (!empty).then_some(4);
    }
    assert_eq!(tp(&parts), Some(4));
    parts[0].part.models[0].results[0].record.tp = Some(2);
    assert_eq!(tp(&parts), None);
}

#[test]
fn nothing_cannot_be_merged() {
    assert!(matches!(merge(Vec::new()), Err(Error::NoParts)));
}
