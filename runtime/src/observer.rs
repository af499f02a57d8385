//! What the layer loop asks and tells while it runs.

use crate::error::Result;
use crate::snapshot::Snapshot;

/// Watches a run from outside. Every method has a default that does nothing.
pub trait Observer: Sync {
    /// `layers` of the group's layers are done (the head counts as one more).
    fn advanced(&self, layers: usize) {
        let _ = layers;
    }

    /// Whether the run should stop at the next layer.
    fn interrupted(&self) -> bool {
        false
    }

    /// Whether the hidden states after this layer are wanted; asked once a layer.
    fn wants_snapshot(&self) -> bool {
        false
    }

    /// Takes the hidden states that were asked for.
    ///
    /// # Errors
    /// Where they cannot be kept; the run stops.
    fn snapshot(&self, snapshot: Snapshot) -> Result<()> {
        let _ = snapshot;
        Ok(())
    }
}

/// An observer that watches nothing.
impl Observer for () {}
