//! Layer by layer from the same hidden state, so that errors do not pile up; then free-running logits.

use ctq_model::Spec;
use ctq_reference::{Acts, Reference};
use ctq_runtime::Lockstep;
use ndarray::Array2;
use serde::Serialize;

use crate::measure::{cosine, largest_difference, log_softmax, median_row_error, relative_error};
use crate::{Error, Result, bounds};

/// Which arithmetic is compared, and so by which bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Activations not quantized: every position must agree.
    Off,
    /// As the checkpoint says: judged by the median position.
    Library,
}

impl Mode {
    fn acts(self) -> Acts {
        match self {
            Mode::Off => Acts::Off,
            Mode::Library => Acts::Library,
        }
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Token ids of the one window.
    pub ids: Vec<u32>,
    /// Layers to compare, ascending; `None`: all, and the free-running logits too.
    pub layers: Option<Vec<usize>>,
}

/// Outcome of one mode.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ArithmeticReport {
    /// The mode.
    pub mode: Mode,
    /// Embedding, compared layers and head, in order.
    pub steps: Vec<LayerReport>,
    /// Free-running logits, where all layers were run.
    pub free: Option<FreeReport>,
}

/// How far apart one step came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// `embedding`, `layer 3`, `head`.
    pub name: String,
    /// Relative error in the Frobenius norm.
    pub relative_error: f64,
    /// Median over positions of their relative errors.
    pub median_error: f64,
    /// Cosine.
    pub cosine: f64,
    /// Largest absolute difference.
    pub largest_difference: f64,
    /// What quantizing activations changes here at all, as a median relative error; found out only where the median is
    /// beyond its fixed bound.
    pub quantization_effect: Option<f64>,
    /// Whether it is within bounds.
    pub passed: bool,
}

/// How far apart free-running logits are.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FreeReport {
    /// Relative error in the Frobenius norm.
    pub relative_error: f64,
    /// Mean of KL(reference || runtime) over positions, nats.
    pub kl_divergence: f64,
    /// Share of positions with the same largest logit.
    pub top1_agreement: f64,
    /// Mean nll of the runtime minus that of the reference, nats.
    pub nll_difference: f64,
    /// Whether it is within bounds; always with quantized activations, where it only informs.
    pub passed: bool,
}

impl ArithmeticReport {
    /// True where every step is within bounds.
    pub fn passed(&self) -> bool {
        self.first_failure().is_none() && self.free.as_ref().is_none_or(|free| free.passed)
    }

    /// The first step out of bounds.
    pub fn first_failure(&self) -> Option<&LayerReport> {
        self.steps.iter().find(|step| !step.passed)
    }
}

