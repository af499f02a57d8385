//! The layers that one engine runs, and where hidden states come from and go to where others run the rest.

use std::ops::Range;

use ctq_kernels::collective::Pipe;

/// A run of a model's layers.
#[derive(Clone)]
pub struct Stage<'a> {
    /// Which.
    pub layers: Range<usize>,
    /// Hidden states before the first of them; `None`: embeddings.
    pub incoming: Option<&'a dyn Pipe>,
    /// Takes hidden states after the last of them; `None`: final norm and head are here.
    pub outgoing: Option<&'a dyn Pipe>,
}

impl Stage<'_> {
    /// All of `layers` layers, the embedding and the head.
    pub fn whole(layers: usize) -> Stage<'static> {
        Stage { layers: 0..layers, incoming: None, outgoing: None }
    }

    /// Whether a group begins and ends here.
    pub fn is_whole(&self) -> bool {
        self.incoming.is_none() && self.outgoing.is_none()
    }

    /// Steps of progress that a group makes: its layers, and the head.
    pub fn steps(&self) -> usize {
        self.layers.len() + usize::from(self.outgoing.is_none())
    }
}
