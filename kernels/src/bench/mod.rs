//! How fast a backend's heavy operations are, on the shapes of real models and random data. Measures and says with what;
//! prints nothing and judges nothing.

mod collective;
mod floor;
mod probe;
#[cfg(test)]
mod tests;

pub use collective::{Carried, Case, CollectiveTiming, Columns, MODELS, Model, cases};
pub use floor::Floor;
pub use probe::{Ends, Probe};

use std::time::Instant;

use ctq_container::{ScaleTable, TiledMatrix, Tiling};
use ctq_model::DType;
use ctq_model::matrix::{Code, Formula, Sharing};
use serde::Serialize;

use crate::Compute;
use crate::backend::{AttentionShape, Backend, KernelError, Pieces, Span, Treatment};
use crate::random::Random;

/// One measured operation.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// `linear` or `attention`.
    pub operation: String,
    /// Scheme of the weights, or shape of the heads.
    pub what: String,
    /// Rows of activations.
    pub m: usize,
    /// Output rows; width of the output.
    pub n: usize,
    /// Inputs; dimension of a head.
    pub k: usize,
    /// Precision of the operands.
    pub compute: Compute,
    /// Seconds of one operation: the median of several rounds.
    pub seconds: f64,
    /// Floating-point operations of one: 2 m n k for a linear.
    pub operations: f64,
    /// Bytes that must be read and written at least: packed weights, operands, results.
    pub bytes: f64,
}

/// How a measurement goes.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds, of which the median counts.
    pub rounds: usize,
    /// Least seconds of one round.
    pub seconds: f64,
}

/// Weights of the schemes that are measured.
pub const SCHEMES: [&str; 4] = ["bf16", "int4 g128", "nvfp4", "fp8 channel"];

/// (n, k) of the linears of a Llama 8B, fused projections as they are stored apart in sum: q+k+v, o, gate+up, down.
pub const LLAMA_8B: [(usize, usize); 4] = [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)];

/// Times `x * W^T` for `m` rows.
///
/// # Errors
/// Where an operation fails, for want of memory among others.
pub fn linear<B: Backend>(
    backend: &B,
    scheme: &str,
    (m, n, k): (usize, usize, usize),
    compute: Compute,
    effort: Effort,
) -> Result<Timing, KernelError> {
    let packed = matrix(scheme, n, k);
    let bytes = packed.codes.len() + packed.scales.as_ref().map_or(0, |scales| scales.bytes.len());
    let weight = backend.matrix(&packed, 0..n, Pieces::Atoms)?;
    drop(packed);
    let x = backend.upload(k, &noise(m * k))?;
    let operand = backend.prepare(&x, &Treatment::Plain, compute, std::slice::from_ref(&(0..m)))?;
    let seconds = time(backend, effort, || backend.linear(&operand, &weight, None, compute).map(drop))?;
    let operand_bytes = match compute {
        Compute::Bf16 => 2,
        Compute::F32 => 4,
    };
    Ok(Timing {
        operation: "linear".to_owned(),
        what: scheme.to_owned(),
        m,
        n,
        k,
        compute,
        seconds,
        operations: 2.0 * m as f64 * n as f64 * k as f64,
        bytes: (bytes + operand_bytes * m * k + 4 * m * n) as f64,
    })
}

/// Times causal attention of `windows` windows of `length` tokens.
///
/// # Errors
/// Where an operation fails.
pub fn attention<B: Backend>(
    backend: &B,
    shape: &AttentionShape,
    (windows, length): (usize, usize),
    compute: Compute,
    effort: Effort,
) -> Result<Timing, KernelError> {
    let m = windows * length;
    let upload = |heads: usize| backend.upload(heads * shape.head_dim, &noise(m * heads * shape.head_dim));
    let (q, k, v) = (upload(shape.heads)?, upload(shape.kv_heads)?, upload(shape.kv_heads)?);
    let ranges: Vec<_> = (0..windows).map(|window| window * length..(window + 1) * length).collect();
    let queries = Span::whole(&ranges);
    let seconds = time(backend, effort, || {
        backend.attend(&q, &k, &v, shape, 0..shape.heads, compute, &queries, &ranges).map(drop)
    })?;
    let width = shape.heads * shape.head_dim;
    // Two products; a causal mask leaves half of the pairs.
    let operations = 2.0 * 2.0 * (windows * length * length) as f64 / 2.0 * width as f64;
    Ok(Timing {
        operation: "attention".to_owned(),
        what: format!("{}/{} heads of {}, {windows} x {length}", shape.heads, shape.kv_heads, shape.head_dim),
        m,
        n: width,
        k: shape.head_dim,
        compute,
        seconds,
        operations,
        bytes: (4 * m * (2 * width + 2 * shape.kv_heads * shape.head_dim)) as f64,
    })
}

