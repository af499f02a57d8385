//! How much arithmetic a run is, from the model and its windows as data: what a floor of its time is made of. Counts a
//! product and its sum as two operations; counts neither decoding nor anything element by element.

use std::ops::Range;

use ctq_kernels::Compute;
use ctq_model::inventory::{Inventory, Linear, LinearClass, Part};
use ctq_model::matrix::Code;
use ctq_model::spec::{BlockSpec, FfnSpec};
use ctq_model::window::Window;

use crate::engine::Settings;
use crate::last_layer::rows_stand_alone;
use crate::rows::predicting;
use crate::treatment::Acts;

/// Operations by the arithmetic that does them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Operations {
    /// On f32.
    pub f32: f64,
    /// On bf16, summed in f32.
    pub bf16: f64,
    /// On integers of at most 8 bits.
    pub integers: f64,
}

impl Operations {
    /// All of them.
    pub fn all(&self) -> f64 {
        self.f32 + self.bf16 + self.integers
    }

    /// Seconds that they take where each arithmetic does as many operations a second as `rates` says.
    pub fn seconds(&self, rates: &Operations) -> f64 {
        let parts =
            [(self.f32, rates.f32), (self.bf16, rates.bf16), (self.integers, rates.integers)].into_iter();
        parts.filter(|(operations, _)| *operations > 0.0).map(|(operations, rate)| operations / rate).sum()
    }

    fn add(&mut self, arithmetic: Arithmetic, operations: f64) {
        match arithmetic {
            Arithmetic::Of(Compute::F32) => self.f32 += operations,
            Arithmetic::Of(Compute::Bf16) => self.bf16 += operations,
            Arithmetic::Integers => self.integers += operations,
        }
    }
}

/// What multiplies.
#[derive(Clone, Copy, Debug)]
enum Arithmetic {
    /// Operands of a compute mode.
    Of(Compute),
    Integers,
}

/// Arithmetic of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Linears of the layers.
    pub linears: Operations,
    /// Scores, and probabilities times values.
    pub attention: Operations,
    /// Logits of scored positions.
    pub head: Operations,
}

impl Work {
    /// What it is to score `windows`. Only what is scored leaves the last layer, as far as [`crate::Engine`] sees to that.
    pub fn of(inventory: &Inventory, settings: Settings, windows: &[Window]) -> Work {
        let spec = &inventory.spec;
        let rows: usize = windows.iter().map(|window| window.ids.len()).sum();
        let scored: usize = windows.iter().map(|window| window.scored.len()).sum();
        let ends_early = rows_stand_alone(inventory, settings.acts);
        let mut work = Work::default();
        for (index, block) in spec.blocks.iter().enumerate() {
            let is_last = ends_early && index + 1 == spec.blocks.len();
            let leaving = if is_last { scored } else { rows };
            for linear in &inventory.part(Part::Layer(index)).linears {
                let is_of_keys = [&block.attention.k, &block.attention.v].contains(&&linear.module);
                let rows = if is_of_keys { rows } else { leaving };
                let operations =
                    2.0 * (linear.n * linear.k) as f64 * rows as f64 * part_of_tokens(linear, block);
                work.linears.add(arithmetic(linear, settings), operations);
            }
            let attention = &block.attention;
            let pairs: f64 = windows
                .iter()
                .map(|window| {
                    let asked = if is_last { predicting(window) } else { 0..window.ids.len() };
                    pairs(asked, attention.window)
                })
                .sum();
            let operations = 4.0 * (attention.heads * attention.head_dim) as f64 * pairs;
            work.attention.add(Arithmetic::Of(settings.compute), operations);
        }
        let head = inventory.part(if spec.tied() { Part::Embedding } else { Part::Head });
        for linear in &head.linears {
            // What is looked up has no inputs to quantize.
            let acts = if spec.tied() { Acts::Off } else { settings.acts };
            let operations = 2.0 * (linear.n * linear.k) as f64 * scored as f64;
            work.head.add(arithmetic(linear, Settings { acts, ..settings }), operations);
        }
        work
    }

    /// All of it.
    pub fn all(&self) -> Operations {
        let Work { linears, attention, head } = self;
        Operations {
            f32: linears.f32 + attention.f32 + head.f32,
            bf16: linears.bf16 + attention.bf16 + head.bf16,
            integers: linears.integers + attention.integers + head.integers,
        }
    }
}

/// Which part of all tokens goes through a linear: of an expert, as if the router sent all alike.
fn part_of_tokens(linear: &Linear, block: &BlockSpec) -> f64 {
    match (&block.ffn, linear.class) {
        (FfnSpec::Moe { top_k, experts, .. }, LinearClass::Expert) => {
            *top_k as f64 / experts.len().max(1) as f64
        }
        (
            FfnSpec::Moe { .. } | FfnSpec::Gated(_),
            LinearClass::Attention
            | LinearClass::Ffn
            | LinearClass::Expert
            | LinearClass::Router
            | LinearClass::Embedding
            | LinearClass::Head,
        ) => 1.0,
    }
}

/// Products of integers where both sides are such; everything else is multiplied as the compute mode has it.
fn arithmetic(linear: &Linear, settings: Settings) -> Arithmetic {
    let is_integer = |code: Code| matches!(code, Code::Int { .. });
    let both = linear.scheme.input.is_some_and(|input| is_integer(input.code))
        && is_integer(linear.scheme.storage.code());
    match settings.acts {
        Acts::Kernel if both => Arithmetic::Integers,
        Acts::Off | Acts::Library | Acts::Kernel => Arithmetic::Of(settings.compute),
    }
}

/// Pairs of a query among `positions` and a key that it sees.
fn pairs(positions: Range<usize>, window: Option<usize>) -> f64 {
    // Of position p, the p + 1 keys up to itself, or as many as a sliding window has.
    let upto = |end: usize| {
        let all = |end: usize| end as f64 * (end as f64 + 1.0) / 2.0;
        match window {
            Some(seen) if end > seen => all(seen) + (end - seen) as f64 * seen as f64,
            Some(_) | None => all(end),
        }
    };
    upto(positions.end) - upto(positions.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_sees_the_keys_before_it_and_itself() {
        assert_eq!(pairs(0..3, None), 6.0);
        assert_eq!(pairs(2..4, None), 7.0);
        assert_eq!(pairs(0..5, Some(2)), 9.0);
        assert_eq!(pairs(1..5, Some(2)), 8.0);
        assert_eq!(pairs(3..3, Some(2)), 0.0);
    }

    #[test]
    fn each_arithmetic_takes_its_own_time() {
        let operations = Operations { f32: 0.0, bf16: 6.0, integers: 8.0 };
        let rates = Operations { f32: 0.0, bf16: 2.0, integers: 4.0 };
        assert_eq!(operations.seconds(&rates), 5.0);
        assert_eq!(operations.all(), 14.0);
    }
}