/// Token ids for a comparison: all over the vocabulary, the same every time.
pub fn token_ids(count: usize, vocabulary: usize) -> Vec<u32> {
    // Fibonacci hashing walks the vocabulary without repeating soon.
    (0..count as u64)
        .map(|i| (((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % vocabulary as u64) as u32)
        .collect()
}

/// Runs both sides on the same hidden states and compares. `advance` is called after each step and says whether to go
/// on.
///
/// With all layers, each layer is fed the reference's hidden state, and the runtime also runs free to the logits.
/// With chosen layers, the runtime's own states feed both sides, so that the reference runs those layers only.
///
/// # Errors
/// Where either side fails, or there is no such layer.
pub fn check_arithmetic(
    runtime: &dyn Lockstep,
    reference: &Reference<'_>,
    spec: &Spec,
    plan: &Plan,
    mode: Mode,
    advance: impl FnMut() -> bool,
) -> Result<ArithmeticReport> {
    let layers = spec.blocks.len();
    if let Some(layer) = plan.layers.iter().flatten().find(|layer| **layer >= layers) {
        return Err(Error::NoSuchLayer { layer: *layer, last: layers.saturating_sub(1) });
    }
    Check { runtime, reference, spec, ids: &plan.ids, mode, steps: Vec::new(), advance }
        .run(plan.layers.as_deref())
}

struct Check<'a, F> {
    runtime: &'a dyn Lockstep,
    reference: &'a Reference<'a>,
    spec: &'a Spec,
    ids: &'a [u32],
    mode: Mode,
    steps: Vec<LayerReport>,
    advance: F,
}

impl<F: FnMut() -> bool> Check<'_, F> {
    fn run(mut self, chosen: Option<&[usize]>) -> Result<ArithmeticReport> {
        let embedded = self.runtime.embed(self.ids)?;
        let expected = self.reference.embed(self.ids)?;
        self.compare("embedding".to_owned(), &embedded, &expected, || Ok(expected.clone()))?;
        let free = match chosen {
            None => Some(self.all_layers(embedded)?),
            Some(chosen) => {
                self.chosen_layers(chosen, embedded)?;
                None
            }
        };
        Ok(ArithmeticReport { mode: self.mode, steps: self.steps, free })
    }

    fn all_layers(&mut self, embedded: Vec<f32>) -> Result<FreeReport> {
        let mut free = embedded.clone();
        let mut states = self.array(&embedded);
        for index in 0..self.spec.blocks.len() {
            let input = self.single(&states);
            let expected = self.reference.layer(index, self.array(&input), self.mode.acts())?;
            let found = self.runtime.layer(index, &input)?;
            self.compare_layer(index, &input, &found, &expected)?;
            free = self.runtime.layer(index, &free)?;
            // The reference goes on from its own, unrounded state.
            states = self.reference.layer(index, states, self.mode.acts())?;
        }
        let input = self.single(&states);
        let expected = self.reference.logits(&self.array(&input), self.mode.acts())?;
        self.compare_head(&input, &expected)?;
        let expected = self.reference.logits(&states, self.mode.acts())?;
        let found = self.runtime.head(&free)?;
        Ok(self.free(&found, &expected))
    }

    fn chosen_layers(&mut self, chosen: &[usize], embedded: Vec<f32>) -> Result<()> {
        let mut states = embedded;
        for index in 0..self.spec.blocks.len() {
            let found = self.runtime.layer(index, &states)?;
            if chosen.contains(&index) {
                let expected = self.reference.layer(index, self.array(&states), self.mode.acts())?;
                self.compare_layer(index, &states, &found, &expected)?;
            }
            states = found;
        }
        let expected = self.reference.logits(&self.array(&states), self.mode.acts())?;
        self.compare_head(&states, &expected)
    }

    fn array(&self, values: &[f32]) -> Array2<f64> {
        let values = values.iter().map(|value| f64::from(*value)).collect();
        Array2::from_shape_vec((self.ids.len(), self.spec.hidden), values).expect("one row a token")
    }

    fn single(&self, states: &Array2<f64>) -> Vec<f32> {
        states.iter().map(|value| *value as f32).collect()
    }

    fn compare_layer(
        &mut self,
        index: usize,
        input: &[f32],
        found: &[f32],
        expected: &Array2<f64>,
    ) -> Result<()> {
        let (reference, input) = (self.reference, self.array(input));
        self.compare(format!("layer {index}"), found, expected, || {
            Ok(reference.layer(index, input, Acts::Off)?)
        })
    }

    fn compare_head(&mut self, input: &[f32], expected: &Array2<f64>) -> Result<()> {
        let (reference, states) = (self.reference, self.array(input));
        let found = self.runtime.head(input)?;
        self.compare("head".to_owned(), &found, expected, || Ok(reference.logits(&states, Acts::Off)?))
    }

    /// Records one step. `unquantized` is what the reference makes of the same input with activations off.
    fn compare(
        &mut self,
        name: String,
        found: &[f32],
        expected: &Array2<f64>,
        unquantized: impl FnOnce() -> Result<Array2<f64>>,
    ) -> Result<()> {
        let width = expected.ncols();
        let expected: Vec<f64> = expected.iter().copied().collect();
        let relative = relative_error(found, &expected);
        let median = median_row_error(found, &expected, width);
        let (passed, quantization_effect) = match self.mode {
            Mode::Off => (relative <= bounds::LAYER, None),
            Mode::Library if median <= bounds::LAYER_MEDIAN => (true, None),
            Mode::Library => {
                let unquantized: Vec<f32> = unquantized()?.iter().map(|value| *value as f32).collect();
                let effect = median_row_error(&unquantized, &expected, width);
                (median <= bounds::FLIP_SHARE * effect, Some(effect))
            }
        };
        self.steps.push(LayerReport {
            name,
            relative_error: relative,
            median_error: median,
            cosine: cosine(found, &expected),
            largest_difference: largest_difference(found, &expected),
            quantization_effect,
            passed,
        });
        if (self.advance)() { Ok(()) } else { Err(Error::Interrupted) }
    }

    fn free(&self, found: &[f32], expected: &Array2<f64>) -> FreeReport {
        let width = expected.ncols();
        let expected: Vec<f64> = expected.iter().copied().collect();
        let positions = self.ids.len();
        let (mut divergence, mut agreeing, mut difference, mut total) = (0.0, 0, 0.0, 0.0);
        for position in 0..positions {
            let row = position * width..(position + 1) * width;
            let p = log_softmax(expected[row.clone()].iter().copied());
            let q = log_softmax(found[row].iter().map(|logit| f64::from(*logit)));
            divergence += p.iter().zip(&q).map(|(p, q)| libm::exp(*p) * (p - q)).sum::<f64>();
            agreeing += usize::from(largest(&p) == largest(&q));
            if let Some(target) = self.ids.get(position + 1) {
                difference += p[*target as usize] - q[*target as usize];
                total -= p[*target as usize];
            }
        }
        let relative = relative_error(found, &expected);
        let scored = (positions.max(2) - 1) as f64;
        let (difference, mean) = (difference / scored, total / scored);
        let passed = match self.mode {
            Mode::Off => relative <= bounds::LOGITS && difference.abs() <= bounds::NLL * mean.max(1.0),
            Mode::Library => relative.is_finite(),
        };
        FreeReport {
            relative_error: relative,
            kl_divergence: divergence / positions as f64,
            top1_agreement: agreeing as f64 / positions as f64,
            nll_difference: difference,
            passed,
        }
    }
}

/// Index of the largest value, the first of equals.
fn largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}
