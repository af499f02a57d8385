//! Operations of a [`Backend`] that are made of others, with the bits that a device which fuses them must give. Knows no
//! device.

use std::ops::Range;

use crate::Compute;
use crate::backend::{Backend, GatePair, KernelError, Treatment};

/// [`Backend::norm_operand`].
pub(crate) fn norm_operand<B: Backend + ?Sized>(
    backend: &B,
    x: &B::Buffer,
    weight: &[f32],
    epsilon: f32,
    treatment: &Treatment,
    compute: Compute,
    windows: &[Range<usize>],
) -> Result<(B::Operand, B::Watch), KernelError> {
    let watch = backend.watch(x)?;
    let normed = backend.norm(x, weight, epsilon)?;
    Ok((backend.prepare(&normed, treatment, compute, windows)?, watch))
}

/// [`Backend::gate_operand`].
pub(crate) fn gate_operand<B: Backend + ?Sized>(
    backend: &B,
    gate: B::Buffer,
    up: &B::Buffer,
    treatment: &Treatment,
    compute: Compute,
    windows: &[Range<usize>],
) -> Result<B::Operand, KernelError> {
    backend.prepare(&backend.gate(gate, up)?, treatment, compute, windows)
}

/// [`Backend::linear_add`].
pub(crate) fn linear_add<B: Backend + ?Sized>(
    backend: &B,
    sum: &mut B::Buffer,
    x: &B::Operand,
    weight: &B::Matrix,
    bias: Option<&[f32]>,
    compute: Compute,
) -> Result<(), KernelError> {
    let y = backend.linear(x, weight, bias, compute)?;
    backend.add(sum, &y)
}

/// [`Backend::gated`].
pub(crate) fn gated<B: Backend + ?Sized>(
    backend: &B,
    x: &B::Operand,
    pair: GatePair<'_, B::Matrix>,
    treatment: &Treatment,
    compute: Compute,
    windows: &[Range<usize>],
) -> Result<B::Operand, KernelError> {
    let [gate_bias, up_bias] = pair.biases;
    let gate = backend.linear(x, pair.gate, gate_bias, compute)?;
    let up = backend.linear(x, pair.up, up_bias, compute)?;
    backend.gate_operand(gate, &up, treatment, compute, windows)
}
