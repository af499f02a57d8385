//! What passes over activations once: norms, gates, residuals, and the preparation of operands. Bytes are what counts.

use ctq_model::matrix::Code;
use ctq_model::scheme::Activation;

use super::linear::quantizer;
use super::{Effort, Seconds, Timing, noise, operand_bytes, time};
use crate::Compute;
use crate::backend::{Backend, KernelError, Treatment};

/// How operands are prepared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prepared {
    /// Rounded to the compute mode.
    Plain,
    /// Quantized and dequantized.
    FakeQuantized(Activation),
    /// Quantized; codes are what is multiplied.
    Exact(Activation),
}

/// What an operation over `m` rows of `width` elements took that moves `bytes` an element.
fn timing(operation: &str, (m, width): (usize, usize), bytes: usize, seconds: Seconds) -> Timing {
    Timing {
        operation: operation.to_owned(),
        what: "f32".to_owned(),
        part: String::new(),
        acts: "off".to_owned(),
        m,
        n: width,
        k: width,
        compute: Compute::F32,
        seconds: seconds.median,
        fastest_seconds: seconds.fastest,
        slowest_seconds: seconds.slowest,
        operations: 0.0,
        bytes: (m * width * bytes) as f64,
        arithmetic: None,
    }
}

/// Times the norm of `m` rows.
///
/// # Errors
/// Where an operation fails.
pub fn norm<B: Backend>(
    backend: &B,
    (m, width): (usize, usize),
    effort: Effort,
) -> Result<Timing, KernelError> {
    let (x, weight) = (backend.upload(width, &noise(m * width))?, vec![1.0; width]);
    let seconds = time(backend, effort, || backend.norm(&x, &weight, 1e-5).map(drop))?;
    Ok(timing("norm", (m, width), 8, seconds))
}

/// Times `silu(gate) * up`.
///
/// # Errors
/// Where an operation fails.
pub fn gate<B: Backend>(
    backend: &B,
    (m, width): (usize, usize),
    effort: Effort,
) -> Result<Timing, KernelError> {
    let up = backend.upload(width, &noise(m * width))?;
    // Written over each time; what it holds changes no time.
    let mut gate = Some(backend.upload(width, &noise(m * width))?);
    let seconds = time(backend, effort, || {
        let given = gate.take().expect("put back each time");
        gate = Some(backend.gate(given, &up)?);
        Ok(())
    })?;
    Ok(timing("gate", (m, width), 12, seconds))
}

/// Times the sum of a residual, in place.
///
/// # Errors
/// Where an operation fails.
pub fn add<B: Backend>(
    backend: &B,
    (m, width): (usize, usize),
    effort: Effort,
) -> Result<Timing, KernelError> {
    let mut x = backend.zeros(m, width)?;
    let y = backend.upload(width, &noise(m * width))?;
    let seconds = time(backend, effort, || backend.add(&mut x, &y))?;
    Ok(timing("add", (m, width), 12, seconds))
}

/// Times the preparation of operands: rounding or quantization.
///
/// # Errors
/// Where an operation fails.
pub fn prepare<B: Backend>(
    backend: &B,
    treatment: Prepared,
    compute: Compute,
    (m, width): (usize, usize),
    effort: Effort,
) -> Result<Timing, KernelError> {
    let x = backend.upload(width, &noise(m * width))?;
    let window = 0..m;
    let (told, written, acts) = match treatment {
        Prepared::Plain => (Treatment::Plain, operand_bytes(compute), "off"),
        Prepared::FakeQuantized(activation) => {
            (Treatment::FakeQuantized(quantizer(activation)), operand_bytes(compute), "library")
        }
        Prepared::Exact(activation) => {
            let bytes = match activation.code {
                Code::Int { .. } | Code::E4m3 => 1,
                Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32 => 2,
            };
            (Treatment::Exact(quantizer(activation)), bytes, "kernel")
        }
    };
    let seconds = time(backend, effort, || {
        backend.prepare(&x, &told, compute, std::slice::from_ref(&window)).map(drop)
    })?;
    let what = match treatment {
        Prepared::Plain => compute.to_string(),
        Prepared::FakeQuantized(activation) | Prepared::Exact(activation) => activation.to_string(),
    };
    let acts = acts.to_owned();
    Ok(Timing { what, acts, compute, ..timing("prepare", (m, width), 4 + written, seconds) })
}
