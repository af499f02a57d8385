//! What is asked: text, protocol, windows, and the modes in which a model is to answer. Runs nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ctq_eval::protocol::{Overrides, Protocol, protocol_id};
use ctq_eval::text::{Environment, Text, discover};
use ctq_eval::tokens::{TokenStream, Tokenizer};
use ctq_kernels::Compute;
use ctq_model::inventory::Inventory;
use ctq_model::window::Window;
use ctq_runtime::Acts;

use crate::args::{ActsChoice, ComputeChoice, ProtocolOptions};
use crate::open::Model;
use crate::party::Facts;
use crate::report::Report;

/// What is asked, before any model is opened.
pub(crate) struct Question {
    path: PathBuf,
    pub(crate) text: Text,
    pub(crate) protocol: Protocol,
}

impl Question {
    pub(crate) fn new(options: &ProtocolOptions) -> anyhow::Result<Question> {
        let overrides = Overrides {
            ctx: options.ctx,
            stride: options.stride,
            rows: options.rows,
            max_tokens: options.max_tokens,
            bos: options.bos,
        };
        let protocol = Protocol::resolve(&options.preset, &overrides)?;
        let path = match &options.data {
            Some(path) => path.clone(),
            None => discover(&Environment::of_process())?,
        };
        let text = Text::load(&path)?;
        Ok(Question { path, text, protocol })
    }
}

/// Everything that a model makes of a question before it runs.
pub(crate) struct Prepared {
    pub(crate) stream: TokenStream,
    pub(crate) windows: Vec<Window>,
    /// Rows of the head that the softmax runs over.
    pub(crate) vocabulary: usize,
}

impl Prepared {
    pub(crate) fn new(model: &Model, question: &Question, report: &Report) -> anyhow::Result<Prepared> {
        let spec = &model.source().inventory().spec;
        let mut tokenizer = Tokenizer::load(&model.path)?.with_model_bos(model.bos_token_id());
        let stream = tokenizer
            .stream(&question.text, &question.protocol, spec.vocab)
            .map_err(|error| named(error, &model.path.join("tokenizer.json")))?;
        for note in stream.notes() {
            report.warning(&format!("{}: {note}", model.name));
        }
        let windows = question.protocol.windows(&stream).map_err(|error| named(error, &question.path))?;
        let longest = windows.iter().map(|window| window.ids.len()).max().unwrap_or(0);
        if spec.max_position.is_some_and(|most| longest > most) {
            report.warning(&format!(
                "{}: windows of {longest} tokens are longer than the {} positions the model was made for",
                model.name,
                spec.max_position.unwrap_or(0)
            ));
        }
        let vocabulary = question.protocol.vocabulary(spec.vocab, stream.tokenizer_entries());
        Ok(Prepared { stream, windows, vocabulary })
    }
}

impl Prepared {
    /// What all processes of a party must have in common.
    pub(crate) fn facts(&self, model_id: Option<&str>) -> Facts {
        let question = protocol_id(&self.windows, self.vocabulary);
        BTreeMap::from([("model", model_id.unwrap_or_default().to_owned()), ("protocol", question)])
    }
}

/// Puts the file before what is wrong with it, where the error cannot know the file.
fn named(error: ctq_eval::Error, path: &Path) -> anyhow::Error {
    use ctq_eval::Error as E;
    match error {
        E::VocabularyTooLarge { .. } | E::TextTooShort { .. } => {
            let told = format!("{}: {error}", path.display());
            anyhow::Error::from(error).context(told)
        }
        other => other.into(),
    }
}

/// A mode of activation quantization and what a result calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NamedActs {
    pub(crate) acts: Acts,
    pub(crate) name: &'static str,
}

/// The modes that a choice amounts to for one model.
pub(crate) fn acts_of(choice: ActsChoice, inventory: &Inventory, report: &Report) -> Vec<NamedActs> {
    let off = NamedActs { acts: Acts::Off, name: "off" };
    let library = NamedActs { acts: Acts::Library, name: "library" };
    let kernel = NamedActs { acts: Acts::Kernel, name: "kernel" };
    if !inventory.quantizes_activations() {
        if matches!(choice, ActsChoice::Library | ActsChoice::Kernel) {
            report.note("this checkpoint does not quantize activations: acts none");
        }
        return vec![NamedActs { name: "none", ..off }];
    }
    match choice {
        ActsChoice::Auto => vec![off, library],
        ActsChoice::Off => vec![off],
        ActsChoice::Library => vec![library],
        ActsChoice::Kernel => vec![kernel],
    }
}

/// The compute mode that a choice amounts to for one model.
pub(crate) fn compute_of(choice: ComputeChoice, inventory: &Inventory, report: &Report) -> Compute {
    match choice {
        ComputeChoice::F32 => Compute::F32,
        ComputeChoice::Auto if inventory.weights_are_bf16() => Compute::Bf16,
        ComputeChoice::Auto => Compute::F32,
        ComputeChoice::Bf16 => {
            if !inventory.weights_are_bf16() {
                report.warning("not all decompressed weights are bf16: --compute bf16 rounds them once more");
            }
            Compute::Bf16
        }
    }
}
