//! Records as a JSON file: a list of objects, one a line of people's scripts can rely on.
//!
//! Knows the list and its version; refuses to know what a record means.

use std::path::Path;

use super::{RECORD_VERSION, Record};
use crate::{Error, Result, atomic};

/// Writes a list of records, atomically.
///
/// # Errors
/// [`Error::Write`]; [`Error::BadRecords`] if one cannot be expressed in JSON.
pub fn write(path: &Path, records: &[Record]) -> Result<()> {
    let bad =
        |error: serde_json::Error| Error::BadRecords { path: path.to_path_buf(), what: error.to_string() };
    let mut json = serde_json::to_vec_pretty(records).map_err(bad)?;
    json.push(b'\n');
    atomic::write(path, &json)
}

/// Reads a list of records; fields of later programs are skipped.
///
/// # Errors
/// [`Error::Read`]; [`Error::BadRecords`] for a file of another kind or version.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    let bad = |what: String| Error::BadRecords { path: path.to_path_buf(), what };
    let records: Vec<Record> = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
    match records.iter().find(|record| record.record_version != RECORD_VERSION) {
        None => Ok(records),
        Some(other) => {
            Err(bad(format!("record_version {} (this program knows {RECORD_VERSION})", other.record_version)))
        }
    }
}
