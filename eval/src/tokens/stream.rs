//! A token stream: the ids that windows are cut from, and their identity.
//!
//! Knows ids only, not the text or tokenizer that they came from.

use std::ops::Range;

use crate::digest::Hasher;
use crate::{Error, Result};

/// What each window is fed at its first place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowHead {
    /// The stream's own token.
    Stream,
    /// This id, BOS, in place of the stream's token.
    Bos(u32),
}

/// The token ids of a whole text, with what a protocol needs to cut windows from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenStream {
    ids: Vec<u32>,
    head: WindowHead,
    tokenizer_entries: usize,
    sha256: String,
    notes: Vec<String>,
}

impl TokenStream {
    /// A stream from ids of any origin. `tokenizer_entries` is 1 + the tokenizer's largest id.
    pub fn new(ids: Vec<u32>, head: WindowHead, tokenizer_entries: usize) -> TokenStream {
        let sha256 = hash_of_ids(&ids);
        TokenStream { ids, head, tokenizer_entries, sha256, notes: Vec::new() }
    }

    pub(super) fn with_notes(mut self, notes: Vec<String>) -> TokenStream {
        self.notes = notes;
        self
    }

    /// The ids, in order; windows index into these.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// What each window is fed at its first place.
    pub fn head(&self) -> WindowHead {
        self.head
    }

    /// 1 + the tokenizer's largest id.
    pub fn tokenizer_entries(&self) -> usize {
        self.tokenizer_entries
    }

    /// SHA-256 of the ids as 32-bit little-endian integers, hex: how tokenizers are compared.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// What a reader of the result should know about how the stream was made.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The largest id that is fed, 0 for an empty stream.
    pub fn largest_id(&self) -> u32 {
        let largest = self.ids.iter().copied().max().unwrap_or(0);
        match self.head {
            WindowHead::Stream => largest,
            WindowHead::Bos(bos) => largest.max(bos),
        }
    }

    /// Checks that each id has a row in an embedding of `embedding_rows` rows.
    ///
    /// # Errors
    /// [`Error::VocabularyTooLarge`].
    pub fn check_embedding(&self, embedding_rows: usize) -> Result<()> {
        let largest = self.largest_id();
        if largest as usize >= embedding_rows {
            return Err(Error::VocabularyTooLarge { largest, embedding_rows });
        }
        Ok(())
    }

    /// The ids that a window over `range` feeds.
    pub(crate) fn fed(&self, range: Range<usize>) -> Vec<u32> {
        let mut ids = self.ids[range].to_vec();
        match (self.head, ids.first_mut()) {
            (WindowHead::Bos(bos), Some(first)) => *first = bos,
            (WindowHead::Bos(_), None) | (WindowHead::Stream, _) => {}
        }
        ids
    }
}

fn hash_of_ids(ids: &[u32]) -> String {
    let mut hasher = Hasher::default();
    for &id in ids {
        hasher.token(id);
    }
    hasher.hex()
}
