//! What an interrupted evaluation has already earned: the scores of whole windows, on disk, bit for bit.
//!
//! Knows a key and scores; refuses to know what the key stands for (its maker puts every choice that could
//! change a score into it). A damaged or foreign file is never trusted and never fatal: its reason is
//! returned and work starts over.
//!
//! ```text
//! "ctq-scores-1\n"
//! u64 length of the key, its bytes
//! u64 number of windows; for each: u64 window, u64 first, u64 number of scores, their f64 bits
//! 32 bytes: SHA-256 of everything before
//! ```
//! Integers and bits are little-endian.

use std::path::{Path, PathBuf};

use ctq_model::window::WindowScores;

use crate::digest::Hasher;
use crate::{Error, Result, atomic};

const MAGIC: &[u8] = b"ctq-scores-1\n";
const CHECKSUM_BYTES: usize = 32;

/// What was found under a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Saved {
    /// There is no file.
    Nothing,
    /// The scores that were saved last, bit for bit.
    Scores(Vec<WindowScores>),
    /// There is a file, and it is not to be trusted; the reason is for the log.
    Ignored {
        /// What is wrong with it, naming the file.
        reason: String,
    },
}

/// The file that holds the scores of `key` in `directory`.
///
/// # Errors
/// [`Error::BadKey`] unless the key is made of ASCII letters, digits, `-`, `_` and `.` (not first).
pub fn path(directory: &Path, key: &str) -> Result<PathBuf> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if key.is_empty() || key.starts_with('.') || !key.chars().all(allowed) {
        return Err(Error::BadKey { key: key.to_owned() });
    }
    Ok(directory.join(format!("{key}.scores")))
}

/// Replaces what is saved under `key` by `scores`, atomically. Makes the directory if there is none.
///
/// # Errors
/// [`Error::BadKey`], or [`Error::Write`], after which the earlier scores still stand.
pub fn save(directory: &Path, key: &str, scores: &[WindowScores]) -> Result<()> {
    let path = path(directory, key)?;
    std::fs::create_dir_all(directory)
        .map_err(|source| Error::Write { path: directory.to_path_buf(), source })?;
    let mut bytes = MAGIC.to_vec();
    push_count(&mut bytes, key.len());
    bytes.extend_from_slice(key.as_bytes());
    push_count(&mut bytes, scores.len());
    for window in scores {
        push_count(&mut bytes, window.window);
        push_count(&mut bytes, window.first);
        push_count(&mut bytes, window.nll.len());
        for nll in &window.nll {
            bytes.extend_from_slice(&nll.to_bits().to_le_bytes());
        }
    }
    let checksum = checksum(&bytes);
    bytes.extend_from_slice(&checksum);
    atomic::write(&path, &bytes)
}

/// What is saved under `key`.
///
/// # Errors
/// [`Error::BadKey`] only; anything wrong with the file is [`Saved::Ignored`].
pub fn load(directory: &Path, key: &str) -> Result<Saved> {
    let path = path(directory, key)?;
    let ignored = |why: &str| Saved::Ignored { reason: format!("{}: {why}; starting over", path.display()) };
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Saved::Nothing),
        Err(error) => return Ok(ignored(&format!("saved scores cannot be read ({error})"))),
    };
    Ok(match parse(&bytes, key) {
        Ok(scores) => Saved::Scores(scores),
        Err(why) => ignored(why),
    })
}

/// Removes what is saved under `key`, once its evaluation is complete.
///
/// # Errors
/// [`Error::BadKey`], or [`Error::Write`] if the file is there and stays.
pub fn remove(directory: &Path, key: &str) -> Result<()> {
    let path = path(directory, key)?;
    match std::fs::remove_file(&path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::Write { path, source }),
    }
}

fn push_count(bytes: &mut Vec<u8>, value: usize) {
    bytes.extend_from_slice(&(value as u64).to_le_bytes());
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = Hasher::default();
    hasher.bytes(bytes);
    hasher.finish()
}

type Parsed<T> = std::result::Result<T, &'static str>;

/// The bytes that remain to be read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Parsed<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or("saved scores end early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn word(&mut self) -> Parsed<u64> {
        let bytes = self.take(8)?;
        bytes.try_into().map(u64::from_le_bytes).map_err(|_| "saved scores end early")
    }

    fn count(&mut self) -> Parsed<usize> {
        usize::try_from(self.word()?).map_err(|_| "saved scores hold an impossible count")
    }
}

fn parse(bytes: &[u8], key: &str) -> Parsed<Vec<WindowScores>> {
    if !bytes.starts_with(MAGIC) {
        return Err("no file of saved scores, or one of another version");
    }
    let end = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or("saved scores end early")?;
    let (content, stored) = bytes.split_at(end);
    if checksum(content) != stored {
        return Err("saved scores are damaged (checksum)");
    }
    let mut reader = Reader(content.strip_prefix(MAGIC).ok_or("saved scores end early")?);
    let key_length = reader.count()?;
    if reader.take(key_length)? != key.as_bytes() {
        return Err("saved scores belong to another evaluation");
    }
    let windows = (0..reader.count()?).map(|_| window(&mut reader)).collect::<Parsed<Vec<_>>>()?;
    if reader.0.is_empty() { Ok(windows) } else { Err("saved scores go on after their end") }
}

fn window(reader: &mut Reader<'_>) -> Parsed<WindowScores> {
    let (window, first, count) = (reader.count()?, reader.count()?, reader.count()?);
    let nll = (0..count).map(|_| reader.word().map(f64::from_bits)).collect::<Parsed<Vec<_>>>()?;
    Ok(WindowScores { window, first, nll })
}
