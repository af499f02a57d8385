//! One decoder block over the windows of a batch: `x += attention(norm(x)); x += ffn(norm(x))`. The order of the
//! operations; what each computes is the backend's.

use std::ops::Range;

use ctq_kernels::{AttentionShape, Backend, Compute, GatePair, Renormalize, Rotation, Treatment};
use ctq_model::spec::{AttentionSpec, BlockSpec, FfnSpec};

use crate::error::{Error, Result};
use crate::rows::Rows;
use crate::watch::Watches;
use crate::weights::{BlockWeights, FfnWeights, GatedWeights, LinearWeights};

/// What goes into linears.
pub(crate) enum Inputs<'a, B: Backend> {
    /// As it is.
    Given(&'a B::Buffer),
    /// After a norm over whole rows, with this weight.
    Normed(&'a B::Buffer, &'a [f32]),
}

/// What was made of hidden states, and the question whether they are finite, where a norm put it.
type Watched<B, T> = (T, Option<<B as Backend>::Watch>);

/// What every block of a run shares.
pub(crate) struct Context<'a, B> {
    pub(crate) backend: &'a B,
    pub(crate) compute: Compute,
    pub(crate) epsilon: f32,
    pub(crate) rotation: &'a Rotation,
    /// The first of the windows, counted in the group.
    pub(crate) first_window: usize,
    /// The module that has left the hidden states.
    pub(crate) left_by: &'a str,
    /// Rows of each window in the buffers.
    pub(crate) rows: &'a Rows,
}

impl<B> Clone for Context<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Context<'_, B> {}

