//! Whether two records answer one question, and if not, where the questions part.
//!
//! Knows fields; refuses to judge methods: those may differ, and a caller prints them.

use super::Record;
use crate::{Error, Result};

impl Record {
    /// Checks that both records have one protocol id, so that their perplexities may stand side by side.
    ///
    /// # Errors
    /// [`Error::NotComparable`] names the first field that differs, from the text to the vocabulary slice.
    pub fn check_same_question(&self, other: &Record) -> Result<()> {
        if self.protocol_id.is_some() && self.protocol_id == other.protocol_id {
            return Ok(());
        }
        let what = match self.question_difference(other) {
            Some((field, one, another)) => {
                format!("{field} is {one} for {} and {another} for {}", self.model, other.model)
            }
            None => format!("{} and {} were asked nothing that is recorded", self.model, other.model),
        };
        Err(Error::NotComparable { what })
    }

    /// The first part of the question that differs, and its two values.
    pub(crate) fn question_difference(&self, other: &Record) -> Option<(&'static str, String, String)> {
        let mut fields = self.question().into_iter().zip(other.question());
        let parted = fields.find(|((_, one), (_, another))| one != another);
        parted.map(|((field, one), (_, another))| (field, one, another))
    }

    /// The parts of the question, those first that explain the others.
    fn question(&self) -> [(&'static str, String); 11] {
        let number =
            |value: Option<u64>| value.map_or_else(|| "unknown".to_owned(), |value| value.to_string());
        let word = |value: Option<&String>| value.map_or_else(|| "unknown".to_owned(), String::clone);
        let text = self.text.as_ref();
        [
            ("the rows' sha256", word(text.map(|text| &text.rows_sha256))),
            ("the join rule", word(text.map(|text| &text.join))),
            ("the BOS rule", word(text.map(|text| &text.bos))),
            ("special tokens in the text", word(text.map(|text| &text.special_tokens))),
            ("ctx", number(self.ctx)),
            ("stride", number(self.stride)),
            ("the number of windows", number(self.windows)),
            ("the protocol", self.preset.clone()),
            ("the token ids' sha256", word(self.tokens_sha256.as_ref())),
            ("the vocabulary slice", number(self.vocabulary)),
            ("the protocol id", word(self.protocol_id.as_ref())),
        ]
    }
}
