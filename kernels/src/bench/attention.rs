//! Causal attention, and the rotation before it.

use std::ops::Range;

use super::{Effort, Timing, arithmetic_of, noise, time};
use crate::backend::{AttentionShape, Backend, KernelError, Span};
use crate::{Compute, Rotation};

fn ranges(windows: usize, length: usize) -> Vec<Range<usize>> {
    (0..windows).map(|window| window * length..(window + 1) * length).collect()
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
    let ranges = ranges(windows, length);
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
        part: String::new(),
        acts: "off".to_owned(),
        m,
        n: width,
        k: shape.head_dim,
        compute,
        seconds: seconds.median,
        fastest_seconds: seconds.fastest,
        slowest_seconds: seconds.slowest,
        operations,
        bytes: (4 * m * (2 * width + 2 * shape.kv_heads * shape.head_dim)) as f64,
        arithmetic: Some(arithmetic_of(compute)),
    })
}

/// Times the rotation of the query heads of one window of `length` tokens, in place.
///
/// # Errors
/// Where an operation fails.
pub fn rotate<B: Backend>(
    backend: &B,
    shape: &AttentionShape,
    rotation: &Rotation,
    length: usize,
    effort: Effort,
) -> Result<Timing, KernelError> {
    let width = shape.heads * shape.head_dim;
    let mut x = backend.upload(width, &noise(length * width))?;
    let spans = Span::whole(&ranges(1, length));
    let seconds = time(backend, effort, || backend.rotate(&mut x, rotation, &spans))?;
    Ok(Timing {
        operation: "rotate".to_owned(),
        what: format!("{} heads of {}", shape.heads, shape.head_dim),
        part: String::new(),
        acts: "off".to_owned(),
        m: length,
        n: width,
        k: shape.head_dim,
        compute: Compute::F32,
        seconds: seconds.median,
        fastest_seconds: seconds.fastest,
        slowest_seconds: seconds.slowest,
        operations: 0.0,
        bytes: (8 * length * width) as f64,
        arithmetic: None,
    })
}
