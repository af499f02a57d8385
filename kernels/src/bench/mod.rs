//! How fast a backend's heavy operations are, on the shapes of real models and random data. Measures and says with what;
//! prints nothing and judges nothing.

mod attention;
mod collective;
mod elementwise;
mod floor;
mod linear;
mod peaks;
mod probe;
#[cfg(test)]
mod tests;
mod weights;

pub use attention::{attention, rotate};
pub use collective::{Carried, Case, CollectiveTiming, Columns, MODELS, Model, cases};
pub use elementwise::{Prepared, add, gate, norm, prepare};
pub use floor::Floor;
pub use linear::{LinearCase, decode, head, linear, operands};
pub use peaks::{PeakRounds, PeakTiming};
pub use probe::{Ends, Probe};
pub use weights::{Noise, Weights, random_tiles, tiles_of};

use std::time::Instant;

use serde::Serialize;

use crate::Compute;
use crate::backend::{Backend, KernelError};
use crate::cpu::peak::Arithmetic;
use crate::random::Random;

/// One measured operation.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// `linear`, `head`, `attention`, `decode`, `rotate`, `norm`, `gate`, `add` or `prepare`.
    pub operation: String,
    /// Scheme of the weights, shape of the heads, or treatment of the inputs.
    pub what: String,
    /// Which linear of a model; empty where there is only one.
    pub part: String,
    /// Quantization of the inputs, as `--acts` names it: `off`, or `kernel` where codes are multiplied.
    pub acts: String,
    /// Rows of activations; of a decoded matrix none.
    pub m: usize,
    /// Output rows; width of the output.
    pub n: usize,
    /// Inputs; dimension of a head.
    pub k: usize,
    /// Precision of the operands.
    pub compute: Compute,
    /// Seconds of one operation: the median of several rounds.
    pub seconds: f64,
    /// The least of the rounds.
    pub fastest_seconds: f64,
    /// The most of the rounds.
    pub slowest_seconds: f64,
    /// Floating-point or integer operations of one: 2 m n k for a linear, half of all pairs for causal attention. Of a
    /// decoded matrix the weights that are made; 0 where bytes are what counts.
    pub operations: f64,
    /// Bytes that must be read and written at least: packed weights, operands, results. Of a decoded matrix its packed
    /// bytes alone.
    pub bytes: f64,
    /// What is multiplied, where that decides how fast it could be.
    pub arithmetic: Option<Arithmetic>,
}

/// How a measurement goes.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds, of which the median counts.
    pub rounds: usize,
    /// Least seconds of one round.
    pub seconds: f64,
}

/// Seconds of one call over several rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Seconds {
    median: f64,
    fastest: f64,
    slowest: f64,
}

/// Times one call. Calls are queued; the clock stops when the device has done them all.
fn time<B: Backend>(
    backend: &B,
    effort: Effort,
    mut run: impl FnMut() -> Result<(), KernelError>,
) -> Result<Seconds, KernelError> {
    let marker = backend.upload(1, &[0.0])?;
    let mut round = |calls: usize| {
        let start = Instant::now();
        (0..calls).try_for_each(|_| run())?;
        backend.download(&marker)?;
        Ok::<f64, KernelError>(start.elapsed().as_secs_f64())
    };
    // The first call compiles kernels and takes scratch.
    round(1)?;
    let second = round(1)?;
    let calls = (effort.seconds / second).ceil().clamp(1.0, 1000.0) as usize;
    // A call that is long enough by itself is a round already.
    let mut rounds = if calls == 1 { vec![second] } else { Vec::new() };
    while rounds.len() < effort.rounds.max(1) {
        rounds.push(round(calls)? / calls as f64);
    }
    Ok(spread(rounds))
}

/// Median and range of at least one number.
fn spread(mut rounds: Vec<f64>) -> Seconds {
    rounds.sort_by(f64::total_cmp);
    Seconds { median: rounds[rounds.len() / 2], fastest: rounds[0], slowest: rounds[rounds.len() - 1] }
}

/// Bytes of an element of an operand.
fn operand_bytes(compute: Compute) -> usize {
    match compute {
        Compute::Bf16 => 2,
        Compute::F32 => 4,
    }
}

/// What the products of a compute mode multiply.
fn arithmetic_of(compute: Compute) -> Arithmetic {
    match compute {
        Compute::Bf16 => Arithmetic::Bf16,
        Compute::F32 => Arithmetic::F32,
    }
}

/// Random data, for a device's clock depends on the bits that change: zeros would flatter it.
fn noise(count: usize) -> Vec<f32> {
    Random::new(1).floats(count)
}