impl<B: Backend> Context<'_, B> {
    /// Runs a block on the hidden states, [rows, hidden], in place. Asks whether what it is given and what attention leaves
    /// are finite; about what the block leaves, whoever takes it asks. Keys and values are those of all rows; of the rest,
    /// and so of the hidden states that are left, only the rows `leaving`, where they are given.
    pub(crate) fn block(
        &self,
        spec: &BlockSpec,
        weights: &BlockWeights<B>,
        hidden: &mut B::Buffer,
        leaving: Option<&Rows>,
        watches: &mut Watches<'_, B>,
    ) -> Result<()> {
        let before = self.attention(&spec.attention, weights, hidden, leaving)?;
        watches.add(self, self.left_by, before);
        let left = Context { rows: leaving.unwrap_or(self.rows), ..*self };
        left.feed_forward(spec, weights, hidden, watches)
    }

    /// The second half of a block.
    fn feed_forward(
        &self,
        spec: &BlockSpec,
        weights: &BlockWeights<B>,
        hidden: &mut B::Buffer,
        watches: &mut Watches<'_, B>,
    ) -> Result<()> {
        match (&weights.ffn, &spec.ffn) {
            (FfnWeights::Moe { router, experts }, FfnSpec::Moe { top_k, renormalize, .. }) => {
                let renormalize = if *renormalize { Renormalize::Chosen } else { Renormalize::All };
                watches.ask(self, &spec.attention.module, hidden)?;
                let x = self.backend.norm(hidden, &weights.ffn_norm, self.epsilon)?;
                let sum = self.moe(router, experts, *top_k, renormalize, &x, watches)?;
                Ok(self.backend.add(hidden, &sum)?)
            }
            (FfnWeights::Gated(gated), FfnSpec::Gated(_)) => {
                let x = Inputs::Normed(hidden, &weights.ffn_norm);
                let (inner, before) = self.inner(gated, &x, &self.rows.windows)?;
                watches.add(self, &spec.attention.module, before);
                self.linear_add(hidden, &gated.down, &inner, &self.rows.windows)
            }
            (FfnWeights::Gated(_), FfnSpec::Moe { .. }) | (FfnWeights::Moe { .. }, FfnSpec::Gated(_)) => {
                unreachable!("weights are loaded by the same specification")
            }
        }
    }

    /// Norm, projections, norms of heads, rotation, key-value quantization, attention and output projection, which is
    /// added to the hidden states: of the rows `leaving`, which are then all that is left, or of all. Returns whether the
    /// hidden states were finite before.
    fn attention(
        &self,
        spec: &AttentionSpec,
        weights: &BlockWeights<B>,
        hidden: &mut B::Buffer,
        leaving: Option<&Rows>,
    ) -> Result<Option<B::Watch>> {
        let backend = self.backend;
        let asked = leaving.unwrap_or(self.rows);
        let ([mut q, mut k, mut v], before) = self.projections(weights, hidden, leaving)?;
        if let Some((q_norm, k_norm)) = &weights.qk_norm {
            q = backend.norm(&q, q_norm, self.epsilon)?;
            k = backend.norm(&k, k_norm, self.epsilon)?;
        }
        backend.rotate(&mut q, self.rotation, &asked.spans)?;
        backend.rotate(&mut k, self.rotation, &self.rows.spans)?;
        if let Some(kv) = &weights.kv {
            backend.fake_quantize(&mut k, &kv.k, spec.head_dim, &self.rows.windows)?;
            backend.fake_quantize(&mut v, &kv.v, spec.head_dim, &self.rows.windows)?;
            if let Some(quantizer) = &kv.q {
                backend.fake_quantize(&mut q, quantizer, spec.head_dim, &asked.windows)?;
            }
        }
        let shape = AttentionShape {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            window: spec.window,
        };
        let (heads, windows) = (0..spec.heads, &self.rows.windows);
        let mixed = backend.attend(&q, &k, &v, &shape, heads, self.compute, &asked.spans, windows)?;
        drop((q, k, v));
        let operand = backend.prepare(&mixed, &weights.o.input, self.compute, &asked.windows)?;
        drop(mixed);
        self.linear_add(hidden, &weights.o, &operand, &asked.windows)?;
        Ok(before)
    }

    /// Queries of the rows `leaving`, which become all that `hidden` holds; keys and values of all.
    fn projections(
        &self,
        weights: &BlockWeights<B>,
        hidden: &mut B::Buffer,
        leaving: Option<&Rows>,
    ) -> Result<Watched<B, [B::Buffer; 3]>> {
        let (BlockWeights { q, k, v, .. }, windows) = (weights, &self.rows.windows);
        let norm = &weights.attention_norm;
        let Some(leaving) = leaving else {
            return self.linears([q, k, v], &Inputs::Normed(hidden, norm), windows);
        };
        let ([k, v], before) = self.linears([k, v], &Inputs::Normed(hidden, norm), windows)?;
        *hidden = self.backend.gather(hidden, &self.rows.find(leaving))?;
        let ([q], _) = self.linears([q], &Inputs::Normed(hidden, norm), &leaving.windows)?;
        Ok(([q, k, v], before))
    }

    /// `silu(gate(x)) * up(x)`, as the linear that follows takes it.
    fn inner(
        &self,
        weights: &GatedWeights<B>,
        x: &Inputs<'_, B>,
        windows: &[Range<usize>],
    ) -> Result<Watched<B, B::Operand>> {
        let GatedWeights { gate, up, down } = weights;
        if gate.input != up.input || gate.output.is_some() || up.output.is_some() {
            let ([gate, up], before) = self.linears([gate, up], x, windows)?;
            let inner = self.backend.gate_operand(gate, &up, &down.input, self.compute, windows)?;
            return Ok((inner, before));
        }
        let (operand, before) = self.operand(x, &gate.input, windows)?;
        let biases = [gate.bias.as_deref(), up.bias.as_deref()];
        let pair = GatePair { gate: &gate.matrix, up: &up.matrix, biases };
        let inner = self.backend.gated(&operand, pair, &down.input, self.compute, windows);
        let inner = inner.map_err(|source| Error::Kernel { module: names(&[gate, up]), source })?;
        Ok((inner, before))
    }

    /// Inputs after a linear's treatment, and whether hidden states were finite before their norm.
    pub(crate) fn operand(
        &self,
        inputs: &Inputs<'_, B>,
        treatment: &Treatment,
        windows: &[Range<usize>],
    ) -> Result<Watched<B, B::Operand>> {
        let Context { backend, compute, epsilon, .. } = *self;
        Ok(match inputs {
            Inputs::Given(x) => (backend.prepare(x, treatment, compute, windows)?, None),
            Inputs::Normed(x, weight) => {
                let (operand, before) =
                    backend.norm_operand(x, weight, epsilon, treatment, compute, windows)?;
                (operand, Some(before))
            }
        })
    }

    /// `sum +=` one linear of its prepared inputs.
    fn linear_add(
        &self,
        sum: &mut B::Buffer,
        linear: &LinearWeights<B>,
        x: &B::Operand,
        windows: &[Range<usize>],
    ) -> Result<()> {
        if linear.output.is_some() {
            let y = self.output(linear, x, windows)?;
            return Ok(self.backend.add(sum, &y)?);
        }
        let added = self.backend.linear_add(sum, x, &linear.matrix, linear.bias.as_deref(), self.compute);
        added.map_err(|source| Error::Kernel { module: linear.module.clone(), source })
    }

    /// Several linears of the same inputs, which are prepared once where the treatment is the same, and whether hidden
    /// states were finite before a norm.
    pub(crate) fn linears<const N: usize>(
        &self,
        weights: [&LinearWeights<B>; N],
        x: &Inputs<'_, B>,
        windows: &[Range<usize>],
    ) -> Result<Watched<B, [B::Buffer; N]>> {
        let mut outputs = Vec::with_capacity(N);
        let (mut operand, mut first) = (None, None);
        for (index, linear) in weights.iter().enumerate() {
            let operand = match operand {
                Some(ref operand) if weights[index - 1].input == linear.input => operand,
                _ => {
                    let (prepared, before) = self.operand(x, &linear.input, windows)?;
                    first = first.or(before);
                    &*operand.insert(prepared)
                }
            };
            outputs.push(self.output(linear, operand, windows)?);
        }
        Ok((outputs.try_into().unwrap_or_else(|_| unreachable!("one output a linear")), first))
    }

    /// One linear of its prepared inputs, its outputs quantized where the scheme says so.
    fn output(
        &self,
        linear: &LinearWeights<B>,
        x: &B::Operand,
        windows: &[Range<usize>],
    ) -> Result<B::Buffer> {
        let output = self.backend.linear(x, &linear.matrix, linear.bias.as_deref(), self.compute);
        let mut output = output.map_err(|source| Error::Kernel { module: linear.module.clone(), source })?;
        if let Some(quantizer) = &linear.output {
            let width = self.backend.rows(&linear.matrix);
            self.backend.fake_quantize(&mut output, quantizer, width, windows)?;
        }
        Ok(output)
    }
}

/// The modules of linears that run together: which of them an error is about is not known.
pub(crate) fn names<B: Backend>(linears: &[&LinearWeights<B>]) -> String {
    match linears {
        [] => String::new(),
        [only] => only.module.clone(),
        [first, .., last] => format!("{}` to `{}", first.module, last.module),
    }
}
