//! Blocks of memory that one operation leaves behind and another takes: the allocator gives large ones back to the
//! kernel at each end and pays for every page at each beginning. Knows sizes; not what lies in a block.
//!
//! Blocks in use and kept are together never more than the largest sum that was ever in use at once, and a block that
//! nothing has asked for in a while is let go.

use std::sync::{Mutex, PoisonError};

/// Blocks below this many elements are the allocator's.
const SMALLEST: usize = 1 << 18;

/// Most elements that are kept: 256 MiB.
const MOST_KEPT: usize = 1 << 26;

/// Blocks handed out before one that is kept is let go.
const PATIENCE: u64 = 256;

/// Blocks of one type, of at least [`SMALLEST`] elements.
pub(crate) struct Pool<T> {
    state: Mutex<State<T>>,
}

struct State<T> {
    /// With the time at which each came back.
    kept: Vec<(u64, Vec<T>)>,
    /// Addresses and elements of blocks in use, and the most elements that ever were.
    used: Vec<(usize, usize)>,
    most: usize,
    /// Counts blocks that were handed out.
    time: u64,
}

/// Values of activations.
pub(crate) static FLOATS: Pool<f32> = Pool::new();

/// Words of packed inputs.
pub(crate) static WORDS: Pool<u32> = Pool::new();

impl<T: Copy + Default> Pool<T> {
    const fn new() -> Pool<T> {
        Pool { state: Mutex::new(State { kept: Vec::new(), used: Vec::new(), most: 0, time: 0 }) }
    }

    /// A block of `count` elements that hold anything: zeros, or what an operation before has left.
    pub(crate) fn take(&self, count: usize) -> Vec<T> {
        if count < SMALLEST {
            return vec![T::default(); count];
        }
        let mut block = self.with(|state| state.take(count)).unwrap_or_else(|| vec![T::default(); count]);
        // Longer only where an earlier use was shorter.
        block.resize(count, T::default());
        self.with(|state| state.hand_out(&block));
        block
    }

    /// Keeps a block for later.
    pub(crate) fn give(&self, block: Vec<T>) {
        if block.capacity() >= SMALLEST {
            drop(self.with(|state| state.give(block)));
        }
    }

    fn with<R>(&self, change: impl FnOnce(&mut State<T>) -> R) -> R {
        // Whoever panicked left the lists whole: each change is one step.
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> State<T> {
    /// The smallest block that is kept with room for `count`, but not for much more.
    fn take(&mut self, count: usize) -> Option<Vec<T>> {
        self.time += 1;
        let time = self.time;
        self.kept.retain(|(since, _)| since + PATIENCE > time);
        let fits = |block: &Vec<T>| (count..=count + count / 4).contains(&block.capacity());
        let best = self.kept.iter().enumerate().filter(|(_, (_, block))| fits(block));
        let found = best.min_by_key(|(_, (_, block))| block.capacity()).map(|(at, _)| at);
        let block = found.map(|at| self.kept.swap_remove(at).1);
        // Others go before a new one is made.
        let needed = self.used() + block.as_ref().map_or(count, Vec::capacity);
        self.trim(self.most.max(needed).saturating_sub(needed));
        block
    }

    fn hand_out(&mut self, block: &Vec<T>) {
        self.used.push((block.as_ptr().addr(), block.capacity()));
        self.most = self.most.max(self.used());
    }

    /// Blocks that came from elsewhere, as clones do, are welcome where there is room. What is not kept is returned, to be
    /// freed without the lock.
    fn give(&mut self, block: Vec<T>) -> Option<Vec<T>> {
        self.used.retain(|(address, _)| *address != block.as_ptr().addr());
        let room = self.most.saturating_sub(self.used()).min(MOST_KEPT).saturating_sub(self.kept());
        if block.capacity() > room {
            return Some(block);
        }
        self.kept.push((self.time, block));
        None
    }

    fn used(&self) -> usize {
        self.used.iter().map(|(_, elements)| elements).sum()
    }

    fn kept(&self) -> usize {
        self.kept.iter().map(|(_, block)| block.capacity()).sum()
    }

    /// Lets the oldest go until no more than `most` are kept.
    fn trim(&mut self, most: usize) {
        while self.kept() > most
            && let Some(oldest) = (0..self.kept.len()).min_by_key(|at| self.kept[*at].0)
        {
            self.kept.swap_remove(oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_for_one_of_its_size() {
        let pool = Pool::<f32>::new();
        let mut first = pool.take(2 * SMALLEST);
        assert!(first.iter().all(|value| *value == 0.0));
        first.fill(7.0);
        pool.give(first);
        let again = pool.take(2 * SMALLEST - 5);
        assert_eq!(again.len(), 2 * SMALLEST - 5);
        assert!(again.iter().all(|value| *value == 7.0), "the block of before");
        pool.give(again);
        // Not for one that is much smaller.
        let small = pool.take(SMALLEST);
        assert!(small.iter().all(|value| *value == 0.0));
    }

    #[test]
    fn no_more_is_held_than_was_ever_in_use() {
        let pool = Pool::<u32>::new();
        let held = |pool: &Pool<u32>| pool.with(|state| state.used() + state.kept());
        let three: Vec<_> = (0..3).map(|_| pool.take(SMALLEST)).collect();
        three.into_iter().for_each(|block| pool.give(block));
        assert_eq!(held(&pool), 3 * SMALLEST);
        // None of them fits: two have to go for this one.
        let large = pool.take(2 * SMALLEST);
        assert_eq!(held(&pool), 3 * SMALLEST);
        pool.give(large);
        assert_eq!(held(&pool), 3 * SMALLEST);
        // A stranger finds no room.
        pool.give(vec![0; SMALLEST]);
        assert_eq!(held(&pool), 3 * SMALLEST);
    }

    #[test]
    fn what_nobody_asks_for_is_let_go() {
        let pool = Pool::<u32>::new();
        let large = pool.take(4 * SMALLEST);
        pool.give(large);
        for _ in 0..=PATIENCE {
            let block = pool.take(SMALLEST);
            pool.give(block);
        }
        assert_eq!(pool.with(|state| state.kept()), SMALLEST);
    }
}
