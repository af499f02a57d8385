//! The table of named protocols: one row each.
//!
//! Source of every row: the evaluators themselves, read at the revisions that the comments name. Knows no
//! arithmetic.

use super::rules::{BosRule, JoinRule, Placement, SpecialTokens, VocabularyRule};

/// The distance from one window's start to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stride {
    /// A number of tokens that does not depend on the window length.
    Tokens(usize),
    /// The window length: windows side by side.
    WindowLength,
}

/// A named protocol, before a caller adjusts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// The name on the command line.
    pub name: &'static str,
    /// One line that teaches what the number means and whose numbers it compares with.
    pub teaches: &'static str,
    /// How rows become one string.
    pub join: JoinRule,
    /// Where BOS stands.
    pub bos: BosRule,
    /// What special tokens in the text become.
    pub special_tokens: SpecialTokens,
    /// Which logits take part in the softmax.
    pub vocabulary: VocabularyRule,
    /// Where windows start and what they score.
    pub placement: Placement,
    /// Window length in tokens.
    pub ctx: usize,
    /// Distance between window starts.
    pub stride: Stride,
    /// The most windows that are taken; `None`: all.
    pub rows: Option<usize>,
}

/// The preset that is used when none is named.
pub const DEFAULT_PRESET: &str = "exl3-2025-small";

/// ExLlamaV3 `eval/compare_q.py` of 2025 with `spec/wiki2_llama3.json`; the rows below change what they name.
const EXL3_2025: Preset = Preset {
    name: DEFAULT_PRESET,
    teaches: "ExLlamaV3's charts of 2025: overlapping windows, all but the first token scored",
    join: JoinRule::AllRows,
    bos: BosRule::TokenizerDefault,
    special_tokens: SpecialTokens::Parsed,
    vocabulary: VocabularyRule::AllLogits,
    placement: Placement::Exl3,
    ctx: 2048,
    stride: Stride::Tokens(512),
    rows: Some(20),
};

/// ExLlamaV3 `eval/ppl.py` (since 2026): no BOS at all, softmax over the tokenizer's own ids.
const EXL3_PPL: Preset = Preset {
    name: "exl3-ppl",
    teaches: "ExLlamaV3's eval/ppl.py: windows side by side, no BOS anywhere",
    bos: BosRule::None,
    vocabulary: VocabularyRule::TokenizerSlice,
    stride: Stride::WindowLength,
    rows: Some(100),
    ..EXL3_2025
};

/// llama.cpp `llama-perplexity` with its defaults.
const LLAMACPP: Preset = Preset {
    name: "llamacpp",
    teaches: "llama-perplexity: the raw file, only the second half of each chunk scored",
    join: JoinRule::WholeFile,
    bos: BosRule::LlamaCpp,
    special_tokens: SpecialTokens::AsText,
    vocabulary: VocabularyRule::AllLogits,
    placement: Placement::LlamaCpp,
    ctx: 512,
    stride: Stride::WindowLength,
    rows: None,
};

/// Every named protocol, in the order that help texts list them.
pub const PRESETS: &[Preset] = &[
    EXL3_2025,
    Preset {
        name: "exl3-2025-large",
        teaches: "the same on 100 windows (wiki2_llama3_large, wiki2_mistral_large)",
        rows: Some(100),
        ..EXL3_2025
    },
    Preset {
        name: "exl3-compareq-2026",
        teaches: "ExLlamaV3, May to July 2026: blank rows dropped, so other tokens",
        join: JoinRule::RowsWithText,
        ..EXL3_2025
    },
    EXL3_PPL,
    Preset {
        name: "exl3-qbench",
        teaches: "ExLlamaV3's eval/qbench.py: as exl3-ppl, blank rows dropped",
        join: JoinRule::RowsWithText,
        rows: Some(10),
        ..EXL3_PPL
    },
    Preset {
        name: "exl3-gguf",
        teaches: "ExLlamaV3's eval/ppl.py --gguf: llama.cpp's chunks, BOS over each first token",
        bos: BosRule::ReplaceFirst,
        special_tokens: SpecialTokens::Parsed,
        vocabulary: VocabularyRule::TokenizerSlice,
        ..LLAMACPP
    },
    Preset {
        name: "disjoint",
        teaches: "GPTQ, AWQ and most papers: the whole text in windows side by side, BOS once",
        placement: Placement::Disjoint,
        stride: Stride::WindowLength,
        rows: None,
        ..EXL3_2025
    },
    Preset {
        name: "hf-strided",
        teaches: "transformers' guide: each token scored once, with long context; reads lowest",
        placement: Placement::HfStrided,
        rows: None,
        ..EXL3_2025
    },
    LLAMACPP,
];

/// The table for people: one line a preset, its name, its numbers and what it teaches.
pub fn describe_presets() -> String {
    PRESETS
        .iter()
        .map(|preset| format!("{:<20}{:<16}{}\n", preset.name, numbers(preset), preset.teaches))
        .collect()
}

/// `2048/512x20`, or `2048/512` where all windows are taken.
fn numbers(preset: &Preset) -> String {
    let stride = match preset.stride {
        Stride::Tokens(tokens) => tokens,
        Stride::WindowLength => preset.ctx,
    };
    let rows = preset.rows.map(|rows| format!("x{rows}")).unwrap_or_default();
    format!("{}/{stride}{rows}", preset.ctx)
}
