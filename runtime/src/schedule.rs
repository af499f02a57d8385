//! How the windows of a group go through a layer, and what stays on the device meanwhile. The scores cannot tell.

use std::ops::Range;

use ctq_model::window::Window;

use crate::groups::groups;
use crate::rows::Rows;

/// Experts that run together. Their intermediate results are in memory at the same time; a token has copies for as many
/// of them as it goes to.
pub(crate) const EXPERTS_AT_ONCE: usize = 16;

/// How a group runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Tokens that go through a layer at once, at most; but at least one window.
    pub batch_tokens: usize,
    /// Where hidden states wait between two layers.
    pub hidden: HiddenPlace,
    /// How many layers, from the first on, stay on the device from one group to the next. With all of them, the
    /// embedding and the head stay too.
    pub resident_layers: usize,
}

/// Where the hidden states of a batch wait while other batches run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HiddenPlace {
    /// On the device, as they are.
    Device,
    /// In host memory: downloaded after each layer, uploaded before the next.
    Host,
}

impl Default for Schedule {
    /// One batch, its hidden states on the device, no layer kept.
    fn default() -> Schedule {
        Schedule { batch_tokens: usize::MAX, hidden: HiddenPlace::Device, resident_layers: 0 }
    }
}

/// Windows of a group that go through a layer together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Which windows of the group.
    pub(crate) windows: Range<usize>,
    /// Rows of each of them in the batch's buffers.
    pub(crate) rows: Rows,
    /// Rows that leave the last layer; `None`: all.
    pub(crate) last: Option<Rows>,
}

impl Batch {
    /// Cuts windows of `lengths` tokens into batches of at most `tokens` tokens, at least one window each, in order.
    pub(crate) fn cut(lengths: &[usize], tokens: usize) -> Vec<Batch> {
        let batch = |windows: Range<usize>| {
            let rows = Rows::of(lengths[windows.clone()].iter().map(|length| 0..*length));
            Batch { rows, last: None, windows }
        };
        groups(lengths, tokens).into_iter().map(batch).collect()
    }

    /// The same where only the rows that predict a scored position leave the last layer. `windows`: of the group.
    pub(crate) fn only_predicting(self, windows: &[Window]) -> Batch {
        Batch { last: Some(Rows::predicting(&windows[self.windows.clone()])), ..self }
    }

    /// Rows of all its windows.
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Rows that leave the last layer.
    pub(crate) fn last(&self) -> &Rows {
        self.last.as_ref().unwrap_or(&self.rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_begin_anew_in_every_batch() {
        let batches = Batch::cut(&[3, 2, 4], 5);
        assert_eq!(
            batches,
            [
                Batch { windows: 0..2, rows: Rows::of([0..3, 0..2]), last: None },
                Batch { windows: 2..3, rows: Rows::of(std::iter::once(0..4)), last: None }
            ]
        );
        assert_eq!(batches.iter().map(Batch::len).collect::<Vec<_>>(), [5, 4]);
    }
}
