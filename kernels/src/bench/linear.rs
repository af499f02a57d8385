//! Products with packed weights: linears, the head, and decoding by itself.

use ctq_model::scheme::Activation;

use super::weights::{Weights, random_tiles};
use super::{Effort, Seconds, Timing, arithmetic_of, noise, operand_bytes, time};
use crate::Compute;
use crate::backend::{Backend, KernelError, Pieces, Quantizer, Treatment, VOCABULARY_TILE};
use crate::cpu::peak::Arithmetic;
use crate::cuda::{Cuda, Device};
use ctq_container::{MatrixRecord, TiledMatrix};
use ctq_model::matrix::Code;

/// A linear to be measured: `x * W^T`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearCase {
    /// Scheme of the weights.
    pub weights: Weights,
    /// Quantization of the inputs whose codes are multiplied; `None`: inputs as they are.
    pub inputs: Option<Activation>,
    /// Precision of the operands.
    pub compute: Compute,
    /// Rows of activations.
    pub m: usize,
    /// Output rows.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

impl LinearCase {
    /// What is multiplied. Codes of floats are small: they are exact in bf16.
    fn arithmetic(&self) -> Arithmetic {
        match self.inputs.map(|inputs| inputs.code) {
            None => arithmetic_of(self.compute),
            Some(Code::Int { .. }) => Arithmetic::Integers,
            Some(Code::E4m3 | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32) => Arithmetic::Bf16,
        }
    }

    fn treatment(&self) -> Treatment {
        self.inputs.map_or(Treatment::Plain, |activation| Treatment::Exact(quantizer(activation)))
    }

    fn timing(&self, operation: &str, packed: &TiledMatrix, seconds: Seconds) -> Timing {
        let LinearCase { weights, inputs, compute, m, n, k } = *self;
        let operand = match inputs.map(|inputs| inputs.code) {
            None => operand_bytes(compute),
            Some(Code::Int { .. } | Code::E4m3) => 1,
            Some(Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32) => 2,
        };
        Timing {
            operation: operation.to_owned(),
            what: weights.name().to_owned(),
            part: String::new(),
            acts: if inputs.is_some() { "kernel" } else { "off" }.to_owned(),
            m,
            n,
            k,
            compute,
            seconds: seconds.median,
            fastest_seconds: seconds.fastest,
            slowest_seconds: seconds.slowest,
            operations: 2.0 * m as f64 * n as f64 * k as f64,
            bytes: (packed_bytes(packed) + operand * m * k + 4 * m * n) as f64,
            arithmetic: Some(self.arithmetic()),
        }
    }
}

/// The quantizer of an activation with nothing stored but a global scale.
pub(super) fn quantizer(activation: Activation) -> Quantizer {
    Quantizer { activation, scales: Vec::new(), zero: 0.0, global_scale: 64.0 }
}

fn packed_bytes(packed: &TiledMatrix) -> usize {
    packed.codes.len() + packed.scales.as_ref().map_or(0, |scales| scales.bytes.len())
}

/// Times one linear. Inputs are prepared before.
///
/// # Errors
/// Where an operation fails, for want of memory among others, and where no product of these codes is defined.
pub fn linear<B: Backend>(backend: &B, case: &LinearCase, effort: Effort) -> Result<Timing, KernelError> {
    let LinearCase { compute, m, n, k, .. } = *case;
    let packed = random_tiles(&case.weights.linear(n, k), 2);
    let weight = backend.matrix(&packed, 0..n, Pieces::Atoms)?;
    let x = backend.upload(k, &noise(m * k))?;
    let operand = backend.prepare(&x, &case.treatment(), compute, std::slice::from_ref(&(0..m)))?;
    let seconds = time(backend, effort, || backend.linear(&operand, &weight, None, compute).map(drop))?;
    Ok(case.timing("linear", &packed, seconds))
}

/// Rows of the vocabulary whose logits are looked at together.
const HEAD_ROWS: usize = 32 * VOCABULARY_TILE;

/// Times a head: logits of all `n` rows of the vocabulary, each folded at once into the log-sum-exp of its row.
///
/// # Errors
/// As [`linear`].
pub fn head<B: Backend>(backend: &B, case: &LinearCase, effort: Effort) -> Result<Timing, KernelError> {
    let LinearCase { compute, m, n, k, .. } = *case;
    let packed = random_tiles(&case.weights.linear(n, k), 2);
    let weight = backend.matrix(&packed, 0..n, Pieces::VocabularyTiles)?;
    let x = backend.upload(k, &noise(m * k))?;
    let operand = backend.prepare(&x, &case.treatment(), compute, std::slice::from_ref(&(0..m)))?;
    let targets: Vec<Option<u32>> = (0..m).map(|row| Some((row * 31 % n) as u32)).collect();
    let seconds = time(backend, effort, || {
        (0..n).step_by(HEAD_ROWS).try_for_each(|start| {
            backend.head(&operand, &weight, start..n.min(start + HEAD_ROWS), &targets, compute).map(drop)
        })
    })?;
    Ok(case.timing("head", &packed, seconds))
}

/// Times the decoding of a whole `n` x `k` matrix to f32.
///
/// # Errors
/// Where an operation fails.
pub fn decode<B: Backend>(
    backend: &B,
    weights: Weights,
    (n, k): (usize, usize),
    effort: Effort,
) -> Result<Timing, KernelError> {
    let linear = weights.linear(n, k);
    let packed = random_tiles(&linear, 2);
    let table = backend.matrix(&packed, 0..n, Pieces::Atoms)?;
    let ids: Vec<u32> = (0..n as u32).collect();
    let seconds = time(backend, effort, || backend.embed(&table, &ids).map(drop))?;
    let case = LinearCase { weights, inputs: None, compute: Compute::F32, m: 0, n, k };
    Ok(Timing {
        operations: (n * k) as f64,
        bytes: MatrixRecord::of(&linear).stored_bytes() as f64,
        arithmetic: None,
        ..case.timing("decode", &packed, seconds)
    })
}

/// Times the decoding of a whole `n` x `k` matrix to the bf16 operands of a library's product. Bytes are those read and
/// written.
///
/// # Errors
/// Where an operation fails.
pub fn operands<D: Device>(
    cuda: &Cuda<D>,
    weights: Weights,
    (n, k): (usize, usize),
    effort: Effort,
) -> Result<Timing, KernelError> {
    let linear = weights.linear(n, k);
    let packed = random_tiles(&linear, 2);
    let matrix = cuda.matrix(&packed, 0..n, Pieces::Atoms)?;
    let seconds = time(cuda, effort, || cuda.decode_operands(&matrix))?;
    let case = LinearCase { weights, inputs: None, compute: Compute::Bf16, m: 0, n, k };
    Ok(Timing {
        operations: (n * k) as f64,
        bytes: (MatrixRecord::of(&linear).stored_bytes() + 2 * (n * k) as u64) as f64,
        arithmetic: None,
        ..case.timing("decode", &packed, seconds)
    })
}
