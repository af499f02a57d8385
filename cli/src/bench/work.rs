//! What a window is made of: operations by kind, and what they would take at the peak of their instructions.

use ctq_kernels::Compute;
use ctq_kernels::bench::PeakTiming;
use ctq_kernels::cpu::peak::Arithmetic;
use ctq_model::matrix::Code;

use super::operations::peak_of;
use super::shapes::Model;
use crate::bench::options::{BenchActs, BenchScheme};

/// Windows of a model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) model: Model,
    pub(super) scheme: BenchScheme,
    pub(super) acts: BenchActs,
    pub(super) compute: Compute,
    /// Layers that are run.
    pub(super) layers: usize,
    /// Windows that run together.
    pub(super) windows: usize,
    /// Tokens of each.
    pub(super) context: usize,
    /// Those at its end that are scored.
    pub(super) scored: usize,
}

/// Operations by kind, and what they multiply. A product and its sum are two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    linears: f64,
    attention: f64,
    head: f64,
    of_linears: Arithmetic,
    /// Attention and head.
    of_values: Arithmetic,
}

impl Work {
    /// Of all tokens through all layers that are run, and of the scored ones through the head.
    pub(super) fn of(question: &Question) -> Work {
        let Model { heads, head_dim, vocabulary, hidden, .. } = question.model;
        let (windows, layers) = (question.windows as f64, question.layers as f64);
        let tokens = question.context as f64;
        let weights: usize = question.model.linears().iter().map(|(_, (n, k))| n * k).sum();
        let values = match question.compute {
            Compute::Bf16 => Arithmetic::Bf16,
            Compute::F32 => Arithmetic::F32,
        };
        let codes = match question.acts {
            BenchActs::Off | BenchActs::Library => None,
            BenchActs::Kernel => question.scheme.inputs().map(|inputs| inputs.code),
        };
        Work {
            linears: windows * 2.0 * weights as f64 * tokens * layers,
            // Two products, half of the pairs.
            attention: windows * 2.0 * tokens * tokens * (heads * head_dim) as f64 * layers,
            head: windows * 2.0 * (question.scored * vocabulary) as f64 * hidden as f64,
            of_linears: match codes {
                None => values,
                Some(Code::Int { .. }) => Arithmetic::Integers,
                // Codes of floats are exact in bf16.
                Some(Code::E4m3 | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32) => Arithmetic::Bf16,
            },
            of_values: values,
        }
    }

    pub(super) fn operations(&self) -> f64 {
        self.linears + self.attention + self.head
    }

    /// Seconds at these peaks; `None` where one of them was not measured.
    pub(super) fn floor_seconds(&self, peaks: &[PeakTiming]) -> Option<f64> {
        self.seconds(|arithmetic| peak_of(peaks, arithmetic).map(|peak| peak.operations_per_second))
    }

    fn seconds(&self, rate: impl Fn(Arithmetic) -> Option<f64>) -> Option<f64> {
        Some(self.linears / rate(self.of_linears)? + (self.attention + self.head) / rate(self.of_values)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::options::ShapeChoice;

    fn work(scheme: BenchScheme, acts: BenchActs, compute: Compute) -> Work {
        let model = Model::of(ShapeChoice::Llama1b);
        let layers = model.layers;
        Work::of(&Question { model, scheme, acts, compute, layers, windows: 1, context: 2048, scored: 512 })
    }

    #[test]
    fn a_window_of_a_llama_1b_has_the_operations_that_were_counted_by_hand() {
        // 16 layers of 2048 x (2048 + 2 x 512) + 2048 x 2048 + 3 x 2048 x 8192 weights; vocabulary 128,256.
        let work = work(BenchScheme::W4a16, BenchActs::Off, Compute::Bf16);
        assert_eq!(work.linears, 2.0 * 973_078_528.0 * 2048.0);
        assert_eq!(work.attention, 274_877_906_944.0);
        assert_eq!(work.head, 268_972_326_912.0);
    }

    #[test]
    fn the_floor_is_of_the_instructions_that_are_used() {
        let rate = |arithmetic| match arithmetic {
            Arithmetic::F32 => Some(1e9),
            Arithmetic::Bf16 => Some(1e12),
            Arithmetic::Integers => Some(4e12),
        };
        // 3.986e12 in linears, 0.544e12 elsewhere.
        for (scheme, acts, compute, seconds) in [
            (BenchScheme::W4a16, BenchActs::Off, Compute::F32, 4530.0),
            (BenchScheme::W4a16, BenchActs::Off, Compute::Bf16, 5.0),
            (BenchScheme::Nvfp4, BenchActs::Kernel, Compute::F32, 548.0),
            (BenchScheme::W8a8, BenchActs::Kernel, Compute::F32, 545.0),
            (BenchScheme::W8a8, BenchActs::Library, Compute::F32, 4530.0),
        ] {
            let found = work(scheme, acts, compute).seconds(rate).map(f64::round);
            assert_eq!(found, Some(seconds), "{}", scheme.name());
        }
        assert_eq!(work(BenchScheme::Bf16, BenchActs::Off, Compute::Bf16).floor_seconds(&[]), None);
    }
}
