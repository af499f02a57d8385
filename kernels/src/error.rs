//! What can go wrong on a backend.

use ctq_model::matrix::{Code, Formula};
use ctq_model::scheme::Activation;

/// An operation that a backend cannot perform, or that its device failed at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// `--acts kernel` is not defined for a pair of codes.
    #[error(
        "`--acts kernel` is not defined for {weight:?} weights with {activation} activations; use --acts library"
    )]
    NoExactProduct {
        /// What the weights are.
        weight: (Code, Formula),
        /// What the activations are.
        activation: Activation,
    },
    /// `--acts kernel` is not defined for groups of activations that straddle those of the weights, or that act-order
    /// takes apart.
    #[error(
        "`--acts kernel` is not defined for {activation} activations on weights in runs of {group} inputs{}: their scales do not change together; use --acts library",
        if *.permuted { " by act-order" } else { "" }
    )]
    GroupsDoNotMeet {
        /// What the activations are.
        activation: Activation,
        /// Inputs that share a scale of the weights.
        group: usize,
        /// Whether act-order has changed the order of the inputs.
        permuted: bool,
    },
    /// Sums of codes in `--acts kernel` would not be exact.
    #[error(
        "`--acts kernel` sums products of codes in 32 bits, which a run of {k} inputs with {activation} activations could leave; use --acts library"
    )]
    LongSum {
        /// What the activations are.
        activation: Activation,
        /// Inputs of one sum.
        k: usize,
    },
    /// Groups of codes that words of several codes would straddle.
    #[error(
        "`--acts kernel` takes inputs four at a time, and scales of {activation} activations or their weights change every {group}; use --acts library"
    )]
    OddGroups {
        /// What the activations are.
        activation: Activation,
        /// Inputs that share a scale.
        group: usize,
    },
    /// A device has no memory left.
    #[error(
        "{device} has no room for {wanted} more bytes; give it less at a time (`ctq eval --memory`), or take --device cpu"
    )]
    OutOfMemory {
        /// Which.
        device: String,
        /// Bytes that were asked for.
        wanted: u64,
    },
    /// A copy, a launch or a library failed on a device.
    #[error(
        "{device}: {what}; run the same command again, and where it stays, take --device cpu and report it"
    )]
    Device {
        /// Which.
        device: String,
        /// What failed.
        what: String,
    },
    /// Another rank that shares the model is lost, or has given up.
    #[error("{what}")]
    Lost {
        /// Which, why, and what to do.
        what: String,
    },
}
