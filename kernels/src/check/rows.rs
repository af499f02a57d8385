//! Operations on rows of activations: norms, rotation, gates, sums, gathers, routing.

use std::ops::Range;

use ctq_model::rope::{Rope, RopeScaling};

use super::{Bound, Case, Findings, Size};
use crate::Rotation;
use crate::backend::{Backend, KernelError, Span};
use crate::random::Random;
use crate::route::Renormalize;

/// What is done with the rows.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Norm { run: usize },
    Rotate { head_dim: usize, first: usize },
    Gate,
    Add,
    Gather,
    ScatterAdd,
    Concatenate,
    Zeros,
    FirstNonFinite { at: Option<usize> },
    Route { top_k: usize, renormalize: Renormalize },
}

struct RowCase {
    operation: Operation,
    rows: usize,
    width: usize,
}

pub(super) fn cases<S: Backend, E: Backend>(findings: &mut Findings<'_, S, E>, size: Size) {
    let shapes: &[(usize, usize)] = match size {
        Size::Small => &[(1, 16), (7, 192), (33, 320)],
        Size::Large => &[(1, 64), (300, 4096), (2049, 1280)],
    };
    for (rows, width) in shapes.iter().copied() {
        let operations = [
            Operation::Norm { run: width },
            Operation::Norm { run: 16 },
            Operation::Rotate { head_dim: 16, first: 0 },
            Operation::Rotate { head_dim: 16, first: 5 },
            Operation::Gate,
            Operation::Add,
            Operation::Gather,
            Operation::ScatterAdd,
            Operation::Concatenate,
            Operation::Zeros,
            Operation::FirstNonFinite { at: None },
            Operation::FirstNonFinite { at: Some(rows * width - 1) },
            Operation::FirstNonFinite { at: Some(rows * width / 2) },
        ];
        for operation in operations {
            findings.hold(&RowCase { operation, rows, width });
        }
        for (top_k, renormalize) in [(2, Renormalize::Chosen), (8, Renormalize::All)] {
            findings.hold(&RowCase { operation: Operation::Route { top_k, renormalize }, rows, width: 16 });
        }
    }
    // A norm longer than a level of its sum.
    findings.hold(&RowCase { operation: Operation::Norm { run: 8200 }, rows: 2, width: 8200 });
}

impl Case for RowCase {
    fn operation(&self) -> &'static str {
        match self.operation {
            Operation::Norm { .. } => "norm",
            Operation::Rotate { .. } => "rotate",
            Operation::Gate => "gate",
            Operation::Add => "add",
            Operation::Gather => "gather",
            Operation::ScatterAdd => "scatter add",
            Operation::Concatenate => "concatenate",
            Operation::Zeros => "zeros",
            Operation::FirstNonFinite { .. } => "first non-finite",
            Operation::Route { .. } => "route",
        }
    }

    fn name(&self) -> String {
        format!("{:?} of {} x {}", self.operation, self.rows, self.width)
    }

    fn bound(&self) -> Bound {
        Bound::Bits
    }

    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>, KernelError> {
        let (rows, width) = (self.rows, self.width);
        let mut random = Random::new(1);
        let values = random.activations(rows * width);
        let others = random.activations(rows * width);
        let upload = |values: &[f32]| backend.upload(width, values);
        let mut x = upload(&values)?;
        match self.operation {
            Operation::Norm { run } => backend.download(&backend.norm(&x, &others[..run], 1e-5)?),
            Operation::Rotate { head_dim, first } => {
                let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Default };
                let windows = windows(rows);
                let positions = first + windows.iter().map(Range::len).max().unwrap_or(0);
                let spans: Vec<Span> = windows.into_iter().map(|rows| Span { rows, first }).collect();
                backend.rotate(&mut x, &Rotation::new(&rope, head_dim, positions), &spans)?;
                backend.download(&x)
            }
            Operation::Gate => backend.download(&backend.gate(x, &upload(&others)?)?),
            Operation::Add => {
                backend.add(&mut x, &upload(&others)?)?;
                backend.download(&x)
            }
            Operation::Gather => backend.download(&backend.gather(&x, &every_third(rows))?),
            Operation::ScatterAdd => {
                let chosen = every_third(rows);
                let y = upload(&others[..chosen.len() * width])?;
                backend.scatter_add(&mut x, &y, &chosen, &values[..chosen.len()])?;
                backend.download(&x)
            }
            Operation::Concatenate => {
                let narrow = backend.upload(width / 2, &others[..rows * (width / 2)])?;
                backend.download(&backend.concatenate(&[&x, &narrow, &x])?)
            }
            Operation::Zeros => backend.download(&backend.zeros(rows, width)?),
            Operation::FirstNonFinite { at } => {
                let mut values = values;
                if let Some(at) = at {
                    values[at] = f32::NAN;
                    values[rows * width - 1] = f32::INFINITY;
                }
                let row = backend.first_non_finite(&upload(&values)?)?;
                Ok(vec![row.map_or(-1.0, |row| row as f32)])
            }
            Operation::Route { top_k, renormalize } => {
                // Equal logits: the lower index must win.
                let coarse: Vec<f32> = values.iter().map(|value| (value * 8.0).round() / 8.0).collect();
                let experts = backend.route(&upload(&coarse)?, top_k, renormalize)?;
                let tell = |(expert, tokens): (usize, &crate::route::ExpertTokens)| {
                    let rows = tokens.rows.iter().map(|row| *row as f32);
                    let pairs = rows.zip(tokens.weights.clone());
                    pairs.flat_map(move |(row, weight)| [expert as f32, row, weight]).collect::<Vec<_>>()
                };
                Ok(experts.iter().enumerate().flat_map(tell).collect())
            }
        }
    }
}

/// Two windows where there are rows for them, the first longer.
pub(super) fn windows(rows: usize) -> Vec<Range<usize>> {
    let cut = (rows * 2).div_ceil(3);
    [0..cut, cut..rows].into_iter().filter(|window| !window.is_empty()).collect()
}

fn every_third(rows: usize) -> Vec<u32> {
    (0..rows as u32).step_by(3).collect()
}
