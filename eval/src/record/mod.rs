//! The record of one evaluation: the number beside its question, its method, its cost and its source.
//!
//! A stable, versioned JSON object. Knows fields and their meaning; refuses to compute any of them but for
//! copying a [`Summary`] or a [`Protocol`] in. A field that is not known is `null`, never a guess.

mod compare;
mod file;
mod method;
mod numbers;
mod render;
mod table;

use serde::{Deserialize, Serialize};

use crate::protocol::{Coverage, Protocol, protocol_id};
use crate::statistics::{Paired, Summary};
use crate::text::Text;
use crate::tokens::TokenStream;

pub use file::{read, write};
pub use method::Method;
pub use render::{block, line};
pub use table::table;

/// The version of the JSON object; raised when a field changes its meaning or goes.
pub const RECORD_VERSION: u32 = 1;

/// What became of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// There is a perplexity.
    Ok,
    /// It could not be run, or did not finish.
    Failed,
    /// It ran and met a value that is no number.
    Invalid,
    /// The windows of one shard were scored: a part, which has no perplexity of its own.
    Partial,
}

/// Bits per weight of a checkpoint, each by the convention that its field names.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bpw {
    /// Stored bits of the layers' matrices, scales and zero points included, over their elements (ExLlamaV3's
    /// convention).
    pub layer: f64,
    /// The same of the head, or of the embedding tied to it.
    pub head: f64,
    /// All bytes of the checkpoint's weight files over all parameters.
    pub file: f64,
    /// The same of a converted container; `null` where a checkpoint is scored as it is.
    pub container: Option<f64>,
}

/// The text that was scored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextRecord {
    /// Name of the file.
    pub file: String,
    /// Its form: `txt`, `raw`, `jsonl` or `parquet`.
    pub form: String,
    /// SHA-256 of the file.
    pub file_sha256: String,
    /// SHA-256 of the rows (see [`crate::text::TextSource::rows_sha256`]).
    pub rows_sha256: String,
    /// SHA-256 of the raw text.
    pub whole_sha256: String,
    /// Number of rows.
    pub rows: u64,
    /// The data set, where it is a known one.
    pub recognised: Option<String>,
    /// How rows became one string.
    pub join: String,
    /// The BOS rule.
    pub bos: String,
    /// What special tokens in the text became.
    pub special_tokens: String,
}

/// A paired difference from another record on the same positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairedRecord {
    /// The other record's effective activation quantization, such as `off`.
    pub against: String,
    /// `ln ppl - ln ppl_other`, nats.
    pub difference: f64,
    /// Block standard error of `difference`.
    pub difference_error: Option<f64>,
    /// `ppl / ppl_other`.
    pub ratio: f64,
    /// Block standard error of `ratio`.
    pub ratio_error: Option<f64>,
}

impl PairedRecord {
    /// A paired difference `against` the record of that activation quantization.
    pub fn new(against: &str, paired: &Paired) -> PairedRecord {
        PairedRecord {
            against: against.to_owned(),
            difference: paired.difference,
            difference_error: paired.difference_error,
            ratio: paired.ratio,
            ratio_error: paired.ratio_error,
        }
    }
}

/// One evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_VERSION`].
    pub record_version: u32,
    /// Version of the program that wrote it.
    pub ctq_version: String,
    /// What became of the evaluation.
    pub status: Status,
    /// Why it failed or is invalid.
    pub reason: Option<String>,
    /// Name of the model, for people.
    pub model: String,
    /// Where it was read from.
    pub path: String,
    /// The architecture's family.
    pub family: Option<String>,
    /// The compression format, such as `nvfp4-pack-quantized`.
    pub scheme: Option<String>,
    /// `exp(total_nll / count)`; `null` unless `status` is `ok`.
    pub perplexity: Option<f64>,
    /// Block standard error of the perplexity.
    pub perplexity_error: Option<f64>,
    /// Standard error of the perplexity as llama.cpp computes it, positions taken for independent.
    pub perplexity_error_iid: Option<f64>,
    /// Sum of negative log-likelihoods, nats.
    pub total_nll: Option<f64>,
    /// Scored positions, repeats included.
    pub count: Option<u64>,
    /// Tokens in the stream.
    pub tokens: Option<u64>,
    /// SHA-256 of the stream's ids as 32-bit little-endian integers.
    pub tokens_sha256: Option<String>,
    /// The protocol's label: the preset's name and what was changed in it.
    pub preset: String,
    /// Hash of the question.
    pub protocol_id: Option<String>,
    /// Number of windows.
    pub windows: Option<u64>,
    /// Window length, tokens.
    pub ctx: Option<u64>,
    /// Distance between window starts, tokens.
    pub stride: Option<u64>,
    /// Logits that take part in the softmax.
    pub vocabulary: Option<u64>,
    /// The part of the stream that is scored.
    pub scored: Option<Coverage>,
    /// The text.
    pub text: Option<TextRecord>,
    /// Hash of the method.
    pub method_id: Option<String>,
    /// Effective activation quantization.
    pub acts: Option<String>,
    /// Effective operand precision.
    pub compute: Option<String>,
    /// Effective quantization of keys and values.
    pub kv: Option<String>,
    /// The backend that scored.
    pub backend: Option<String>,
    /// Its instruction set or device class.
    pub isa: Option<String>,
    /// Revision of NUMERICS.md.
    pub numerics_revision: Option<u32>,
    /// Threads used.
    pub threads: Option<u64>,
    /// Tensor-parallel ranks.
    pub tp: Option<u64>,
    /// Stages that shared the layers.
    pub pp: Option<u64>,
    /// Replicas that shared the windows.
    pub replicas: Option<u64>,
    /// Bits per weight.
    pub bpw: Option<Bpw>,
    /// (layer + head stored bytes) / 2^30, ExLlamaV3's convention.
    pub vram_gb: Option<f64>,
    /// Wall-clock time of the scoring, seconds.
    pub seconds: Option<f64>,
    /// Tokens fed per second of it.
    pub tokens_per_second: Option<f64>,
    /// Peak memory of this run, bytes.
    pub peak_memory_bytes: Option<u64>,
    /// The paired difference from another record, where both were scored.
    pub paired: Option<PairedRecord>,
}

