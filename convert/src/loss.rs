//! What of an original tensor the tiles do not bring back: nothing, some bytes, or all of it. Compares bytes; knows no
//! format.

use std::borrow::Cow;

use ctq_container::{Exception, Origin};

/// What the tiles lose of an original tensor.
pub(crate) enum Loss {
    Nothing,
    Bytes(Vec<Exception>),
    Everything,
}

impl Loss {
    pub(crate) fn origin(&self) -> Origin {
        match self {
            Loss::Nothing => Origin::Tiles,
            Loss::Bytes(_) => Origin::TilesWithExceptions,
            Loss::Everything => Origin::Original,
        }
    }

    /// Of a tensor of `length` bytes of which `number` differ.
    pub(crate) fn of(number: usize, length: usize, exceptions: impl FnOnce() -> Vec<Exception>) -> Loss {
        /// What an exception takes in a container; a list that is longer than the tensor is not worth it.
        const EXCEPTION_BYTES: usize = 9;
        match number {
            0 => Loss::Nothing,
            _ if number > length / EXCEPTION_BYTES => Loss::Everything,
            _ => Loss::Bytes(exceptions()),
        }
    }

    /// Compares what comes back with what was there.
    pub(crate) fn between(original: &[u8], regenerated: Option<Cow<'_, [u8]>>) -> Loss {
        match regenerated {
            Some(regenerated) if regenerated.len() == original.len() => {
                let differences = Differences::between(0, original, &regenerated);
                Loss::of(differences.number(), original.len(), || differences.exceptions())
            }
            Some(_) | None => Loss::Everything,
        }
    }
}

/// Bytes that come back otherwise, of a range of a tensor.
pub(crate) struct Differences<'a> {
    start: usize,
    original: &'a [u8],
    regenerated: &'a [u8],
}

impl<'a> Differences<'a> {
    /// The range begins at byte `start` of the tensor.
    pub(crate) fn between(start: usize, original: &'a [u8], regenerated: &'a [u8]) -> Differences<'a> {
        Differences { start, original, regenerated }
    }

    /// How many there are.
    pub(crate) fn number(&self) -> usize {
        if self.original == self.regenerated {
            return 0;
        }
        self.original.iter().zip(self.regenerated).filter(|(a, b)| a != b).count()
    }

    /// The bytes that were there.
    pub(crate) fn exceptions(&self) -> Vec<Exception> {
        let pairs = self.original.iter().zip(self.regenerated).enumerate();
        let differing = pairs.filter(|(_, (a, b))| a != b);
        let exception = |(at, (byte, _)): (usize, (&u8, &u8))| Exception {
            offset: (self.start + at) as u64,
            byte: *byte,
        };
        differing.map(exception).collect()
    }
}
