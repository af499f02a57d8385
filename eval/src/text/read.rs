//! Bytes of a file into rows: plain text, JSON lines, Parquet.
//!
//! Knows the forms' syntax; refuses to know data sets, join rules and tokens.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use super::{TextForm, wikitext};
use crate::{Error, Result};

/// The column or field that holds a row's text.
const TEXT: &str = "text";

/// The whole file.
pub(super) fn bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })
}

/// How to read a file: by its extension, except that WikiText-2's raw file is known under any name.
pub(super) fn form(path: &Path, file_sha256: &str) -> Result<TextForm> {
    if file_sha256 == wikitext::RAW_SHA256 {
        return Ok(TextForm::Raw);
    }
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match extension.as_str() {
        "txt" => Ok(TextForm::Txt),
        "raw" => Ok(TextForm::Raw),
        "jsonl" => Ok(TextForm::Jsonl),
        "parquet" => Ok(TextForm::Parquet),
        _ => Err(Error::UnknownTextForm { path: path.to_path_buf() }),
    }
}

/// The bytes as UTF-8.
pub(super) fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| Error::NotUtf8 {
        path: path.to_path_buf(),
        offset: error.utf8_error().valid_up_to(),
    })
}

/// The `text` fields of a file of JSON lines; blank lines are skipped.
pub(super) fn jsonl(path: &Path, content: &str) -> Result<Vec<String>> {
    let lines = content.split('\n').enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(index, line)| row_of_line(path, index + 1, line)).collect()
}

fn row_of_line(path: &Path, line_number: usize, line: &str) -> Result<String> {
    let bad = |what: String| Error::BadJsonLine { path: path.to_path_buf(), line: line_number, what };
    let value: serde_json::Value = serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
    match value.get(TEXT).and_then(serde_json::Value::as_str) {
        Some(text) => Ok(text.to_owned()),
        None => Err(bad("there is no field \"text\" that holds a string".to_owned())),
    }
}

/// The column `text` of a Parquet file.
pub(super) fn parquet(path: &Path) -> Result<Vec<String>> {
    let file = File::open(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    let bad = |error: parquet::errors::ParquetError| Error::BadParquet {
        path: path.to_path_buf(),
        what: error.to_string(),
    };
    let reader = SerializedFileReader::new(file).map_err(bad)?;
    let projection = text_column(path, reader.metadata())?;
    let rows = reader.get_row_iter(Some(projection)).map_err(bad)?;
    rows.enumerate().map(|(index, row)| text_of_row(path, index, &row.map_err(bad)?)).collect()
}

/// A schema of the one column `text`, after checking that its codec can be read.
fn text_column(path: &Path, metadata: &ParquetMetaData) -> Result<Type> {
    let bad = |what: String| Error::BadParquet { path: path.to_path_buf(), what };
    let schema = metadata.file_metadata().schema();
    let column = schema.get_fields().iter().find(|field| field.name() == TEXT);
    let Some(column) = column else {
        let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
        return Err(bad(format!("there is no column \"text\" (its columns: {})", names.join(", "))));
    };
    let chunks = metadata.row_groups().iter().flat_map(|group| group.columns());
    for chunk in chunks.filter(|chunk| chunk.column_path().parts().first().is_some_and(|name| name == TEXT)) {
        let codec = chunk.compression();
        if !matches!(codec, Compression::UNCOMPRESSED | Compression::SNAPPY) {
            return Err(Error::ParquetCodec { path: path.to_path_buf(), codec: format!("{codec}") });
        }
    }
    Type::group_type_builder(schema.name())
        .with_fields(vec![Arc::clone(column)])
        .build()
        .map_err(|error| bad(error.to_string()))
}

fn text_of_row(path: &Path, index: usize, row: &Row) -> Result<String> {
    let bad =
        |what: &str| Error::BadParquet { path: path.to_path_buf(), what: format!("row {index}: {what}") };
    match row.get_column_iter().next() {
        Some((_, Field::Str(text))) => Ok(text.clone()),
        Some((_, Field::Bytes(bytes))) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(bad("the column \"text\" holds bytes that are not UTF-8")),
        },
        Some(_) | None => Err(bad("the column \"text\" holds no string here")),
    }
}
