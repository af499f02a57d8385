//! How long ranks wait for one another.

use std::time::Duration;

/// How long ranks wait for one another before something counts as failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// For all ranks to come, counted from when this one has come.
    pub wait: Duration,
    /// For any sign of life of a rank. Ranks give one every second, or four in this time where that is more.
    pub silence: Duration,
    /// For one handshake.
    pub handshake: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            wait: Duration::from_secs(60),
            silence: Duration::from_secs(8),
            handshake: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// Time between two signs of life of a rank that has nothing to say.
    pub(crate) fn beat(self) -> Duration {
        (self.silence / 4).min(Duration::from_secs(1))
    }
}
