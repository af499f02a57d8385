//! What `tokenizer_config.json` and `added_tokens.json` say beside `tokenizer.json`.
//!
//! Knows those two files' keys that change token ids; refuses to know how text is cut.

use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// The settings that matter to a token stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Settings {
    /// `bos_token`: a string, or an object with `content`; `None` if absent or null.
    pub(super) bos_token: Option<String>,
    /// `add_bos_token`, where it is said.
    pub(super) add_bos: Option<bool>,
    /// `tokenizer_class`, where it is said.
    class: Option<String>,
    /// The largest id that either file gives a token; `None` if they give none.
    pub(super) largest_id: Option<u32>,
}

/// Classes of transformers, 4 and 5, that take the post-processor of `tokenizer.json` as it is.
const IGNORE_ADD_BOS: &[&str] =
    &["PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast"];

impl Settings {
    /// `add_bos_token` as far as the tokenizer's class reads it.
    pub(super) fn add_bos_in_transformers(&self) -> Option<bool> {
        let ignored = self.class.as_deref().is_some_and(|class| IGNORE_ADD_BOS.contains(&class));
        if ignored { None } else { self.add_bos }
    }

    /// Reads both files of a directory; each may be missing.
    pub(super) fn load(directory: &Path) -> Result<Settings> {
        let config = read_json(&directory.join("tokenizer_config.json"))?;
        let added = read_json(&directory.join("added_tokens.json"))?;
        let by_id = config.get("added_tokens_decoder").and_then(Value::as_object);
        let configured = by_id.into_iter().flatten().filter_map(|(id, _)| id.parse().ok());
        let listed = added.as_object().into_iter().flatten();
        let listed = listed.filter_map(|(_, id)| id.as_u64().and_then(|id| u32::try_from(id).ok()));
        Ok(Settings {
            bos_token: config.get("bos_token").and_then(token_text),
            add_bos: config.get("add_bos_token").and_then(Value::as_bool),
            class: config.get("tokenizer_class").and_then(Value::as_str).map(str::to_owned),
            largest_id: configured.chain(listed).max(),
        })
    }
}

fn token_text(token: &Value) -> Option<String> {
    let text = token.as_str().or_else(|| token.get("content").and_then(Value::as_str));
    text.map(str::to_owned)
}

/// A JSON file, or `null` where there is none.
fn read_json(path: &Path) -> Result<Value> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Value::Null),
        Err(source) => return Err(Error::Read { path: path.to_path_buf(), source }),
    };
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::BadTokenizer { path: path.to_path_buf(), what: error.to_string() })
}
