//! A protocol: every choice between a text and the positions that are scored.
//!
//! Knows presets, overrides and where windows fall; refuses to know how text becomes tokens and how a window
//! is scored.

mod coverage;
mod identity;
mod presets;
mod rules;
mod windows;

use crate::{Error, Result};

pub use coverage::Coverage;
pub use identity::protocol_id;
pub use presets::{DEFAULT_PRESET, PRESETS, Preset, Stride, describe_presets};
pub use rules::{BosRule, JoinRule, Placement, SpecialTokens, VocabularyRule};

/// What a caller changes in a preset; `None` keeps the preset's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Window length in tokens.
    pub ctx: Option<usize>,
    /// Distance between window starts in tokens.
    pub stride: Option<usize>,
    /// The most windows that are taken.
    pub rows: Option<usize>,
    /// The stream is cut to its first so many tokens, BOS included.
    pub max_tokens: Option<usize>,
    /// Where BOS stands.
    pub bos: Option<BosRule>,
}

/// A preset with its overrides applied, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protocol {
    preset: &'static Preset,
    ctx: usize,
    stride: usize,
    rows: Option<usize>,
    max_tokens: Option<usize>,
    bos: BosRule,
}

impl Protocol {
    /// Applies `overrides` to the preset of that name. A preset whose windows stand side by side keeps them
    /// so when its `ctx` changes.
    ///
    /// # Errors
    /// [`Error::UnknownPreset`] lists the names; [`Error::BadProtocol`] says which number cannot be and what
    /// would do.
    pub fn resolve(preset: &str, overrides: &Overrides) -> Result<Protocol> {
        let found = PRESETS.iter().find(|row| row.name == preset);
        let preset = found.ok_or_else(|| Error::UnknownPreset {
            name: preset.to_owned(),
            known: PRESETS.iter().map(|row| row.name).collect::<Vec<_>>().join(", "),
        })?;
        let ctx = overrides.ctx.unwrap_or(preset.ctx);
        let stride = overrides.stride.unwrap_or(match preset.stride {
            Stride::Tokens(tokens) => tokens,
            Stride::WindowLength => ctx,
        });
        let protocol = Protocol {
            preset,
            ctx,
            stride,
            rows: overrides.rows.or(preset.rows),
            max_tokens: overrides.max_tokens,
            bos: overrides.bos.unwrap_or(preset.bos),
        };
        protocol.check()?;
        Ok(protocol)
    }

    fn check(&self) -> Result<()> {
        let bad = |what: String| Err(Error::BadProtocol { preset: self.preset.name.to_owned(), what });
        let shortest = match self.preset.placement {
            Placement::Exl3 | Placement::Disjoint | Placement::HfStrided => 2,
            Placement::LlamaCpp => 3,
        };
        if self.ctx < shortest {
            return bad(format!("ctx {} scores nothing; give at least {shortest}", self.ctx));
        }
        if self.stride == 0 {
            return bad("a stride of 0 never moves on; give at least 1".to_owned());
        }
        if self.rows == Some(0) {
            return bad("0 rows score nothing; give at least 1, or leave rows out".to_owned());
        }
        if self.max_tokens.is_some_and(|tokens| tokens < 2) {
            return bad("fewer than 2 tokens score nothing; raise max-tokens, or leave it out".to_owned());
        }
        match self.preset.placement {
            Placement::Exl3 => Ok(()),
            Placement::HfStrided if self.stride > self.ctx => bad(format!(
                "a stride of {} leaves tokens between windows of {} unscored; give a stride of at most ctx",
                self.stride, self.ctx
            )),
            Placement::HfStrided => Ok(()),
            Placement::Disjoint | Placement::LlamaCpp if self.stride != self.ctx => bad(format!(
                "its windows of {} stand side by side, so a stride of {} cannot be; leave stride out, or use an \
                 exl3 or hf-strided preset",
                self.ctx, self.stride
            )),
            Placement::Disjoint | Placement::LlamaCpp => Ok(()),
        }
    }

    /// The preset's name.
    pub fn preset(&self) -> &'static str {
        self.preset.name
    }

    /// The preset's name and, in brackets, whatever was changed in it: a changed preset must not pass for the
    /// original.
    pub fn label(&self) -> String {
        let usual_stride = match self.preset.stride {
            Stride::Tokens(tokens) => tokens,
            Stride::WindowLength => self.ctx,
        };
        let changes: Vec<String> = [
            (self.ctx != self.preset.ctx).then(|| format!("ctx {}", self.ctx)),
            (self.stride != usual_stride).then(|| format!("stride {}", self.stride)),
            self.rows.filter(|_| self.rows != self.preset.rows).map(|rows| format!("rows {rows}")),
            self.max_tokens.map(|tokens| format!("max-tokens {tokens}")),
            (self.bos != self.preset.bos).then(|| format!("bos {}", self.bos)),
        ]
        .into_iter()
        .flatten()
        .collect();
        if changes.is_empty() {
            self.preset.name.to_owned()
        } else {
            format!("{} ({})", self.preset.name, changes.join(", "))
        }
    }

    /// Window length in tokens.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// Distance between window starts in tokens.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The most windows that are taken; `None`: all.
    pub fn rows(&self) -> Option<usize> {
        self.rows
    }

    /// The stream is cut to its first so many tokens; `None`: it is not cut.
    pub fn max_tokens(&self) -> Option<usize> {
        self.max_tokens
    }

    /// How rows become one string.
    pub fn join(&self) -> JoinRule {
        self.preset.join
    }

    /// Where BOS stands.
    pub fn bos(&self) -> BosRule {
        self.bos
    }

    /// What special tokens in the text become.
    pub fn special_tokens(&self) -> SpecialTokens {
        self.preset.special_tokens
    }

    /// Where windows start and what they score.
    pub fn placement(&self) -> Placement {
        self.preset.placement
    }

    /// The number of logits, from the first, that take part in the softmax: the protocol's vocabulary slice
    /// of a head of `head_rows` rows, for a tokenizer of `tokenizer_entries` (1 + its largest id).
    pub fn vocabulary(&self, head_rows: usize, tokenizer_entries: usize) -> usize {
        match self.preset.vocabulary {
            VocabularyRule::AllLogits => head_rows,
            VocabularyRule::TokenizerSlice => head_rows.min(tokenizer_entries),
        }
    }
}
