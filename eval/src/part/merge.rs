//! All parts of an evaluation into its records: what one run would have given, bit for bit.
//!
//! Knows order and completeness; every number comes from the scores by the functions that serve a whole run.

use std::path::PathBuf;

use super::{Part, PartModel, PartResult, belonging};
use crate::record::{PairedRecord, Record, Status};
use crate::shard::Shard;
use crate::statistics::{ScoredToken, paired, summarize};
use crate::{Error, Result};

/// A part and the file it was read from.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedPart {
    /// The file, for messages.
    pub path: PathBuf,
    /// What it holds.
    pub part: Part,
}

/// One model of the merged evaluation: a record for each mode of activation quantization.
#[derive(Clone, Debug, PartialEq)]
pub struct MergedModel {
    /// The records, in the order in which the parts hold them.
    pub results: Vec<Merged>,
}

/// A record with the scores it was made from; none where there is no answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// The record of the whole evaluation.
    pub record: Record,
    /// Every scored token, in window order, then position order.
    pub tokens: Vec<ScoredToken>,
}

/// Joins the parts of one evaluation, given in any order.
///
/// Every field that depends on scores is computed as for one run. Of the others, `path` and the names are those of the
/// first part; `seconds` is the sum; `tokens_per_second` is of all tokens over that sum, so the speed of one worker;
/// `peak_memory_bytes` is that of the part that took most; `threads`, `tp`, `pp` and `replicas` are null where parts differ in
/// them. A
/// result that is invalid in a part is invalid, for the reason of the first such part.
///
/// # Errors
/// [`Error::ForeignPart`], [`Error::FailedPart`], [`Error::DoubledPart`], [`Error::MissingParts`] in this order of
/// precedence, and [`Error::NoParts`].
pub fn merge(mut parts: Vec<NamedPart>) -> Result<Vec<MergedModel>> {
    parts.sort_by_key(|named| named.part.shard);
    let first = parts.first().ok_or(Error::NoParts)?;
    parts.iter().skip(1).try_for_each(|other| belonging::check(first, other))?;
    check_complete(&parts)?;
    let models = (0..first.part.models.len())
        .map(|index| {
            let of_model: Vec<&PartModel> =
                parts.iter().filter_map(|named| named.part.models.get(index)).collect();
            merge_model(&of_model)
        })
        .collect();
    Ok(models)
}

/// Checks that sorted parts of one split are each there once.
fn check_complete(parts: &[NamedPart]) -> Result<()> {
    for pair in parts.windows(2) {
        let [one, other] = pair else { continue };
        if one.part.shard == other.part.shard {
            return Err(doubled(one, other));
        }
    }
    let of = parts.first().map_or(0, |named| named.part.shard.of());
    let there: Vec<usize> = parts.iter().map(|named| named.part.shard.part()).collect();
    let missing: Vec<usize> = (1..=of).filter(|part| there.binary_search(part).is_err()).collect();
    let Some(&first) = missing.first() else { return Ok(()) };
    let named =
        |named: &NamedPart| format!("part {} is in {}", named.part.shard.part(), named.path.display());
    let what = match missing.len() {
        1 => format!("part {first} of {of} is missing"),
        _ => format!("parts {} of {of} are missing", listed(missing.iter().map(usize::to_string))),
    };
    Err(Error::MissingParts { what, there: listed(parts.iter().map(named)), first: Shard::new(first, of)? })
}

fn doubled(one: &NamedPart, other: &NamedPart) -> Error {
    let (same, next) = if one.part == other.part {
        ("with the same content", "name one of them only")
    } else if same_scores(&one.part, &other.part) {
        ("with the same scores", "name one of them only")
    } else {
        ("with different content", "find out which is right, or run this part again, and name that file only")
    };
    Error::DoubledPart {
        shard: one.part.shard,
        path: one.path.clone(),
        other: other.path.clone(),
        same,
        next,
    }
}

/// Whether two runs of one part came to the same: they took other times.
fn same_scores(one: &Part, other: &Part) -> bool {
    let scores = |part: &Part| {
        let results = part.models.iter().flat_map(|model| &model.results);
        results.map(|result| (result.record.status, result.windows.clone())).collect::<Vec<_>>()
    };
    scores(one) == scores(other)
}

