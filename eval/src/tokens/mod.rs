//! Text into token ids, exactly as the checkpoint's own tokenizer does it.
//!
//! Knows `tokenizer.json`, BOS and special tokens; refuses to know windows, scores and which protocol wants
//! what.

mod settings;
mod stream;

use std::path::{Path, PathBuf};

use settings::Settings;
pub use stream::{TokenStream, WindowHead};

use crate::protocol::{BosRule, Protocol, SpecialTokens};
use crate::text::Text;
use crate::{Error, Result};

/// A checkpoint's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    settings: Settings,
    bos: Option<u32>,
}

/// The head of a stream and of its windows, as a BOS rule and a tokenizer decide it together.
struct Heads {
    stream_bos: Option<u32>,
    window: WindowHead,
    note: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a directory, and `tokenizer_config.json` and `added_tokens.json` where they
    /// exist.
    ///
    /// Truncation and padding stored in `tokenizer.json` are switched off: they would change the stream.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] if there is no `tokenizer.json`; [`Error::BadTokenizer`] if it cannot be
    /// understood.
    pub fn load(directory: &Path) -> Result<Tokenizer> {
        let path = directory.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::NoTokenizer { directory: directory.to_path_buf() });
        }
        let bad = |error: tokenizers::Error| {
            let what = format!("not a tokenizer that the tokenizers library reads ({error})");
            Error::BadTokenizer { path: path.clone(), what }
        };
        let mut inner = tokenizers::Tokenizer::from_file(&path).map_err(bad)?;
        inner.with_truncation(None).map_err(bad)?;
        inner.with_padding(None);
        let settings = Settings::load(directory)?;
        let bos = settings.bos_token.as_deref().and_then(|token| inner.token_to_id(token));
        Ok(Tokenizer { inner, path, settings, bos })
    }

    /// Takes `config.json`'s `bos_token_id` as BOS if the tokenizer's own files name none.
    #[must_use]
    pub fn with_model_bos(mut self, bos_token_id: Option<u32>) -> Tokenizer {
        self.bos = self.bos.or(bos_token_id);
        self
    }

    /// The id of BOS: `bos_token` of `tokenizer_config.json`, else what [`Self::with_model_bos`] gave.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// 1 + the largest id that any of the tokenizer's files gives a token (ExLlamaV3's `actual_vocab_size`).
    pub fn entries(&self) -> usize {
        let own = self.inner.get_vocab(true).into_values().max();
        own.max(self.settings.largest_id).map_or(0, |largest| largest as usize + 1)
    }

    /// The ids of `text` as `protocol` wants them: joined, tokenized in one piece, BOS placed, cut to
    /// `max_tokens`, and checked against an embedding of `embedding_rows` rows.
    ///
    /// # Errors
    /// [`Error::NoBos`] if the protocol forces BOS and none is known; [`Error::VocabularyTooLarge`];
    /// [`Error::Encode`].
    pub fn stream(&mut self, text: &Text, protocol: &Protocol, embedding_rows: usize) -> Result<TokenStream> {
        let heads = self.heads(protocol.bos())?;
        let joined = text.joined(protocol.join());
        let encoded = match protocol.bos() {
            BosRule::TokenizerDefault | BosRule::LlamaCpp => Surround::AsTokenizer,
            BosRule::None | BosRule::Once | BosRule::EveryWindow | BosRule::ReplaceFirst => Surround::Nothing,
        };
        let mut ids = self.encode(&joined, protocol.special_tokens(), encoded)?;
        if let Surround::AsTokenizer = encoded {
            self.drop_own_bos(&mut ids)?;
        }
        if let Some(bos) = heads.stream_bos {
            ids.insert(0, bos);
        }
        ids.truncate(protocol.max_tokens().unwrap_or(usize::MAX));
        let stream = TokenStream::new(ids, heads.window, self.entries());
        stream.check_embedding(embedding_rows)?;
        Ok(stream.with_notes(heads.note.into_iter().collect()))
    }

    /// Where BOS goes under a rule.
    fn heads(&self, rule: BosRule) -> Result<Heads> {
        let plain = |stream_bos| Heads { stream_bos, window: WindowHead::Stream, note: None };
        let over_first = |bos: Option<u32>| bos.map_or(WindowHead::Stream, WindowHead::Bos);
        match rule {
            BosRule::None => Ok(plain(None)),
            BosRule::Once => Ok(plain(Some(self.required_bos(rule)?))),
            BosRule::EveryWindow => {
                let bos = self.required_bos(rule)?;
                Ok(Heads { window: WindowHead::Bos(bos), ..plain(Some(bos)) })
            }
            BosRule::ReplaceFirst => {
                let note = self
                    .bos
                    .is_none()
                    .then(|| "no BOS token is known: windows keep their first token".into());
                Ok(Heads { window: over_first(self.bos), note, ..plain(None) })
            }
            BosRule::TokenizerDefault => {
                let (bos, note) = self.default_bos(self.settings.add_bos_in_transformers())?;
                Ok(Heads { note, ..plain(bos) })
            }
            BosRule::LlamaCpp => {
                let (bos, note) = self.default_bos(self.settings.add_bos)?;
                Ok(Heads { window: over_first(bos), note, ..plain(bos) })
            }
        }
    }

    fn required_bos(&self, rule: BosRule) -> Result<u32> {
        self.bos.ok_or_else(|| Error::NoBos { path: self.path.clone(), rule: rule.name() })
    }

    /// The BOS that the tokenizer puts at a text's head by itself, and what to say if its two files disagree.
    ///
    /// `stated`, `add_bos_token` of `tokenizer_config.json`, decides where it is said, as in transformers 4 (whose
    /// Llama tokenizer then rebuilds the post-processor; its generic classes do not read it) and in llama.cpp (whose
    /// converter copies it); else the post-processor of `tokenizer.json`.
    fn default_bos(&self, stated: Option<bool>) -> Result<(Option<u32>, Option<String>)> {
        let built_in = self.built_in_bos()?;
        let disagreement = |does: &str, says: bool| {
            format!(
                "tokenizer.json {does} BOS; tokenizer_config.json says add_bos_token {says}, which counts"
            )
        };
        match (stated, built_in) {
            (Some(true), None) => Ok((self.bos, self.bos.map(|_| disagreement("adds no", true)))),
            (Some(false), Some(_)) => Ok((None, Some(disagreement("adds", false)))),
            (Some(true), Some(_)) | (Some(false), None) | (None, _) => Ok((built_in, None)),
        }
    }

    /// BOS, if the post-processor of `tokenizer.json` begins even an empty text with it.
    fn built_in_bos(&self) -> Result<Option<u32>> {
        let empty = self.inner.encode_fast("", true).map_err(|error| self.encode_error(&*error))?;
        Ok(self.bos.filter(|bos| empty.get_ids().first() == Some(bos)))
    }

    /// Removes the BOS that the post-processor added, so that one place decides about it.
    fn drop_own_bos(&self, ids: &mut Vec<u32>) -> Result<()> {
        if self.built_in_bos()?.is_some() {
            ids.remove(0);
        }
        Ok(())
    }

    fn encode(&mut self, text: &str, special: SpecialTokens, surround: Surround) -> Result<Vec<u32>> {
        self.inner.set_encode_special_tokens(match special {
            SpecialTokens::Parsed => false,
            SpecialTokens::AsText => true,
        });
        let add_special = match surround {
            Surround::AsTokenizer => true,
            Surround::Nothing => false,
        };
        let encoding = self.inner.encode_fast(text, add_special);
        Ok(encoding.map_err(|error| self.encode_error(&*error))?.get_ids().to_vec())
    }

    fn encode_error(&self, error: &(dyn std::error::Error + Send + Sync)) -> Error {
        Error::Encode { path: self.path.clone(), what: error.to_string() }
    }
}

/// What the post-processor may put around a text.
#[derive(Clone, Copy)]
enum Surround {
    AsTokenizer,
    Nothing,
}
