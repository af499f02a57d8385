//! The choices that a protocol is made of, each an enum.
//!
//! Knows what each choice means; refuses to know which preset makes it.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// How the rows of a data set become one string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinRule {
    /// All rows, empty ones too, joined with `"\n\n"` (transformers' documentation, AutoAWQ, ExLlamaV3 until
    /// May 2026).
    AllRows,
    /// Rows that hold more than white space, joined with `"\n\n"` (ExLlamaV3's compare_q from May 2026, and
    /// qbench).
    RowsWithText,
    /// The raw file as it is (llama.cpp).
    WholeFile,
}

impl JoinRule {
    /// The words that records print.
    pub fn name(self) -> &'static str {
        match self {
            JoinRule::AllRows => "all rows, \"\\n\\n\"",
            JoinRule::RowsWithText => "rows with text, \"\\n\\n\"",
            JoinRule::WholeFile => "whole file",
        }
    }
}

/// Where the token that begins a sequence (BOS) stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BosRule {
    /// As the tokenizer does by itself: once at the head of the stream, if it adds one.
    TokenizerDefault,
    /// Nowhere.
    None,
    /// Once, at the head of the stream, whether the tokenizer adds it or not.
    Once,
    /// At the head of the stream and at the first place of every window, where text follows it. A window that
    /// starts at index `a` feeds BOS and then the stream from `a + 1`, so window length and indices stay
    /// those of the stream.
    EveryWindow,
    /// Not in the stream; over the first token of every window, which is lost as context (ExLlamaV3's `ppl.py
    /// --gguf`). A tokenizer that has no BOS leaves the windows as they are.
    ReplaceFirst,
    /// llama.cpp's `vocab.add_bos`: a tokenizer that adds BOS has it at the head of the stream and over the
    /// first token of every window; any other has it nowhere.
    LlamaCpp,
}

impl BosRule {
    /// Every rule, in the order that help texts list them.
    pub const ALL: [BosRule; 6] = [
        BosRule::TokenizerDefault,
        BosRule::None,
        BosRule::Once,
        BosRule::EveryWindow,
        BosRule::ReplaceFirst,
        BosRule::LlamaCpp,
    ];

    /// The word that names the rule on a command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            BosRule::TokenizerDefault => "default",
            BosRule::None => "none",
            BosRule::Once => "once",
            BosRule::EveryWindow => "every-window",
            BosRule::ReplaceFirst => "replace-first",
            BosRule::LlamaCpp => "llamacpp",
        }
    }
}

impl fmt::Display for BosRule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for BosRule {
    type Err = Error;

    fn from_str(word: &str) -> Result<BosRule> {
        let found = BosRule::ALL.into_iter().find(|rule| rule.name() == word);
        found.ok_or_else(|| Error::UnknownBosRule {
            word: word.to_owned(),
            known: BosRule::ALL.map(BosRule::name).join(", "),
        })
    }
}

/// Whether the text of a special token, such as `</s>`, becomes that token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// It does, as transformers has it by default (and ExLlamaV3, which calls the same library).
    Parsed,
    /// It does not: it is text like any other (llama.cpp's default).
    AsText,
}

impl SpecialTokens {
    /// The words that records print.
    pub fn name(self) -> &'static str {
        match self {
            SpecialTokens::Parsed => "parsed",
            SpecialTokens::AsText => "as text",
        }
    }
}

/// Which logits take part in the softmax.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VocabularyRule {
    /// All rows of the head.
    AllLogits,
    /// Rows up to the tokenizer's largest id (ExLlamaV3's `actual_vocab_size`): padding of the head is left
    /// out.
    TokenizerSlice,
}

/// Where windows start and which of their positions are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Windows at 0, S, 2S, ... while `start < N - ctx` (a window that would end exactly at N is dropped);
    /// every position but the first is scored, again in each window that covers it (protocols.md 1.2).
    Exl3,
    /// `floor(N / ctx)` windows side by side; every position but the first is scored (AutoAWQ, GPTQ, most
    /// papers).
    Disjoint,
    /// Windows at 0, S, 2S, ..., cut at N; only tokens that no earlier window covered are scored, so that
    /// each token but the first counts once (transformers' documentation).
    HfStrided,
    /// `floor(N / ctx)` chunks side by side, `N >= 2 ctx`; positions `floor(ctx / 2) + 1 .. ctx` are scored.
    LlamaCpp,
}
