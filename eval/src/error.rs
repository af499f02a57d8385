//! Everything that can go wrong between a text and a record; each message says what, where and what to do
//! next.
//!
//! Knows no exit codes; two questions let a caller choose one.

use std::path::PathBuf;

use crate::shard::Shard;

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("{}: cannot read: {source}; check the path and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be written; what stood there before is unchanged.
    #[error("{}: cannot write: {source}; check that the directory exists and has space", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A data set's file has an extension that says nothing.
    #[error("{}: unknown form of text; name it .txt, .raw, .jsonl or .parquet", path.display())]
    UnknownTextForm {
        /// The file.
        path: PathBuf,
    },
    /// A text file is not UTF-8.
    #[error("{}: not UTF-8 at byte {offset}; convert the file to UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The first byte that cannot be read.
        offset: usize,
    },
    /// A line of a `.jsonl` file is no row.
    #[error("{}: line {line}: {what}; each line must be an object like {{\"text\": \"...\"}}", path.display())]
    BadJsonLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A Parquet file is damaged or has no text.
    #[error(
        "{}: {what}; a Parquet data set needs a string column \"text\", and .txt and .jsonl also work",
        path.display()
    )]
    BadParquet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A Parquet file is compressed in a way that is not built in.
    #[error(
        "{}: compressed with {codec}, which is not built in; rewrite it with SNAPPY or uncompressed, or give \
         the same rows as .txt or .jsonl", path.display()
    )]
    ParquetCodec {
        /// The file.
        path: PathBuf,
        /// The codec's name.
        codec: String,
    },
    /// A data set holds nothing but white space.
    #[error("{}: nothing but white space, rows: {rows}; give a file with text", path.display())]
    EmptyText {
        /// The file.
        path: PathBuf,
        /// Rows found.
        rows: usize,
    },
    /// `$CTQ_DATA` names no file.
    #[error(
        "{}: $CTQ_DATA names this, and it is no file; set it to a .txt, .raw, .jsonl or .parquet file",
        path.display()
    )]
    DataVariable {
        /// The value of the variable.
        path: PathBuf,
    },
    /// No data set was named and none was found.
    #[error(
        "no text to score: looked for WikiText-2 in $CTQ_DATA and in {looked}; fetch it with `hf download \
         Salesforce/wikitext wikitext-2-raw-v1/test-00000-of-00001.parquet --repo-type dataset`, which puts it \
         there, or give --data a .txt, .raw, .jsonl or .parquet file"
    )]
    NoData {
        /// The place that was searched.
        looked: String,
    },

    /// A checkpoint has no `tokenizer.json`.
    #[error(
        "{}: no tokenizer.json; copy tokenizer.json and tokenizer_config.json here from the model that was \
         quantized",
        directory.display()
    )]
    NoTokenizer {
        /// The directory.
        directory: PathBuf,
    },
    /// A tokenizer's file cannot be understood.
    #[error("{}: {what}; copy the file again from the model that was quantized", path.display())]
    BadTokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A tokenizer refused the text.
    #[error(
        "{}: cannot tokenize the text: {what}; compare the file with the one of the model that was quantized",
        path.display()
    )]
    Encode {
        /// The tokenizer.
        path: PathBuf,
        /// What it said.
        what: String,
    },
    /// The protocol needs BOS and nobody names one.
    #[error(
        "{}: the BOS rule {rule} needs a BOS token, and neither tokenizer_config.json (bos_token) \
         nor config.json (bos_token_id) names one; use --bos none or --bos default", path.display()
    )]
    NoBos {
        /// The tokenizer.
        path: PathBuf,
        /// The rule.
        rule: &'static str,
    },
    /// The tokenizer yields ids that the embedding does not have.
    #[error(
        "vocabulary too large for the embedding: the text holds token id {largest} and the embedding has \
         {embedding_rows} rows; the tokenizer belongs to another model: copy the right one beside the \
         checkpoint"
    )]
    VocabularyTooLarge {
        /// The largest id.
        largest: u32,
        /// Rows of the embedding.
        embedding_rows: usize,
    },

    /// No preset has that name.
    #[error("no protocol is called {name:?}; the presets are {known}")]
    UnknownPreset {
        /// The name.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// No BOS rule has that name.
    #[error("no BOS rule is called {word:?}; the rules are {known}")]
    UnknownBosRule {
        /// The word.
        word: String,
        /// The words that exist.
        known: String,
    },
    /// A preset cannot be changed that way.
    #[error("protocol {preset}: {what}")]
    BadProtocol {
        /// The preset.
        preset: String,
        /// What cannot be, and what would do.
        what: String,
    },
    /// The stream holds no whole window.
    #[error(
        "protocol {preset}: text shorter than one window: it has {tokens} tokens, and windows of {ctx} need at \
         least {needed}; give a longer text or a smaller ctx"
    )]
    TextTooShort {
        /// The preset.
        preset: String,
        /// Tokens in the stream.
        tokens: usize,
        /// The fewest tokens that would do.
        needed: usize,
        /// Window length.
        ctx: usize,
    },

    /// Scores do not belong to the windows.
    #[error("scores do not fit their windows: {what}; score these windows again")]
    ScoresMismatch {
        /// Where they part.
        what: String,
    },
    /// A score is NaN or infinite: the result is invalid.
    #[error(
        "the result is INVALID: window {window}, position {position} (stream token {token}) has a negative \
         log-likelihood of {value}; verify the checkpoint to find the layer it comes from"
    )]
    NonFiniteScore {
        /// Index of the window.
        window: usize,
        /// Position in the window.
        position: usize,
        /// Index in the token stream.
        token: usize,
        /// The score.
        value: f64,
    },
    /// The mean is so large that its exponential is no number: the result is invalid.
    #[error(
        "the result is INVALID: a mean negative log-likelihood of {mean} nats has no finite perplexity; verify \
         the checkpoint to find the layer it comes from"
    )]
    PerplexityOverflow {
        /// The mean in nats.
        mean: f64,
    },
    /// Two score sets are of different questions.
    #[error("cannot compare: {what}; score both with one protocol, text and tokenizer")]
    NotComparable {
        /// The field that differs, and both values.
        what: String,
    },

    /// A file of records cannot be understood.
    #[error("{}: {what}; it must be a list of records of this version, as --json writes it", path.display())]
    BadRecords {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file of negative log-likelihoods cannot be understood.
    #[error("{}: {what}; write it again with --nll", path.display())]
    BadNllFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },

    /// A shard is not written `i/n`, or there is none of that number.
    #[error(
        "{text:?} is no shard: expected i/n with i from 1 to n, such as 2/8 for the second of eight parts"
    )]
    BadShard {
        /// What was given.
        text: String,
    },
    /// A part file cannot be understood, or does not hold what it must.
    #[error("{}: {what}; write it again with `ctq eval --shard`", path.display())]
    BadPart {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Two parts are not of one evaluation.
    #[error(
        "{} and {} are not parts of one evaluation: {what}; merge the parts of one command, run by one version of ctq \
         on one kind of device", path.display(), other.display()
    )]
    ForeignPart {
        /// One file.
        path: PathBuf,
        /// The other.
        other: PathBuf,
        /// Where they part, and both values.
        what: String,
    },
    /// Two files hold the same part.
    #[error("part {shard} is doubled: {} and {} both hold it, {same}; {next}", path.display(), other.display())]
    DoubledPart {
        /// Which part.
        shard: Shard,
        /// One file.
        path: PathBuf,
        /// The other.
        other: PathBuf,
        /// Whether they hold the same.
        same: &'static str,
        /// What to do.
        next: &'static str,
    },
    /// Parts are not there.
    #[error("{what}; {there}; run `ctq eval --shard {first}` as the others were run, and merge again")]
    MissingParts {
        /// Which are missing.
        what: String,
        /// Which are there, and in which files.
        there: String,
        /// The first that is missing.
        first: Shard,
    },
    /// A part says that a model failed, and others have scored it.
    #[error("{}: part {shard} has no scores of {model}: {reason}; run this part again and merge again", path.display())]
    FailedPart {
        /// The file.
        path: PathBuf,
        /// Which part.
        shard: Shard,
        /// The model.
        model: String,
        /// Why, as the part has it.
        reason: String,
    },
    /// There is nothing to merge.
    #[error("no part to merge; name the files that `ctq eval --shard` has written, such as part-*.json")]
    NoParts,

    /// A key cannot name a file of saved scores.
    #[error("{key:?} cannot name saved scores; use letters, digits, '-', '_' and '.', not first")]
    BadKey {
        /// The key.
        key: String,
    },
}

impl Error {
    /// Whether a score was no number, so that the result is INVALID rather than the command mistaken.
    pub fn is_invalid_result(&self) -> bool {
        matches!(self, Error::NonFiniteScore { .. } | Error::PerplexityOverflow { .. })
    }

    /// Whether this may pass on another day: the machine failed, not the input.
    pub fn is_out_of_resources(&self) -> bool {
        use std::io::ErrorKind as E;
        match self {
            Error::Write { source, .. } => !matches!(
                source.kind(),
                E::NotFound
                    | E::NotADirectory
                    | E::IsADirectory
                    | E::AlreadyExists
                    | E::PermissionDenied
                    | E::ReadOnlyFilesystem
            ),
            _ => false,
        }
    }
}
