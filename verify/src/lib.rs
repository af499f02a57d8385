//! The runtime held against an independent reference, and a verdict.
//!
//! Three questions, cheapest first:
//! * [`round_trip`](ctq_convert::check_round_trip): does the container give the original bytes back?
//! * [`check_operands`]: are the runtime's weights bit for bit the reference's?
//! * [`check_arithmetic`]: fed the same hidden state, does each layer come out the same? Then, running free, do the
//!   logits?
//!
//! Runtime and reference share names and shapes and nothing that computes. Bounds stand in [`bounds`], in one place.

mod arithmetic;
pub mod bounds;
mod measure;
mod operands;

pub use arithmetic::{ArithmeticReport, FreeReport, LayerReport, Mode, Plan, check_arithmetic, token_ids};
pub use operands::{OperandMismatch, OperandReport, check_operands};

/// A comparison that could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The runtime failed.
    #[error("runtime: {0}")]
    Runtime(#[from] ctq_runtime::Error),
    /// The reference failed.
    #[error("reference: {0}")]
    Reference(#[from] ctq_reference::Error),
    /// A layer was asked for that the model does not have.
    #[error("there is no layer {layer}: the model has layers 0 to {last}; give others with --layers")]
    NoSuchLayer {
        /// The layer asked for.
        layer: usize,
        /// The last that there is.
        last: usize,
    },
    /// The observer asked to stop.
    #[error("interrupted: nothing is kept, the same command starts again")]
    Interrupted,
}

/// Result of a comparison.
pub type Result<T, E = Error> = std::result::Result<T, E>;
