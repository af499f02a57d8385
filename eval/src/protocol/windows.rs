//! Where windows fall on a token stream of N ids, by each placement rule.
//!
//! Knows indices only; the ids are copied at the end, in one place, where BOS may take the first one's seat.

use std::ops::Range;

use ctq_model::window::Window;

use super::{Placement, Protocol};
use crate::tokens::TokenStream;
use crate::{Error, Result};

/// A window before its ids are looked up: a range of the stream and the positions in it that are scored.
struct Place {
    tokens: Range<usize>,
    scored: Range<usize>,
}

impl Protocol {
    /// The windows of this protocol on a stream, in order of their start.
    ///
    /// # Errors
    /// [`Error::TextTooShort`] if the stream holds no whole window.
    pub fn windows(&self, stream: &TokenStream) -> Result<Vec<Window>> {
        let needed = self.shortest_stream();
        let tokens = stream.ids().len();
        if tokens < needed {
            let preset = self.preset().to_owned();
            return Err(Error::TextTooShort { preset, tokens, needed, ctx: self.ctx() });
        }
        let places = self.places(tokens);
        let window = |(index, place): (usize, Place)| Window {
            index,
            start: place.tokens.start,
            ids: stream.fed(place.tokens),
            scored: place.scored,
        };
        Ok(places.into_iter().take(self.rows().unwrap_or(usize::MAX)).enumerate().map(window).collect())
    }

    /// The fewest tokens on which this protocol scores anything.
    fn shortest_stream(&self) -> usize {
        match self.placement() {
            Placement::Exl3 => self.ctx() + 1,
            Placement::Disjoint => self.ctx(),
            Placement::HfStrided => 2,
            Placement::LlamaCpp => 2 * self.ctx(),
        }
    }

    fn places(&self, tokens: usize) -> Vec<Place> {
        let ctx = self.ctx();
        match self.placement() {
            Placement::Exl3 => {
                let starts = (0..tokens.saturating_sub(ctx)).step_by(self.stride());
                starts.map(|start| Place { tokens: start..start + ctx, scored: 1..ctx }).collect()
            }
            Placement::Disjoint => side_by_side(tokens, ctx, 1),
            Placement::HfStrided => hf_strided(tokens, ctx, self.stride()),
            Placement::LlamaCpp => side_by_side(tokens, ctx, ctx / 2 + 1),
        }
    }
}

/// `floor(tokens / ctx)` windows; what remains is dropped.
fn side_by_side(tokens: usize, ctx: usize, first_scored: usize) -> Vec<Place> {
    let starts = (0..tokens / ctx).map(|index| index * ctx);
    starts.map(|start| Place { tokens: start..start + ctx, scored: first_scored..ctx }).collect()
}

/// Windows that end where the text ends; each scores what its predecessor did not reach.
///
/// A last window of a single token (only where stride = ctx) scores nothing and is left out.
fn hf_strided(tokens: usize, ctx: usize, stride: usize) -> Vec<Place> {
    let mut places = Vec::new();
    let mut reached = 0;
    for start in (0..tokens).step_by(stride) {
        let end = (start + ctx).min(tokens);
        let first_new = (reached - start).max(1);
        if first_new < end - start {
            places.push(Place { tokens: start..end, scored: first_new..end - start });
        }
        reached = end;
        if end == tokens {
            break;
        }
    }
    places
}
