//! What the threads of a pool can do together with one instruction: the yardstick of every product on the CPU.

use serde::Serialize;

use super::spread;
use crate::cpu::peak::{Instruction, PROBE_SECONDS};

/// How fast all threads are together with one instruction, and nothing else.
#[derive(Clone, Debug, Serialize)]
pub struct PeakTiming {
    /// Name of the instruction.
    pub instruction: Instruction,
    /// Operations a second of all threads: the median of several rounds.
    pub operations_per_second: f64,
    /// The most of the rounds.
    pub fastest: f64,
    /// The least of the rounds.
    pub slowest: f64,
}

/// Measures those instructions that are worth knowing here, on all threads of the rayon pool it is called in at once.
pub fn peaks(rounds: usize) -> Vec<PeakTiming> {
    let mut of_rounds: Vec<(Instruction, Vec<f64>)> =
        Instruction::here().into_iter().map(|instruction| (instruction, Vec::new())).collect();
    // In turn, so that a machine that slows down slows all.
    for _ in 0..rounds.max(1) {
        for (instruction, rates) in &mut of_rounds {
            let threads = rayon::broadcast(|_| instruction.measure(PROBE_SECONDS));
            rates.push(threads.into_iter().flatten().sum());
        }
    }
    let told = |(instruction, rates)| {
        let rates = spread(rates);
        PeakTiming {
            instruction,
            operations_per_second: rates.median,
            fastest: rates.slowest,
            slowest: rates.fastest,
        }
    };
    of_rounds.into_iter().map(told).collect()
}
