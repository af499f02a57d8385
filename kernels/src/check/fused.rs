//! Operations that a device may fuse, held against the same made of others on that device: the same bits.

use super::activations::Kind;
use super::matrices::Scheme;
use super::rows::windows;
use super::{Bound, Case, Findings, Size};
use crate::backend::{Backend, GatePair, KernelError, Pieces, Treatment};
use crate::random::Random;
use crate::{Compute, composed};

/// What may be one operation.
#[derive(Clone, Copy, Debug)]
enum Operation {
    NormOperand,
    /// What it says of a place that is not finite.
    NormWatch,
    GateOperand,
    LinearAdd,
    LinearAddBias,
    Gated,
}

/// Who puts the parts together.
#[derive(Clone, Copy, Debug)]
enum Maker {
    Device,
    Parts,
}

/// Treatment of the inputs.
#[derive(Clone, Copy, Debug)]
enum Acts {
    Plain,
    Library(&'static str),
    Kernel(&'static str),
}

impl Acts {
    fn treatment(self) -> Treatment {
        match self {
            Acts::Plain => Treatment::Plain,
            Acts::Library(kind) => Treatment::FakeQuantized(Kind::named(kind).quantizer(1)),
            Acts::Kernel(kind) => Treatment::Exact(Kind::named(kind).quantizer(1)),
        }
    }
}

#[derive(Clone, Copy)]
struct Fused {
    operation: Operation,
    maker: Maker,
    scheme: &'static str,
    acts: Acts,
    compute: Compute,
    /// Tokens, outputs and inputs.
    shape: (usize, usize, usize),
}

/// Weights, and the treatments that they have a product with.
const TREATMENTS: [(&str, Acts); 10] = [
    ("bf16", Acts::Plain),
    ("int4 g128", Acts::Plain),
    ("fp8 channel", Acts::Library("fp8 token")),
    ("int8 channel", Acts::Library("int8 tensor")),
    ("int8 channel", Acts::Library("int8 tensor static asymmetric")),
    ("nvfp4", Acts::Library("nvfp4")),
    ("int8 channel", Acts::Kernel("int8 token asymmetric")),
    ("fp8 block", Acts::Kernel("fp8 g128")),
    ("nvfp4", Acts::Kernel("nvfp4")),
    ("mxfp8", Acts::Kernel("mxfp8")),
];

pub(super) fn cases<S: Backend, E: Backend>(findings: &mut Findings<'_, S, E>, size: Size) {
    // Rows of whole steps of a norm's sum and of some lines, or of a few elements more.
    let (row, odd, narrow, large) = match size {
        Size::Small => ((7, 16, 1152), (5, 16, 1100), (7, 40, 256), (3, 2064, 1024)),
        Size::Large => ((700, 600, 4096), (300, 520, 5100), (300, 1100, 1024), (2100, 4160, 2048)),
    };
    let mut hold = |operation, scheme, acts, compute, shape| {
        let fused = Fused { operation, maker: Maker::Device, scheme, acts, compute, shape };
        findings.same(&fused, &Fused { maker: Maker::Parts, ..fused });
    };
    for compute in [Compute::F32, Compute::Bf16] {
        for operation in [Operation::NormOperand, Operation::GateOperand] {
            for (scheme, acts) in TREATMENTS {
                hold(operation, scheme, acts, compute, row);
            }
            hold(operation, "bf16", Acts::Plain, compute, odd);
            hold(operation, "fp8 channel", Acts::Library("fp8 token"), compute, odd);
            hold(Operation::NormWatch, "bf16", Acts::Plain, compute, odd);
        }
        for operation in [Operation::LinearAdd, Operation::LinearAddBias, Operation::Gated] {
            for (scheme, acts) in TREATMENTS {
                hold(operation, scheme, acts, compute, narrow);
            }
        }
    }
    // Large enough for a device to leave the product to a library.
    for operation in [Operation::LinearAdd, Operation::LinearAddBias] {
        hold(operation, "int4 g128", Acts::Plain, Compute::Bf16, large);
    }
}

impl Case for Fused {
    fn operation(&self) -> &'static str {
        match self.operation {
            Operation::NormOperand | Operation::NormWatch => "norm operand",
            Operation::GateOperand => "gate operand",
            Operation::LinearAdd | Operation::LinearAddBias => "linear add",
            Operation::Gated => "gated",
        }
    }

    fn name(&self) -> String {
        let (m, n, k) = self.shape;
        let Fused { operation, scheme, acts, compute, .. } = self;
        format!("{operation:?}, {scheme}, {acts:?}, {compute:?}, {m} x {n} x {k}")
    }

    fn bound(&self) -> Bound {
        Bound::Bits
    }

    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>, KernelError> {
        let Fused { compute, shape: (m, n, k), .. } = *self;
        let mut random = Random::new(8);
        let scheme = Scheme::named(self.scheme);
        let matrix = |n: usize, k: usize, random: &mut Random| {
            backend.matrix(&scheme.matrix(n, k, random), 0..n, Pieces::Atoms)
        };
        let (weight, windows, treatment) = (matrix(n, k, &mut random)?, windows(m), self.acts.treatment());
        let values = random.activations(m * k);
        let others = random.activations(m * k);
        let bias = random.activations(n.max(k));
        let x = backend.upload(k, &values)?;
        let plain = || backend.prepare(&x, &treatment, compute, &windows);
        let operand = match (self.operation, self.maker) {
            (Operation::NormOperand, Maker::Device) => {
                backend.norm_operand(&x, &others[..k], 1e-5, &treatment, compute, &windows)?.0
            }
            (Operation::NormOperand, Maker::Parts) => {
                composed::norm_operand(backend, &x, &others[..k], 1e-5, &treatment, compute, &windows)?.0
            }
            (Operation::NormWatch, maker) => {
                // Squares of the first row are beyond all numbers, though it is finite; of the last it is not.
                let mut values = values;
                values[..k].fill(3e38);
                values[m * k - 1] = f32::NAN;
                let (x, weight) = (backend.upload(k, &values)?, &others[..k]);
                let (_, watch) = match maker {
                    Maker::Device => backend.norm_operand(&x, weight, 1e-5, &treatment, compute, &windows)?,
                    Maker::Parts => {
                        composed::norm_operand(backend, &x, weight, 1e-5, &treatment, compute, &windows)?
                    }
                };
                return Ok(vec![backend.seen(watch)?.map_or(-1.0, |row| row as f32)]);
            }
            (Operation::GateOperand, Maker::Device) => {
                let gate = backend.upload(k, &others)?;
                backend.gate_operand(gate, &x, &treatment, compute, &windows)?
            }
            (Operation::GateOperand, Maker::Parts) => {
                let gate = backend.upload(k, &others)?;
                composed::gate_operand(backend, gate, &x, &treatment, compute, &windows)?
            }
            (Operation::LinearAdd | Operation::LinearAddBias, maker) => {
                let mut sum = backend.upload(n, &random.activations(m * n))?;
                let bias = matches!(self.operation, Operation::LinearAddBias).then_some(&bias[..n]);
                match maker {
                    Maker::Device => backend.linear_add(&mut sum, &plain()?, &weight, bias, compute)?,
                    Maker::Parts => {
                        composed::linear_add(backend, &mut sum, &plain()?, &weight, bias, compute)?;
                    }
                }
                return backend.download(&sum);
            }
            (Operation::Gated, maker) => {
                let (gate, up) = (matrix(k, k, &mut random)?, matrix(k, k, &mut random)?);
                let biases = [None, Some(&bias[..k])];
                let pair = GatePair { gate: &gate, up: &up, biases };
                match maker {
                    Maker::Device => backend.gated(&plain()?, pair, &treatment, compute, &windows)?,
                    Maker::Parts => composed::gated(backend, &plain()?, pair, &treatment, compute, &windows)?,
                }
            }
        };
        backend.download(&backend.linear(&operand, &weight, None, compute)?)
    }
}
