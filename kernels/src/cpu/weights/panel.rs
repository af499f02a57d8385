//! Weights of one row tile over some tiles of k, as products take them: two halves, step by step along k.

use ctq_container::TILE;

use crate::cpu::Isa;
use crate::cpu::product::{HALF, Unit, Words, transpose};

/// Halves of a row tile.
pub(crate) const HALVES: usize = TILE / HALF;

/// [half][steps][32 outputs].
#[derive(Debug)]
pub(crate) struct Panel {
    unit: Unit,
    steps: usize,
    words: Words,
}

/// What decoding a tile takes; kept from one to the next.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// [64 rows][64 k].
    pub(super) codes: Box<[u8; TILE * TILE]>,
    /// [64 rows][64 k].
    pub(super) values: Box<[f32; TILE * TILE]>,
    /// [64 rows][steps]; the widest unit has a word for each k.
    pub(super) words: Box<[u32; TILE * TILE]>,
}

impl Scratch {
    /// Words of two k each.
    pub(super) fn pairs(&mut self) -> &mut [u32; TILE * TILE / 2] {
        self.words.first_chunk_mut().expect("half of the words")
    }
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch {
            codes: Box::new([0; TILE * TILE]),
            values: Box::new([0.0; TILE * TILE]),
            words: Box::new([0; TILE * TILE]),
        }
    }
}

impl Default for Panel {
    fn default() -> Panel {
        Panel { unit: Unit::Float, steps: 0, words: Words::default() }
    }
}

impl Panel {
    /// Makes room for some tiles.
    pub(super) fn begin(&mut self, unit: Unit, tiles: usize) {
        (self.unit, self.steps) = (unit, tiles * unit.steps(TILE));
        self.words.grow(HALVES * self.steps * HALF);
    }

    /// Puts a tile's words, [64 rows][steps], to its place.
    pub(super) fn put(&mut self, isa: Isa, index: usize, words: &[u32]) {
        let steps = self.unit.steps(TILE);
        for half in 0..HALVES {
            let at = (half * self.steps + index * steps) * HALF;
            let to = &mut self.words.as_mut_slice()[at..at + steps * HALF];
            transpose(isa, (&words[half * HALF * steps..], steps), (to, HALF), HALF, steps);
        }
    }

    /// Words of one half from step `step` on.
    pub(crate) fn half(&self, half: usize, step: usize) -> &[u32] {
        &self.words.as_slice()[(half * self.steps + step) * HALF..(half + 1) * self.steps * HALF]
    }
}
