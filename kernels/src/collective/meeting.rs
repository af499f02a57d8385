//! A place where threads of one process hand each other values. Knows no ranks' work.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::backend::KernelError;

/// A place where threads hand each other values: each brings one, and all get all.
pub(super) struct Meeting<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    /// What each rank has brought to this round.
    brought: Vec<Option<T>>,
    /// Ranks that have seen all of this round.
    seen: usize,
    /// Why nobody meets any more.
    given_up: Option<String>,
}

impl<T> fmt::Debug for Meeting<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meeting").finish_non_exhaustive()
    }
}

impl<T: Clone> Meeting<T> {
    /// A meeting of `ranks` threads.
    pub(super) fn of(ranks: usize) -> Meeting<T> {
        let brought = std::iter::repeat_with(|| None).take(ranks).collect();
        Meeting { state: Mutex::new(State { brought, seen: 0, given_up: None }), changed: Condvar::new() }
    }

    /// Brings `value` as rank `rank`; returns when all have come, with what each has brought.
    ///
    /// # Errors
    /// [`KernelError::Lost`] where one has given up.
    pub(super) fn meet(&self, rank: usize, value: T) -> Result<Vec<T>, KernelError> {
        // The round before goes on until the last rank has seen it.
        let mut state = self.wait_while(self.lock(), |state| state.brought[rank].is_some());
        state.is_on()?;
        state.brought[rank] = Some(value);
        self.changed.notify_all();
        let is_open = |state: &State<T>| state.brought.iter().any(Option::is_none);
        let mut state = self.wait_while(state, is_open);
        if is_open(&state) {
            // A round that all have come to counts for all, whatever happens next.
            state.is_on()?;
        }
        let all = state.brought.iter().flatten().cloned().collect();
        state.seen += 1;
        if state.seen == state.brought.len() {
            state.seen = 0;
            state.brought.iter_mut().for_each(|brought| *brought = None);
            self.changed.notify_all();
        }
        Ok(all)
    }

    /// Ends all meetings, now and later.
    pub(super) fn give_up(&self, reason: &str) {
        let mut state = self.lock();
        state.given_up.get_or_insert_with(|| reason.to_owned());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until that is no longer so, or until somebody has given up.
    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, State<T>>,
        goes_on: impl Fn(&State<T>) -> bool,
    ) -> MutexGuard<'a, State<T>> {
        let waiting = |state: &mut State<T>| state.given_up.is_none() && goes_on(state);
        self.changed.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    fn is_on(&self) -> Result<(), KernelError> {
        match &self.given_up {
            Some(reason) => Err(KernelError::Lost { what: reason.clone() }),
            None => Ok(()),
        }
    }
}

/// What one rank hands to each of the others, and to itself.
pub(super) type Parcels = Arc<Vec<Vec<u8>>>;

impl Meeting<Parcels> {
    /// As [`super::Peers::exchange`] of rank `rank`.
    pub(super) fn exchange(&self, rank: usize, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, KernelError> {
        let all = self.meet(rank, Arc::new(parts))?;
        Ok(all.iter().map(|parts| parts[rank].clone()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever gives up right after a round takes nothing from it: all who came have met.
    #[test]
    fn a_round_counts_for_all_or_for_none() {
        for _ in 0..2_000 {
            let meeting = Meeting::of(2);
            let (first, second) = std::thread::scope(|scope| {
                let first = scope.spawn(|| {
                    let met = meeting.meet(0, 1);
                    meeting.give_up("rank 0: done");
                    met.is_ok()
                });
                let second = scope.spawn(|| meeting.meet(1, 2).is_ok());
                (first.join().expect("no panic"), second.join().expect("no panic"))
            });
            assert!(first && second);
        }
    }

    #[test]
    fn who_waits_is_told_who_gave_up() {
        let meeting = Meeting::of(2);
        meeting.give_up("rank 1: no room");
        meeting.give_up("rank 0: another reason");
        let told = meeting.meet(0, ()).expect_err("nobody comes");
        assert_eq!(told.to_string(), "rank 1: no room");
    }
}
