//! Everything that can stop the oracle, each told as what, where and what to do next.

use std::path::PathBuf;

/// A forward pass that cannot be computed, or that would yield numbers nobody should read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint itself.
    #[error(transparent)]
    Model(#[from] ctq_model::Error),
    /// A module that the inventory does not list.
    #[error("{}: the text model has no linear `{module}`; ask for a module that the inventory lists", root.display())]
    UnknownModule {
        /// The checkpoint.
        root: PathBuf,
        /// The module asked for.
        module: String,
    },
    /// A layer beyond the last.
    #[error("{}: there is no layer {index}; the model has layers 0 to {}", root.display(), layers.saturating_sub(1))]
    NoSuchLayer {
        /// The checkpoint.
        root: PathBuf,
        /// The layer asked for.
        index: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A token id beyond the vocabulary.
    #[error(
        "token {id} at position {position} is outside the vocabulary of {vocab}; use the tokenizer of this checkpoint"
    )]
    TokenOutsideVocabulary {
        /// The id.
        id: u32,
        /// Where in the window it stands.
        position: usize,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// Hidden states of another model.
    #[error(
        "hidden states of width {found} given to `{module}`, which takes {expected}; pass what the layer before returned"
    )]
    Width {
        /// The module they were given to.
        module: String,
        /// Its inputs.
        expected: usize,
        /// What it got.
        found: usize,
    },
    /// A weight that is infinite or not a number.
    #[error(
        "{}: the weight of `{module}` is {value} at row {row}, column {column}; its code or scale is damaged, download the file again or quantize again",
        file.display()
    )]
    NonFiniteWeight {
        /// The file that holds it.
        file: PathBuf,
        /// The module.
        module: String,
        /// Output row.
        row: usize,
        /// Input column.
        column: usize,
        /// What the formula gave.
        value: f32,
    },
    /// An activation that is infinite or not a number.
    #[error(
        "the output of `{module}` is {value} at position {position}, feature {feature}; the result would be meaningless: look at the static scales and the weights of this module"
    )]
    NonFiniteActivation {
        /// The module.
        module: String,
        /// Position in the window.
        position: usize,
        /// Output feature.
        feature: usize,
        /// What came out.
        value: f64,
    },
    /// A scheme that has no meaning for an activation.
    #[error("activations of `{module}`: {what}; quantize with one of the presets of compressed-tensors")]
    Activation {
        /// The module.
        module: String,
        /// What is wrong.
        what: String,
    },
}

/// Result of a step of the oracle.
pub type Result<T, E = Error> = std::result::Result<T, E>;
