//! Which hidden states are still finite: asked of what every half of a block leaves, told while the device works on what comes
//! next. Names the first module, window and position that are not.

use std::collections::VecDeque;

use ctq_kernels::Backend;

use crate::block::Context;
use crate::error::{Error, Result};
use crate::rows::Rows;

/// Questions in the order in which they were asked.
pub(crate) struct Watches<'a, B: Backend> {
    backend: &'a B,
    pending: VecDeque<Question<B>>,
    /// Questions asked so far.
    asked: usize,
}

/// Whether the hidden states that a module has left are finite.
struct Question<B: Backend> {
    watch: B::Watch,
    module: String,
    /// The first of the windows, counted in the group.
    first_window: usize,
    rows: Rows,
}

impl<'a, B: Backend> Watches<'a, B> {
    /// Nothing asked yet.
    pub(crate) fn new(backend: &'a B) -> Watches<'a, B> {
        Watches { backend, pending: VecDeque::new(), asked: 0 }
    }

    /// Asks about the rows of `context`, which `module` has left.
    pub(crate) fn ask(&mut self, context: &Context<'_, B>, module: &str, hidden: &B::Buffer) -> Result<()> {
        let watch = self.backend.watch(hidden)?;
        self.add(context, module, Some(watch));
        Ok(())
    }

    /// The same where the question was put already, if it was.
    pub(crate) fn add(&mut self, context: &Context<'_, B>, module: &str, watch: Option<B::Watch>) {
        let Some(watch) = watch else { return };
        let (first_window, rows) = (context.first_window, context.rows.clone());
        self.pending.push_back(Question { watch, module: module.to_owned(), first_window, rows });
        self.asked += 1;
    }

    /// Questions asked so far, for [`Watches::settle_first`].
    pub(crate) fn asked(&self) -> usize {
        self.asked
    }

    /// Waits for the answers to the first `count` questions of all that were ever asked.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for the first bad answer; where the device fails.
    pub(crate) fn settle_first(&mut self, count: usize) -> Result<()> {
        while self.asked - self.pending.len() < count {
            let Some(question) = self.pending.pop_front() else { break };
            let Question { watch, module, first_window, rows } = question;
            if let Some(row) = self.backend.seen(watch)? {
                let (window, position) = rows.place(row);
                return Err(Error::NonFinite { module, window: first_window + window, position });
            }
        }
        Ok(())
    }

    /// Waits for all answers.
    ///
    /// # Errors
    /// As [`Watches::settle_first`].
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.settle_first(self.asked)
    }
}
