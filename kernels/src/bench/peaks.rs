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

/// Rounds of each instruction that is worth knowing.
#[derive(Clone, Debug)]
pub struct PeakRounds {
    /// Operations a second of all threads, round by round.
    rates: Vec<(Instruction, Vec<f64>)>,
}

impl PeakRounds {
    /// Of this machine's instructions.
    pub fn here() -> PeakRounds {
        PeakRounds {
            rates: Instruction::here().into_iter().map(|instruction| (instruction, Vec::new())).collect(),
        }
    }

    /// Of none, where something else computes.
    pub fn none() -> PeakRounds {
        PeakRounds { rates: Vec::new() }
    }

    /// Measures `rounds` more rounds, on all threads of the rayon pool it is called in at once.
    pub fn measure(&mut self, rounds: usize) {
        // In turn, so that a machine that slows down slows all.
        for _ in 0..rounds {
            for (instruction, rates) in &mut self.rates {
                let threads = rayon::broadcast(|_| instruction.measure(PROBE_SECONDS));
                rates.push(threads.into_iter().flatten().sum());
            }
        }
    }

    /// Medians of all rounds so far; empty before the first.
    pub fn timings(&self) -> Vec<PeakTiming> {
        let timing = |(instruction, rates): &(Instruction, Vec<f64>)| {
            let rates = spread(rates.clone());
            PeakTiming {
                instruction: *instruction,
                operations_per_second: rates.median,
                fastest: rates.slowest,
                slowest: rates.fastest,
            }
        };
        self.rates.iter().filter(|(_, rates)| !rates.is_empty()).map(timing).collect()
    }
}
