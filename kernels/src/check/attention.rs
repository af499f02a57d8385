//! Causal attention: head dimensions, groups of heads, windows of sequences and of positions.

use std::ops::Range;

use super::rows::windows;
use super::{Bound, Case, Findings, Size};
use crate::Compute;
use crate::backend::{AttentionShape, Backend, KernelError};
use crate::random::Random;

/// Same tiles and rounding points, another order of sums: what differs is which way a probability rounds.
const BF16: Bound = Bound::Relative(2e-3);

struct AttentionCase {
    shape: AttentionShape,
    heads: Range<usize>,
    rows: usize,
    compute: Compute,
    windows: Vec<Range<usize>>,
    /// Rows of the result that are looked at.
    shown: Range<usize>,
}

impl AttentionCase {
    fn new(shape: AttentionShape, rows: usize, compute: Compute) -> AttentionCase {
        AttentionCase { shape, heads: 0..shape.heads, rows, compute, windows: windows(rows), shown: 0..rows }
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
                shown: whole.windows[1].clone(),
                ..AttentionCase::new(shape, rows, compute)
            };
            let beside =
                AttentionCase { shown: alone.shown.clone(), ..AttentionCase::new(shape, rows, compute) };
            findings.same(&alone, &beside);
        }
    }
    findings.hold(&AttentionCase::new(shape(2, 1, 64, None), 1, Compute::Bf16));
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
        format!("{:?} {:?}, heads {:?}, windows {:?}", self.compute, self.shape, self.heads, self.windows)
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
        let q: Vec<f32> =
            q.chunks_exact(heads * head_dim).flat_map(|row| &row[columns.clone()]).copied().collect();
        let q = backend.upload(columns.len(), &q)?;
        let [k, v] = [k, v].map(|values| backend.upload(kv_heads * head_dim, &values));
        let (k, v) = (k?, v?);
        let mixed =
            backend.attend(&q, &k, &v, &self.shape, self.heads.clone(), self.compute, &self.windows)?;
        let width = self.heads.len() * head_dim;
        Ok(backend.download(&mixed)?[self.shown.start * width..self.shown.end * width].to_vec())
    }
}