impl Record {
    /// A record of an evaluation about which nothing more is known: failed, `reason` says why, until
    /// [`Self::set_summary`] gives it a perplexity.
    pub fn new(model: &str, path: &str, preset: &str, reason: &str) -> Record {
        Record {
            record_version: RECORD_VERSION,
            ctq_version: env!("CARGO_PKG_VERSION").to_owned(),
            status: Status::Failed,
            reason: Some(reason.to_owned()),
            model: model.to_owned(),
            path: path.to_owned(),
            family: None,
            scheme: None,
            perplexity: None,
            perplexity_error: None,
            perplexity_error_iid: None,
            total_nll: None,
            count: None,
            tokens: None,
            tokens_sha256: None,
            preset: preset.to_owned(),
            protocol_id: None,
            windows: None,
            ctx: None,
            stride: None,
            vocabulary: None,
            scored: None,
            text: None,
            method_id: None,
            acts: None,
            compute: None,
            kv: None,
            backend: None,
            isa: None,
            numerics_revision: None,
            threads: None,
            tp: None,
            pp: None,
            replicas: None,
            bpw: None,
            vram_gb: None,
            seconds: None,
            tokens_per_second: None,
            peak_memory_bytes: None,
            paired: None,
        }
    }

    /// Writes down the question: text, stream, protocol, windows and vocabulary slice.
    pub fn set_question(
        &mut self,
        text: &Text,
        stream: &TokenStream,
        protocol: &Protocol,
        windows: &[ctq_model::window::Window],
        vocabulary: usize,
    ) {
        self.preset = protocol.label();
        self.tokens = Some(stream.ids().len() as u64);
        self.tokens_sha256 = Some(stream.sha256().to_owned());
        self.protocol_id = Some(protocol_id(windows, vocabulary));
        self.windows = Some(windows.len() as u64);
        self.ctx = Some(protocol.ctx() as u64);
        self.stride = Some(protocol.stride() as u64);
        self.vocabulary = Some(vocabulary as u64);
        self.scored = Coverage::of(windows, stream.ids().len());
        self.text = Some(TextRecord {
            file: text.source.file_name.clone(),
            form: text.source.form.name().to_owned(),
            file_sha256: text.source.file_sha256.clone(),
            rows_sha256: text.source.rows_sha256.clone(),
            whole_sha256: text.source.whole_sha256.clone(),
            rows: text.source.rows as u64,
            recognised: text.source.recognised.map(|known| known.name().to_owned()),
            join: protocol.join().name().to_owned(),
            bos: protocol.bos().name().to_owned(),
            special_tokens: protocol.special_tokens().name().to_owned(),
        });
    }

    /// Writes down the method and its id.
    pub fn set_method(&mut self, method: &Method) {
        self.method_id = Some(method.id());
        self.acts = Some(method.acts.clone());
        self.compute = Some(method.compute.clone());
        self.kv = Some(method.kv.clone());
        self.backend = Some(method.backend.clone());
        self.isa = Some(method.isa.clone());
        self.numerics_revision = Some(method.numerics_revision);
    }

    /// Writes down the answer; the status becomes `ok`.
    pub fn set_summary(&mut self, summary: &Summary) {
        self.status = Status::Ok;
        self.reason = None;
        self.perplexity = Some(summary.perplexity);
        self.perplexity_error = summary.block_error;
        self.perplexity_error_iid = summary.iid_error;
        self.total_nll = Some(summary.total_nll);
        self.count = Some(summary.count);
    }

    /// Turns the record into one of a part: its scores lie beside it.
    pub fn set_partial(&mut self) {
        self.status = Status::Partial;
        self.reason = None;
    }

    /// Turns the record into one without an answer.
    ///
    /// `status` is [`Status::Failed`] or [`Status::Invalid`]; the perplexity goes in either case.
    pub fn set_without_answer(&mut self, status: Status, reason: &str) {
        self.status = status;
        self.reason = Some(reason.to_owned());
        self.perplexity = None;
        self.perplexity_error = None;
        self.perplexity_error_iid = None;
        self.total_nll = None;
        self.count = None;
        self.paired = None;
    }
}
