//! A [`Pipe`] between two threads of one process.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Pipe;
use crate::backend::KernelError;

/// Either end of a pipe between two threads, which holds one group at a time.
#[derive(Clone, Default)]
pub struct Handover {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Option<Vec<f32>>,
    given_up: Option<String>,
}

impl fmt::Debug for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handover").finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, goes_on: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>, KernelError> {
        let waiting = |state: &mut State| state.given_up.is_none() && goes_on(state);
        let state = self.changed.wait_while(self.lock(), waiting).unwrap_or_else(PoisonError::into_inner);
        match &state.given_up {
            Some(reason) => Err(KernelError::Lost { what: reason.clone() }),
            None => Ok(state),
        }
    }
}

impl Pipe for Handover {
    fn send(&self, hidden: Vec<f32>) -> Result<(), KernelError> {
        self.shared.wait_while(|state| state.waiting.is_some())?.waiting = Some(hidden);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn receive(&self) -> Result<Vec<f32>, KernelError> {
        let hidden = self.shared.wait_while(|state| state.waiting.is_none())?.waiting.take();
        self.shared.changed.notify_all();
        Ok(hidden.unwrap_or_default())
    }

    fn abort(&self, reason: &str) {
        self.shared.lock().given_up.get_or_insert_with(|| reason.to_owned());
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_come_in_order_and_one_at_a_time() {
        let here = Handover::default();
        let there = here.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..50).try_for_each(|group| here.send(vec![group as f32; 3])));
            for group in 0..50 {
                assert_eq!(there.receive().expect("a group"), vec![group as f32; 3]);
            }
        });
    }

    #[test]
    fn who_waits_is_told_why_nothing_comes() {
        let pipe = Handover::default();
        let told = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pipe.receive());
            pipe.abort("rank 1: no room");
            waiting.join().expect("no panic").expect_err("nothing comes")
        });
        assert_eq!(told.to_string(), "rank 1: no room");
        assert!(pipe.send(Vec::new()).is_err());
    }
}
