//! A part as a file: one JSON object with a checksum.
//!
//! Knows form, version, checksum and what a part by itself must hold; refuses to know other parts.
//!
//! `checksum` is the SHA-256 of the object without it, as JSON without white space, keys in the order of the file. A
//! number is read to the f64 nearest to it and written with the fewest digits that give it back, so that the checksum
//! is one over the bits of every score.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::{PART_VERSION, Part, PartResult};
use crate::digest::sha256_hex;
use crate::record::{RECORD_VERSION, Status};
use crate::shard::Shard;
use crate::{Error, Result, atomic};

const CHECKSUM: &str = "checksum";

/// Writes a part, atomically.
///
/// # Errors
/// [`Error::Write`]; [`Error::BadPart`] if it cannot be expressed in JSON.
pub fn write(path: &Path, part: &Part) -> Result<()> {
    let bad = |error: serde_json::Error| Error::BadPart { path: path.to_path_buf(), what: error.to_string() };
    let mut value = serde_json::to_value(part).map_err(bad)?;
    let checksum = sha256_hex(value.to_string().as_bytes());
    if let Value::Object(object) = &mut value {
        object.insert(CHECKSUM.to_owned(), checksum.into());
    }
    atomic::write(path, format!("{value}\n").as_bytes())
}

/// Reads a part and checks that it holds what its shard must.
///
/// # Errors
/// [`Error::Read`]; [`Error::BadPart`] for a file that is something else, of another version, damaged, or lacks windows.
pub fn read(path: &Path) -> Result<Part> {
    let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    parse(&bytes).map_err(|what| Error::BadPart { path: path.to_path_buf(), what })
}

type Parsed<T> = std::result::Result<T, String>;

fn parse(bytes: &[u8]) -> Parsed<Part> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| format!("it is no part file, or damaged: no JSON ({error})"))?;
    let mut object = match value {
        Value::Object(object) => object,
        Value::Array(_) => {
            return Err("it is no part file: it holds a list, as `eval` without --shard does".to_owned());
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            return Err("it is no part file".to_owned());
        }
    };
    match object.get("part_version").map(Value::as_u64) {
        Some(Some(version)) if version == u64::from(PART_VERSION) => {}
        Some(Some(version)) => {
            return Err(format!("part_version {version} (this program knows {PART_VERSION})"));
        }
        Some(None) | None => return Err("it is no part file: it has no part_version".to_owned()),
    }
    check_sum(&mut object)?;
    let part: Part =
        serde_json::from_value(Value::Object(object)).map_err(|error| format!("it is no part: {error}"))?;
    let mut results = part.models.iter().flat_map(|model| &model.results);
    results.try_for_each(|result| check(part.shard, result))?;
    Ok(part)
}

/// Takes the checksum out of the object and holds it against the rest.
fn check_sum(object: &mut Map<String, Value>) -> Parsed<()> {
    let stated = object.shift_remove(CHECKSUM).ok_or("it has no checksum, so it was cut or edited")?;
    // Printed, and the object given back: a map cannot be printed without a value around it.
    let rest = Value::Object(std::mem::take(object));
    let found = sha256_hex(rest.to_string().as_bytes());
    if let Value::Object(rest) = rest {
        *object = rest;
    }
    if stated == found {
        Ok(())
    } else {
        Err("its checksum does not fit: it was damaged or edited".to_owned())
    }
}

/// What a result of this shard must hold.
fn check(shard: Shard, result: &PartResult) -> Parsed<()> {
    let record = &result.record;
    if record.record_version != RECORD_VERSION {
        let found = record.record_version;
        return Err(format!("record_version {found} (this program knows {RECORD_VERSION})"));
    }
    match record.status {
        Status::Partial => {}
        Status::Failed | Status::Invalid => return Ok(()),
        Status::Ok => return Err("a result in it is whole, not partial".to_owned()),
    }
    let windows = record.windows.ok_or("it does not say how many windows there are")?;
    let windows = usize::try_from(windows).map_err(|_| "it has an impossible number of windows")?;
    let expected = shard.range(windows);
    let held: BTreeSet<usize> = result.windows.iter().map(|window| window.window).collect();
    let lacking = expected.len() - held.range(expected.clone()).count();
    if let Some(first) = expected.clone().find(|index| !held.contains(index)) {
        return Err(format!(
            "part {shard} must hold windows {} to {}, and lacks {lacking} of them, such as window {first}",
            expected.start,
            expected.end - 1,
        ));
    }
    if !result.windows.iter().map(|window| window.window).eq(expected) {
        return Err(format!("it holds windows that part {shard} has not, or holds one twice"));
    }
    let fits = |window: &super::PartWindow| {
        let end =
            window.start.checked_add(window.first).and_then(|first| first.checked_add(window.nll.len()));
        end.is_some() && window.first > 0 && !window.nll.is_empty()
    };
    match result.windows.iter().find(|window| !fits(window)) {
        None => Ok(()),
        Some(window) => Err(format!("its window {} has impossible positions", window.window)),
    }
}
