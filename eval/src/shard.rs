//! Which windows of an evaluation one of several independent runs scores.
//!
//! Knows counts only; refuses to know what a window costs: windows of a protocol are as long as one another, but for
//! the last ones of a strided one.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// More parts than any scheduler runs; a file that claims more is damaged.
const MOST: usize = 1_000_000;

/// One of `of` shares of the windows, counted from 1: `2/8` is the second of eight.
///
/// The shares are contiguous ranges of windows, in order, and differ in size by at most one window. There may be more
/// shares than windows: some are empty then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Shard {
    part: usize,
    of: usize,
}

impl Shard {
    /// Share `part` of `of`.
    ///
    /// # Errors
    /// [`Error::BadShard`] unless `1 <= part <= of` and `of` is at most a million.
    pub fn new(part: usize, of: usize) -> Result<Shard, Error> {
        let shard = Shard { part, of };
        if (1..=of).contains(&part) && of <= MOST {
            return Ok(shard);
        }
        Err(Error::BadShard { text: shard.to_string() })
    }

    /// Which share, from 1.
    pub fn part(self) -> usize {
        self.part
    }

    /// How many shares there are.
    pub fn of(self) -> usize {
        self.of
    }

    /// The indices of its windows where there are `windows` in all.
    pub fn range(self, windows: usize) -> Range<usize> {
        // Quotients of products that 64 bits may not hold.
        let cut = |shares: usize| (windows as u128 * shares as u128 / self.of as u128) as usize;
        cut(self.part - 1)..cut(self.part)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.part, self.of)
    }
}

impl FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Shard, Error> {
        let number = |word: &str| word.trim().parse::<usize>().ok();
        let numbers = text.split_once('/').and_then(|(part, of)| Some((number(part)?, number(of)?)));
        let (part, of) = numbers.ok_or_else(|| Error::BadShard { text: text.to_owned() })?;
        Shard::new(part, of).map_err(|_| Error::BadShard { text: text.to_owned() })
    }
}

impl TryFrom<String> for Shard {
    type Error = Error;

    fn try_from(text: String) -> Result<Shard, Error> {
        text.parse()
    }
}

impl From<Shard> for String {
    fn from(shard: Shard) -> String {
        shard.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(windows: usize, of: usize) -> Vec<Range<usize>> {
        (1..=of).map(|part| Shard::new(part, of).expect("a share").range(windows)).collect()
    }

    #[test]
    fn shares_are_contiguous_and_as_even_as_can_be() {
        assert_eq!(ranges(10, 3), [0..3, 3..6, 6..10]);
        assert_eq!(ranges(2, 4), [0..0, 0..1, 1..1, 1..2]);
        for (windows, of) in [(1, 1), (20, 7), (7, 20), (100, 64), (0, 3)] {
            let ranges = ranges(windows, of);
            let all: Vec<usize> = ranges.iter().cloned().flatten().collect();
            assert!(all.iter().copied().eq(0..windows), "{windows} windows in {of}");
            let sizes = ranges.iter().map(ExactSizeIterator::len);
            let (least, most) = (sizes.clone().min(), sizes.max());
            assert!(most <= least.map(|least| least + 1), "{windows} windows in {of}");
        }
    }

    #[test]
    fn the_largest_counts_do_not_overflow() {
        let last = Shard::new(MOST, MOST).expect("a share");
        assert_eq!(last.range(usize::MAX).end, usize::MAX);
    }

    #[test]
    fn a_share_is_written_as_two_numbers() {
        let shard: Shard = "2/8".parse().expect("a share");
        assert_eq!((shard.part(), shard.of(), shard.to_string().as_str()), (2, 8, "2/8"));
        for wrong in
            ["", "2", "/", "0/8", "9/8", "-1/8", "1/0", "1/8/8", "a/b", "1.0/2", "1/1000001", "/8", "1/"]
        {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong:?}");
        }
    }
}