/// Median seconds of one call. Calls are queued; the clock stops when the device has done them all.
fn time<B: Backend>(
    backend: &B,
    effort: Effort,
    run: impl Fn() -> Result<(), KernelError>,
) -> Result<f64, KernelError> {
    let marker = backend.upload(1, &[0.0])?;
    let round = |calls: usize| {
        let start = Instant::now();
        (0..calls).try_for_each(|_| run())?;
        backend.download(&marker)?;
        Ok::<f64, KernelError>(start.elapsed().as_secs_f64())
    };
    // The first call compiles kernels and takes scratch.
    round(1)?;
    let calls = (effort.seconds / round(1)?).ceil().clamp(1.0, 1000.0) as usize;
    let mut rounds = (0..effort.rounds.max(1))
        .map(|_| Ok(round(calls)? / calls as f64))
        .collect::<Result<Vec<f64>, KernelError>>()?;
    rounds.sort_by(f64::total_cmp);
    Ok(rounds[rounds.len() / 2])
}

/// Random data, for a device's clock depends on the bits that change: zeros would flatter it.
fn noise(count: usize) -> Vec<f32> {
    Random::new(1).floats(count)
}

/// A matrix of a scheme, its tiles random bits.
///
/// # Panics
/// If there is no such scheme.
fn matrix(scheme: &str, n: usize, k: usize) -> TiledMatrix {
    let group = Sharing::Group { size: 128 };
    let (code, formula, scales) = match scheme {
        "bf16" => (Code::Bf16, Formula::Dense, None),
        "int4 g128" => (Code::Int { bits: 4 }, Formula::Affine, Some((DType::BF16, group))),
        "fp8 channel" => (Code::E4m3, Formula::Affine, Some((DType::BF16, Sharing::Channel))),
        "nvfp4" => (Code::E2m1, Formula::Nvfp4, Some((DType::F8E4M3, Sharing::Group { size: 16 }))),
        other => panic!("no scheme `{other}` is measured"),
    };
    let mut codes = random_bytes(Tiling::new(n, k, code.tile_bits()).bytes());
    match code {
        // Not the code of NaN.
        Code::E4m3 => codes.iter_mut().for_each(|byte| *byte &= 0xf7),
        // Exponents around 1.
        Code::Bf16 => codes.iter_mut().skip(1).step_by(2).for_each(|byte| *byte = *byte & 0x80 | 0x3f),
        Code::Int { .. } | Code::E2m1 | Code::F16 | Code::F32 => {}
    }
    let scales = scales.map(|(dtype, sharing)| {
        let count = ScaleTable::elements(sharing, n, k);
        // 1/64 in bf16; 1 in fp8.
        let element: &[u8] = if dtype == DType::BF16 { &[0x80, 0x3c] } else { &[0x38] };
        ScaleTable { dtype, sharing, bytes: element.repeat(count).into() }
    });
    TiledMatrix {
        n,
        k,
        code,
        formula,
        codes: codes.into(),
        scales,
        zeros: None,
        global_scale: (formula == Formula::Nvfp4).then(|| 64.0_f32.to_bits()),
        permutation: None,
    }
}

fn random_bytes(count: usize) -> Vec<u8> {
    let mut random = Random::new(2);
    let mut bytes: Vec<u8> = (0..count.div_ceil(4)).flat_map(|_| random.next().to_le_bytes()).collect();
    bytes.truncate(count);
    bytes
}
