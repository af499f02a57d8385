//! Which rows of a buffer are which positions of which window: all of a batch, or those that predict a scored position.

use std::ops::Range;

use ctq_kernels::Span;
use ctq_model::window::Window;

/// Rows of the windows of a batch, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Rows of each window.
    pub(crate) windows: Vec<Range<usize>>,
    /// The same, with the positions that they are.
    pub(crate) spans: Vec<Span>,
}

impl Rows {
    /// Rows that hold `positions` of each window.
    pub(crate) fn of(positions: impl IntoIterator<Item = Range<usize>>) -> Rows {
        let mut rows = Rows::default();
        for positions in positions {
            let window = rows.len()..rows.len() + positions.len();
            rows.windows.push(window.clone());
            rows.spans.push(Span { rows: window, first: positions.start });
        }
        rows
    }

    /// Rows that predict the scored positions: a position is predicted by the row before it.
    pub(crate) fn predicting(windows: &[Window]) -> Rows {
        Rows::of(windows.iter().map(predicting))
    }

    /// Rows of all windows.
    pub(crate) fn len(&self) -> usize {
        self.windows.last().map_or(0, |window| window.end)
    }

    /// Where the positions of `part` are among these rows.
    pub(crate) fn find(&self, part: &Rows) -> Vec<u32> {
        let of_window = |(own, part): (&Span, &Span)| {
            let first = own.rows.start + part.first - own.first;
            first as u32..(first + part.rows.len()) as u32
        };
        self.spans.iter().zip(&part.spans).flat_map(of_window).collect()
    }

    /// Window and position of a row.
    pub(crate) fn place(&self, row: usize) -> (usize, usize) {
        let window = self.windows.iter().position(|window| window.contains(&row)).unwrap_or(0);
        let span = &self.spans[window];
        (window, span.first + row - span.rows.start)
    }
}

/// Positions that predict the scored ones of a window.
pub(crate) fn predicting(window: &Window) -> Range<usize> {
    match &window.scored {
        scored if scored.is_empty() => 0..0,
        scored => scored.start - 1..scored.end - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(scored: Range<usize>) -> Window {
        Window { index: 0, start: 0, ids: vec![7; 10], scored }
    }

    #[test]
    fn a_position_is_predicted_by_the_row_before_it() {
        let windows = [window(4..6), window(1..10), window(3..3), window(9..10)];
        let rows = Rows::predicting(&windows);
        assert_eq!(rows.windows, [0..2, 2..11, 11..11, 11..12]);
        assert_eq!(rows.spans.iter().map(|span| span.first).collect::<Vec<_>>(), [3, 0, 0, 8]);
        assert_eq!(rows.place(1), (0, 4));
        assert_eq!(rows.place(11), (3, 8));

        let all = Rows::of(windows.iter().map(|window| 0..window.ids.len()));
        let found = all.find(&rows);
        assert_eq!(found[..3], [3, 4, 10]);
        assert_eq!(found[10..], [18, 38]);
    }
}
