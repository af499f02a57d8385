//! A data set as rows of text and as one raw text, whatever file it came in.
//!
//! Knows file forms and WikiText-2's two encodings; refuses to know tokens, windows or models.

mod discover;
mod read;
mod wikitext;

use std::borrow::Cow;
use std::path::Path;

use crate::digest::{Hasher, sha256_hex};
use crate::protocol::JoinRule;
use crate::{Error, Result};

pub use discover::{Environment, discover};

/// The form of a data set's file, told by its extension (or, for a known data set, by its contents).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextForm {
    /// `.txt`: the whole file is one row.
    Txt,
    /// `.raw`: one row a line, as WikiText's Parquet files cut it (see [`Text::load`]).
    Raw,
    /// `.jsonl`: each non-blank line is an object whose `text` is a row.
    Jsonl,
    /// `.parquet`: the column `text`.
    Parquet,
}

impl TextForm {
    /// The word that records and messages use.
    pub fn name(self) -> &'static str {
        match self {
            TextForm::Txt => "txt",
            TextForm::Raw => "raw",
            TextForm::Jsonl => "jsonl",
            TextForm::Parquet => "parquet",
        }
    }
}

/// A data set that is recognised by its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownText {
    /// The test split of WikiText-2 raw v1, 4358 rows: the text that everybody scores.
    WikiText2Test,
}

impl KnownText {
    /// The name that records print.
    pub fn name(self) -> &'static str {
        match self {
            KnownText::WikiText2Test => "wikitext-2-raw-v1 test",
        }
    }
}

/// Where a text came from and what it is, for the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextSource {
    /// Name of the file, without its directory.
    pub file_name: String,
    /// How the file was read.
    pub form: TextForm,
    /// SHA-256 of the file's bytes, hex.
    pub file_sha256: String,
    /// SHA-256 over the rows: each row as its length in bytes (8 bytes, little-endian) and its UTF-8 bytes.
    /// Equal rows have equal hashes whatever file they came in.
    pub rows_sha256: String,
    /// SHA-256 of [`Text::whole`], hex.
    pub whole_sha256: String,
    /// Number of rows.
    pub rows: usize,
    /// Number of rows that hold more than white space.
    pub rows_with_text: usize,
    /// The data set, where it is a known one.
    pub recognised: Option<KnownText>,
}

/// A loaded data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// The rows, in the file's order.
    pub rows: Vec<String>,
    /// The text as one string, as llama.cpp would be given it.
    pub whole: String,
    /// What the record says of it.
    pub source: TextSource,
}

impl Text {
    /// Reads a data set from a `.txt`, `.raw`, `.jsonl` or `.parquet` file.
    ///
    /// WikiText-2's test split is recognised by content, as `wiki.test.raw` (under any name) or as Parquet
    /// (under any Parquet encoding), and yields the same rows and the same raw text from both.
    ///
    /// | form | rows | `whole` |
    /// |---|---|---|
    /// | `.txt` | the file | the file |
    /// | `.raw` | cut after each newline; blank lines become `""`, others keep their newline | the file |
    /// | `.jsonl` | the `text` fields | the rows joined with `"\n"` |
    /// | `.parquet` | the column `text` | the rows joined with `"\n"`; WikiText-2: its raw file, rebuilt |
    ///
    /// # Errors
    /// A file that cannot be read, is not UTF-8, has an unknown extension, no text, no `text` field or
    /// column, or a Parquet codec that is not built in; each says what to do next.
    pub fn load(path: &Path) -> Result<Text> {
        let bytes = read::bytes(path)?;
        let file_sha256 = sha256_hex(&bytes);
        let form = read::form(path, &file_sha256)?;
        let (rows, whole) = match form {
            TextForm::Txt => {
                let whole = read::utf8(path, bytes)?;
                (vec![whole.clone()], Some(whole))
            }
            TextForm::Raw => {
                let whole = read::utf8(path, bytes)?;
                (wikitext::rows_of_raw(&whole), Some(whole))
            }
            TextForm::Jsonl => (read::jsonl(path, &read::utf8(path, bytes)?)?, None),
            TextForm::Parquet => (read::parquet(path)?, None),
        };
        let rows_sha256 = hash_of_rows(&rows);
        let recognised = wikitext::recognise(&rows_sha256);
        let whole = whole.unwrap_or_else(|| match recognised {
            Some(KnownText::WikiText2Test) => wikitext::raw_of_rows(&rows),
            None => rows.join("\n"),
        });
        let source = TextSource {
            file_name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            form,
            file_sha256,
            rows_sha256,
            whole_sha256: sha256_hex(whole.as_bytes()),
            rows: rows.len(),
            rows_with_text: rows.iter().filter(|row| !is_blank(row)).count(),
            recognised,
        };
        if source.rows_with_text == 0 {
            return Err(Error::EmptyText { path: path.to_path_buf(), rows: source.rows });
        }
        Ok(Text { rows, whole, source })
    }

    /// The one string that a protocol tokenizes.
    pub fn joined(&self, rule: JoinRule) -> Cow<'_, str> {
        match rule {
            JoinRule::AllRows => Cow::Owned(self.rows.join("\n\n")),
            JoinRule::RowsWithText => {
                let kept: Vec<&str> =
                    self.rows.iter().map(String::as_str).filter(|row| !is_blank(row)).collect();
                Cow::Owned(kept.join("\n\n"))
            }
            JoinRule::WholeFile => Cow::Borrowed(&self.whole),
        }
    }
}

/// Whether a row is nothing but white space, as Python's `str.strip` sees it: Unicode white space and the
/// four separators U+001C to U+001F.
fn is_blank(row: &str) -> bool {
    row.chars().all(|c| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

fn hash_of_rows(rows: &[String]) -> String {
    let mut hasher = Hasher::default();
    for row in rows {
        hasher.count(row.len());
        hasher.bytes(row.as_bytes());
    }
    hasher.hex()
}
