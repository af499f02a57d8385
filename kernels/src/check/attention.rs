//! Causal attention: head dimensions, groups of heads, windows of sequences and of positions.

use std::ops::Range;

use super::rows::windows;
use super::{Bound, Case, Findings, Size};
use crate::Compute;
use crate::backend::{AttentionShape, Backend, KernelError, Span};
use crate::random::Random;

/// Same tiles and rounding points, another order of sums: what differs is which way a probability rounds.
const BF16: Bound = Bound::Relative(2e-3);

struct AttentionCase {
    shape: AttentionShape,
    heads: Range<usize>,
    rows: usize,
    compute: Compute,
    windows: Vec<Range<usize>>,
    /// Positions of each window whose queries are there.
    queries: Vec<Range<usize>>,
    /// Positions of each window whose results are looked at: some of those that are there.
    shown: Vec<Range<usize>>,
}

impl AttentionCase {
    fn new(shape: AttentionShape, rows: usize, compute: Compute) -> AttentionCase {
        AttentionCase::of_windows(shape, rows, compute, windows(rows))
    }

    fn of_windows(
        shape: AttentionShape,
        rows: usize,
        compute: Compute,
        windows: Vec<Range<usize>>,
    ) -> AttentionCase {
        let all: Vec<Range<usize>> = windows.iter().map(|window| 0..window.len()).collect();
        AttentionCase {
            shape,
            heads: 0..shape.heads,
            rows,
            compute,
            windows,
            queries: all.clone(),
            shown: all,
        }
    }
}

const fn shape(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, window }
}

pub(super) fn cases<S: Backend, E: Backend>(findings: &mut Findings<'_, S, E>, size: Size) {
    let rows = match size {
        Size::Small => 150,
        Size::Large => 1500,
    };
    let shapes = [
        shape(2, 1, 16, None),
        shape(4, 2, 32, Some(5)),
        shape(2, 2, 64, None),
        shape(2, 1, 80, Some(70)),
        shape(1, 1, 96, None),
        shape(2, 1, 128, Some(64)),
        shape(1, 1, 256, None),
    ];
    for shape in shapes {
        for compute in [Compute::F32, Compute::Bf16] {
            let whole = AttentionCase::new(shape, rows, compute);
            findings.hold(&whole);
            // The second sequence by itself; the first sequence's rows are not looked at.
            let alone = AttentionCase {
                windows: whole.windows[1..].to_vec(),
                queries: whole.queries[1..].to_vec(),
                shown: whole.shown[1..].to_vec(),
                ..AttentionCase::new(shape, rows, compute)
            };
            let shown = vec![0..0, whole.shown[1].clone()];
            findings.same(&alone, &AttentionCase { shown, ..AttentionCase::new(shape, rows, compute) });
            // The last third of the queries, and a few that end before the window does.
            let some = vec![rows * 2 / 5..whole.windows[0].len(), 3..whole.windows[1].len() - 2];
            let part = AttentionCase { queries: some.clone(), shown: some.clone(), ..whole };
            findings.hold(&part);
            findings.same(&part, &AttentionCase { shown: some, ..AttentionCase::new(shape, rows, compute) });
        }
    }
    findings.hold(&AttentionCase::new(shape(2, 1, 64, None), 1, Compute::Bf16));
    // More tiles than a kernel holds at a time; many short windows.
    findings.hold(&AttentionCase::new(shape(2, 1, 64, None), rows.max(600), Compute::Bf16));
    let short = (0..600).step_by(60).map(|first| first..first + 60).collect();
    findings.hold(&AttentionCase::of_windows(shape(4, 1, 16, None), 600, Compute::Bf16, short));
    // Parts of the heads: inside one group, and across two.
    for heads in [3..4, 1..3] {
        for compute in [Compute::F32, Compute::Bf16] {
            let whole = AttentionCase::new(shape(4, 2, 64, None), 70, compute);
            findings.hold(&AttentionCase { heads: heads.clone(), ..whole });
        }
    }
}

impl Case for AttentionCase {
    fn operation(&self) -> &'static str {
        "attention"
    }

    fn name(&self) -> String {
        let AttentionCase { shape, heads, compute, windows, queries, .. } = self;
        format!("{compute:?} {shape:?}, heads {heads:?}, windows {windows:?}, queries {queries:?}")
    }

    fn bound(&self) -> Bound {
        match self.compute {
            Compute::F32 => Bound::Bits,
            Compute::Bf16 => BF16,
        }
    }

    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>, KernelError> {
        let mut random = Random::new(3);
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        // Scores of a few units: softmax neither flat nor one key.
        let mut random_values = |heads: usize| -> Vec<f32> {
            random.floats(self.rows * heads * head_dim).iter().map(|value| 2.0 * value).collect()
        };
        let (q, k, v) = (random_values(heads), random_values(kv_heads), random_values(kv_heads));
        let columns = self.heads.start * head_dim..self.heads.end * head_dim;
        let rows: Vec<&[f32]> = q.chunks_exact(heads * head_dim).map(|row| &row[columns.clone()]).collect();
        let (mut q, mut spans, mut end) = (Vec::new(), Vec::new(), 0);
        for (window, positions) in self.windows.iter().zip(&self.queries) {
            spans.push(Span { rows: end..end + positions.len(), first: positions.start });
            end += positions.len();
            q.extend(rows[window.clone()][positions.clone()].concat());
        }
        let q = backend.upload(columns.len(), &q)?;
        let [k, v] = [k, v].map(|values| backend.upload(kv_heads * head_dim, &values));
        let (k, v) = (k?, v?);
        let (heads, compute) = (self.heads.clone(), self.compute);
        let mixed = backend.attend(&q, &k, &v, &self.shape, heads, compute, &spans, &self.windows)?;
        let mixed = backend.download(&mixed)?;
        let shown = spans.iter().zip(&self.shown).flat_map(|(span, shown)| {
            let row = |position: usize| (span.rows.start + position - span.first) * columns.len();
            if shown.is_empty() { &[][..] } else { &mixed[row(shown.start)..row(shown.end)] }
        });
        Ok(shown.copied().collect())
    }
}