/// Some words as a list; of many, the first and how many more.
fn listed(words: impl ExactSizeIterator<Item = String>) -> String {
    const SHOWN: usize = 8;
    let more = words.len().saturating_sub(SHOWN);
    let shown = words.take(SHOWN).collect::<Vec<_>>().join(", ");
    if more == 0 { shown } else { format!("{shown} and {more} more") }
}

/// One model of all parts, which are of one evaluation.
fn merge_model(parts: &[&PartModel]) -> MergedModel {
    let modes = parts.iter().map(|model| model.results.len()).min().unwrap_or(0);
    let mut results: Vec<Merged> = Vec::with_capacity(modes);
    for mode in 0..modes {
        let of_mode: Vec<&PartResult> = parts.iter().filter_map(|model| model.results.get(mode)).collect();
        let Some(mut merged) = merge_result(&of_mode) else { continue };
        if let Some(base) = results.first()
            && let Ok(paired) = paired(&merged.tokens, &base.tokens)
        {
            let against = base.record.acts.as_deref().unwrap_or("off");
            merged.record.paired = Some(PairedRecord::new(against, &paired));
        }
        results.push(merged);
    }
    MergedModel { results }
}

/// One evaluation of all parts; `None` only for no parts.
fn merge_result(parts: &[&PartResult]) -> Option<Merged> {
    let without_answer = [Status::Failed, Status::Invalid].into_iter().find_map(|status| {
        let found = parts.iter().find(|result| result.record.status == status);
        found.map(|result| result.record.clone())
    });
    if let Some(record) = without_answer {
        return Some(Merged { record: by_this_program(record), tokens: Vec::new() });
    }
    let tokens: Vec<ScoredToken> =
        parts.iter().flat_map(|result| &result.windows).flat_map(super::PartWindow::tokens).collect();
    let record = by_this_program(parts.first()?.record.clone());
    match summarize(&tokens) {
        Ok(summary) => {
            let mut record = with_cost(record, parts);
            record.set_summary(&summary);
            Some(Merged { record, tokens })
        }
        // As a whole run would have it: only that it came to nothing.
        Err(error) => {
            let mut record = without_cost(record);
            let reason = format!("{}: {error}", record.path);
            record.set_without_answer(Status::Invalid, &reason);
            Some(Merged { record, tokens: Vec::new() })
        }
    }
}

fn by_this_program(record: Record) -> Record {
    Record { ctq_version: env!("CARGO_PKG_VERSION").to_owned(), ..record }
}

fn without_cost(record: Record) -> Record {
    Record {
        threads: None,
        tp: None,
        pp: None,
        replicas: None,
        seconds: None,
        tokens_per_second: None,
        peak_memory_bytes: None,
        ..record
    }
}

/// What all parts together have cost.
fn with_cost(record: Record, parts: &[&PartResult]) -> Record {
    let seconds = parts.iter().filter_map(|result| result.record.seconds).fold(0.0, |sum, part| sum + part);
    let fed = parts.iter().fold(0_u64, |sum, result| sum.saturating_add(result.tokens_fed));
    Record {
        threads: agreed(parts, |record| record.threads),
        tp: agreed(parts, |record| record.tp),
        pp: agreed(parts, |record| record.pp),
        replicas: agreed(parts, |record| record.replicas),
        seconds: Some(seconds),
        tokens_per_second: (fed > 0 && seconds > 0.0).then(|| fed as f64 / seconds),
        peak_memory_bytes: parts.iter().filter_map(|result| result.record.peak_memory_bytes).max(),
        ..record
    }
}

/// What all parts that have windows say; nothing where they differ.
fn agreed(parts: &[&PartResult], field: impl Fn(&Record) -> Option<u64>) -> Option<u64> {
    let mut said =
        parts.iter().filter(|result| !result.windows.is_empty()).map(|result| field(&result.record));
    let first = said.next()?;
    first.filter(|_| said.all(|other| other == first))
}
