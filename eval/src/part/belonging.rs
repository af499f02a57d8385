//! Whether two parts are of one evaluation, and if not, where they part.
//!
//! Knows identities: the split, the models, the question, the method. Refuses to look at scores.

use crate::part::{NamedPart, Part, PartModel, PartResult};
use crate::record::{Record, Status};
use crate::{Error, Result};

/// Checks that two parts may stand in one result.
///
/// # Errors
/// [`Error::ForeignPart`] names the first thing that differs; [`Error::FailedPart`] where one of them has failed and the
/// other has not.
pub(super) fn check(one: &NamedPart, other: &NamedPart) -> Result<()> {
    let foreign = |what| Error::ForeignPart { path: one.path.clone(), other: other.path.clone(), what };
    check_split(&one.part, &other.part).map_err(foreign)?;
    for (mine, theirs) in one.part.models.iter().zip(&other.part.models) {
        check_models(mine, theirs).map_err(foreign)?;
        match (failure(mine), failure(theirs)) {
            (Some(record), None) => return Err(failed(one, record)),
            (None, Some(record)) => return Err(failed(other, record)),
            (None, None) | (Some(_), Some(_)) => {}
        }
        check_modes(mine, theirs).map_err(foreign)?;
        for (mine, theirs) in mine.results.iter().zip(&theirs.results) {
            check_results(mine, theirs).map_err(foreign)?;
        }
    }
    Ok(())
}

type Same = std::result::Result<(), String>;

fn check_split(one: &Part, other: &Part) -> Same {
    if one.shard.of() != other.shard.of() {
        return Err(format!("one is part {}, the other part {}", one.shard, other.shard));
    }
    if one.models.len() != other.models.len() {
        return Err(format!(
            "the number of models is {} in one and {} in the other",
            one.models.len(),
            other.models.len()
        ));
    }
    Ok(())
}

fn check_models(one: &PartModel, other: &PartModel) -> Same {
    match (&one.model_id, &other.model_id) {
        (Some(mine), Some(theirs)) if mine != theirs => {
            let name = |model: &PartModel| model.results.first().map(|result| result.record.model.clone());
            Err(format!(
                "they scored other models ({}, contents {}, and {}, contents {})",
                name(one).unwrap_or_default(),
                short(mine),
                name(other).unwrap_or_default(),
                short(theirs)
            ))
        }
        // A model that could not be opened has no id: it is a failed one, which is looked at apart.
        (Some(_) | None, Some(_) | None) => Ok(()),
    }
}

/// As much of a hash as people compare.
fn short(hash: &str) -> &str {
    hash.get(..16).unwrap_or(hash)
}

/// The first result of a model that has failed.
fn failure(model: &PartModel) -> Option<&Record> {
    model.results.iter().map(|result| &result.record).find(|record| record.status == Status::Failed)
}

fn failed(part: &NamedPart, record: &Record) -> Error {
    Error::FailedPart {
        path: part.path.clone(),
        shard: part.part.shard,
        model: record.model.clone(),
        reason: record.reason.clone().unwrap_or_else(|| "no reason was recorded".to_owned()),
    }
}

fn check_modes(one: &PartModel, other: &PartModel) -> Same {
    let modes = |model: &PartModel| {
        let names = model.results.iter().map(|result| result.record.acts.as_deref().unwrap_or("unknown"));
        names.collect::<Vec<_>>().join(" and ")
    };
    let (mine, theirs) = (modes(one), modes(other));
    if mine == theirs { Ok(()) } else { Err(format!("acts is {mine} in one and {theirs} in the other")) }
}

fn check_results(one: &PartResult, other: &PartResult) -> Same {
    let (one, other) = (&one.record, &other.record);
    let parted = method(one).into_iter().zip(method(other)).find(|((_, mine), (_, theirs))| mine != theirs);
    if let Some(((field, mine), (_, theirs))) = parted {
        return Err(format!("{field} is {mine} in one and {theirs} in the other"));
    }
    if one.protocol_id == other.protocol_id {
        return Ok(());
    }
    let (field, mine, theirs) = one.question_difference(other).unwrap_or_default();
    Err(format!("{field} is {mine} in one and {theirs} in the other"))
}

/// The parts of the method, those first that explain the others.
fn method(record: &Record) -> [(&'static str, String); 7] {
    let word = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".to_owned());
    let revision = record.numerics_revision.map_or_else(|| "unknown".to_owned(), |number| number.to_string());
    [
        ("the numerics revision", revision),
        ("acts", word(&record.acts)),
        ("compute", word(&record.compute)),
        ("kv", word(&record.kv)),
        ("the backend", word(&record.backend)),
        ("the instruction set or device", word(&record.isa)),
        ("the method id", word(&record.method_id)),
    ]
}
