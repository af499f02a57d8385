//! The end of a pass over one batch: final norm and head, as log-likelihoods of scored positions or as logits.

use ctq_kernels::{Backend, Treatment};
use ctq_model::window::{Window, WindowScores};

use crate::block::{Context, Inputs};
use crate::error::{Error, Result};
use crate::last_layer::is_of_window;
use crate::parts::HeadWeights;
use crate::rows::Rows;
use crate::score::score;

/// Rows that have logits at once where all of them are handed out: a whole window of a large vocabulary would be
/// gigabytes.
const LOGIT_ROWS: usize = 256;

/// Log-likelihoods of the scored positions of a batch's windows, softmax over the first `vocabulary` rows of the head.
/// `hidden` has the rows of `context`: all of a window, or those that predict a scored position.
pub(crate) fn score_windows<B: Backend>(
    context: &Context<'_, B>,
    head: &HeadWeights<B>,
    windows: &[Window],
    hidden: &B::Buffer,
    vocabulary: usize,
) -> Result<Vec<WindowScores>> {
    let linear = &head.linear;
    let predicting = Rows::predicting(windows);
    // Only the rows that predict a scored token need logits, unless a scale is shared by the whole window.
    let rows = if shares_scale(&linear.input) { context.rows } else { &predicting };
    let gathered = if rows == context.rows {
        None
    } else {
        Some(context.backend.gather(hidden, &context.rows.find(rows))?)
    };
    let inputs = Inputs::Normed(gathered.as_ref().unwrap_or(hidden), &head.norm);
    let (operand, _) = context.operand(&inputs, &linear.input, &rows.windows)?;
    drop(gathered);
    let target = |window: &Window, position: usize| {
        // The last row has no target; it is here for its part in a shared scale.
        window.ids.get(position + 1).copied().unwrap_or(0)
    };
    let spans = windows.iter().zip(&rows.spans);
    let targets: Vec<u32> =
        spans.flat_map(|(window, span)| span.positions().map(|position| target(window, position))).collect();
    let nll = score(context, linear, &operand, &targets, vocabulary)?;
    if let Some(row) = nll.iter().position(|nll| !nll.is_finite()) {
        let (window, position) = rows.place(row);
        let (module, window) = (linear.module.clone(), windows[window].index);
        return Err(Error::NonFinite { module, window, position });
    }
    let mut scored = rows.find(&predicting).into_iter().map(|row| nll[row as usize]);
    let scores = windows.iter().map(|window| WindowScores {
        window: window.index,
        first: window.scored.start,
        nll: scored.by_ref().take(window.scored.len()).collect(),
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
    for window in &context.rows.windows {
        let step = if shares_scale(&head.linear.input) { window.len() } else { LOGIT_ROWS };
        for start in window.clone().step_by(step.max(1)) {
            let rows: Vec<u32> = (start..window.end.min(start + step)).map(|row| row as u32).collect();
            let part = Rows::of(std::iter::once(start - window.start..start - window.start + rows.len()));
            let logits = || -> Result<Vec<f32>> {
                let gathered = backend.gather(hidden, &rows)?;
                let inputs = Inputs::Normed(&gathered, &head.norm);
                let ([logits], _) = context.linears([&*head.linear], &inputs, &part.windows)?;
                Ok(backend.download(&logits)?)
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
            is_of_window(quantizer.activation)
        }
    }
}
