//! The end of a pass over one batch: final norm and head, as log-likelihoods of scored positions or as logits.

use ctq_kernels::{Backend, Treatment};
use ctq_model::scheme::{ActivationScale, ActivationSharing};
use ctq_model::window::{Window, WindowScores};

use crate::block::Context;
use crate::error::{Error, Result};
use crate::parts::HeadWeights;
use crate::score::score;

/// Rows that have logits at once where all of them are handed out: a whole window of a large vocabulary would be
/// gigabytes.
const LOGIT_ROWS: usize = 256;

/// Log-likelihoods of the scored positions of a batch's windows, softmax over the first `vocabulary` rows of the head.
pub(crate) fn score_windows<B: Backend>(
    context: &Context<'_, B>,
    head: &HeadWeights<B>,
    windows: &[Window],
    hidden: &B::Buffer,
    vocabulary: usize,
) -> Result<Vec<WindowScores>> {
    let linear = &head.linear;
    // Only the rows that predict a scored token need logits, unless a scale is shared by the whole window.
    let whole = shares_scale(&linear.input);
    let mut rows = Vec::new();
    let mut targets = Vec::new();
    let mut ranges = Vec::new();
    for (window, range) in windows.iter().zip(context.windows) {
        let first = rows.len();
        let predicted = if whole { 1..window.ids.len() + 1 } else { window.scored.clone() };
        for position in predicted {
            rows.push((range.start + position - 1) as u32);
            // The last row has no target; it is here for its part in a shared scale.
            targets.push(window.ids.get(position).copied().unwrap_or(0));
        }
        ranges.push(first..rows.len());
    }
    let gathered = context.backend.gather(hidden, &rows)?;
    let normed = context.backend.norm(&gathered, &head.norm, context.epsilon)?;
    drop(gathered);
    let nll = score(&Context { windows: &ranges, ..*context }, linear, &normed, &targets, vocabulary)?;
    // Position of the first row of a window that has logits.
    let first_position = |window: &Window| if whole { 0 } else { window.scored.start - 1 };
    if let Some(row) = nll.iter().position(|nll| !nll.is_finite())
        && let Some((range, window)) = ranges.iter().zip(windows).find(|(range, _)| range.contains(&row))
    {
        let (module, position) = (linear.module.clone(), first_position(window) + row - range.start);
        return Err(Error::NonFinite { module, window: window.index, position });
    }
    let scores = windows.iter().zip(ranges).map(|(window, range)| {
        let first = range.start + window.scored.start - 1 - first_position(window);
        WindowScores {
            window: window.index,
            first: window.scored.start,
            nll: nll[first..first + window.scored.len()].to_vec(),
        }
    });
    Ok(scores.collect())
}

/// Hands all logits of a batch to `sink`, rows in order, [rows, vocab] at a time.
pub(crate) fn logits<B: Backend, E: From<Error>>(
    context: &Context<'_, B>,
    head: &HeadWeights<B>,
    hidden: &B::Buffer,
    sink: &mut impl FnMut(&[f32]) -> Result<(), E>,
) -> Result<(), E> {
    let backend = context.backend;
    for window in context.windows {
        let step = if shares_scale(&head.linear.input) { window.len() } else { LOGIT_ROWS };
        for start in window.clone().step_by(step.max(1)) {
            let rows: Vec<u32> = (start..window.end.min(start + step)).map(|row| row as u32).collect();
            let range = 0..rows.len();
            let ranges = std::slice::from_ref(&range);
            let logits = || -> Result<Vec<f32>> {
                let normed = backend.norm(&backend.gather(hidden, &rows)?, &head.norm, context.epsilon)?;
                let part = Context { windows: ranges, ..*context };
                Ok(backend.download(&part.linear(&head.linear, &normed, ranges)?)?)
            };
            sink(&logits()?)?;
        }
    }
    Ok(())
}

/// True where one scale, found from the data, covers all rows of a window.
fn shares_scale(treatment: &Treatment) -> bool {
    match treatment {
        Treatment::Plain => false,
        Treatment::FakeQuantized(quantizer) | Treatment::Exact(quantizer) => {
            quantizer.activation.sharing == ActivationSharing::Tensor
                && quantizer.activation.scale != ActivationScale::Static
        }
    }
}
