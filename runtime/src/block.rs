//! One decoder block over the windows of a batch: `x += attention(norm(x)); x += ffn(norm(x))`. The order of the
//! operations; what each computes is the backend's.

use std::ops::Range;

use ctq_kernels::{AttentionShape, Backend, Compute, Renormalize, Rotation};
use ctq_model::spec::{AttentionSpec, BlockSpec, FfnSpec};

use crate::error::{Error, Result};
use crate::rows::Rows;
use crate::weights::{BlockWeights, FfnWeights, GatedWeights, LinearWeights};

/// What every block of a run shares.
pub(crate) struct Context<'a, B> {
    pub(crate) backend: &'a B,
    pub(crate) compute: Compute,
    pub(crate) epsilon: f32,
    pub(crate) rotation: &'a Rotation,
    /// The first of the windows, counted in the group.
    pub(crate) first_window: usize,
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
    /// Runs a block on the hidden states, [rows, hidden], in place. Keys and values are those of all rows; of the rest,
    /// and so of the hidden states that are left, only the rows `leaving`, where they are given.
    pub(crate) fn block(
        &self,
        spec: &BlockSpec,
        weights: &BlockWeights<B>,
        hidden: &mut B::Buffer,
        leaving: Option<&Rows>,
    ) -> Result<()> {
        let x = self.backend.norm(hidden, &weights.attention_norm, self.epsilon)?;
        let attention = self.attention(&spec.attention, weights, x, leaving)?;
        if let Some(leaving) = leaving {
            *hidden = self.backend.gather(hidden, &self.rows.find(leaving))?;
        }
        self.backend.add(hidden, &attention)?;
        drop(attention);
        let left = Context { rows: leaving.unwrap_or(self.rows), ..*self };
        left.check(&spec.attention.module, hidden)?;
        left.feed_forward(spec, weights, hidden)
    }

    /// The second half of a block.
    fn feed_forward(
        &self,
        spec: &BlockSpec,
        weights: &BlockWeights<B>,
        hidden: &mut B::Buffer,
    ) -> Result<()> {
        let x = self.backend.norm(hidden, &weights.ffn_norm, self.epsilon)?;
        let ffn = match (&weights.ffn, &spec.ffn) {
            (FfnWeights::Moe { router, experts }, FfnSpec::Moe { top_k, renormalize, .. }) => {
                let renormalize = if *renormalize { Renormalize::Chosen } else { Renormalize::All };
                self.moe(router, experts, *top_k, renormalize, &x)?
            }
            (FfnWeights::Gated(gated), FfnSpec::Gated(_)) => self.gated(gated, x)?,
            (FfnWeights::Gated(_), FfnSpec::Moe { .. }) | (FfnWeights::Moe { .. }, FfnSpec::Gated(_)) => {
                unreachable!("weights are loaded by the same specification")
            }
        };
        self.backend.add(hidden, &ffn)?;
        self.check(spec.ffn_module(), hidden)
    }

    /// Names the window, counted in the group, and the position of the first row that is no longer finite.
    pub(crate) fn check(&self, module: &str, hidden: &B::Buffer) -> Result<()> {
        let Some(row) = self.backend.first_non_finite(hidden)? else { return Ok(()) };
        let (window, position) = self.rows.place(row);
        Err(Error::NonFinite { module: module.to_owned(), window: self.first_window + window, position })
    }

    /// Projections, norms of heads, rotation, key-value quantization, attention and output projection: of the rows
    /// `leaving`, or of all.
    fn attention(
        &self,
        spec: &AttentionSpec,
        weights: &BlockWeights<B>,
        x: B::Buffer,
        leaving: Option<&Rows>,
    ) -> Result<B::Buffer> {
        let backend = self.backend;
        let asked = leaving.unwrap_or(self.rows);
        let [mut q, mut k, mut v] = self.projections(weights, x, leaving)?;
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
        self.linear(&weights.o, &mixed, &asked.windows)
    }

    /// Queries of the rows `leaving`, keys and values of all.
    fn projections(
        &self,
        weights: &BlockWeights<B>,
        x: B::Buffer,
        leaving: Option<&Rows>,
    ) -> Result<[B::Buffer; 3]> {
        let (BlockWeights { q, k, v, .. }, windows) = (weights, &self.rows.windows);
        let Some(leaving) = leaving else { return self.linears([q, k, v], &x, windows) };
        let [k, v] = self.linears([k, v], &x, windows)?;
        let x = self.backend.gather(&x, &self.rows.find(leaving))?;
        Ok([self.linear(q, &x, &leaving.windows)?, k, v])
    }

    /// `down(silu(gate(x)) * up(x))`.
    fn gated(&self, weights: &GatedWeights<B>, x: B::Buffer) -> Result<B::Buffer> {
        let [gate, up] = self.linears([&weights.gate, &weights.up], &x, &self.rows.windows)?;
        drop(x);
        let inner = self.backend.gate(gate, &up)?;
        drop(up);
        self.linear(&weights.down, &inner, &self.rows.windows)
    }

    /// One linear of `x`, [rows, n].
    pub(crate) fn linear(
        &self,
        weights: &LinearWeights<B>,
        x: &B::Buffer,
        windows: &[Range<usize>],
    ) -> Result<B::Buffer> {
        let [output] = self.linears([weights], x, windows)?;
        Ok(output)
    }

    /// Several linears of the same inputs, which are prepared once where the treatment is the same.
    fn linears<const N: usize>(
        &self,
        weights: [&LinearWeights<B>; N],
        x: &B::Buffer,
        windows: &[Range<usize>],
    ) -> Result<[B::Buffer; N]> {
        let mut outputs = Vec::with_capacity(N);
        let mut operand = None;
        for (index, linear) in weights.iter().enumerate() {
            let operand = match operand {
                Some(ref operand) if weights[index - 1].input == linear.input => operand,
                _ => &*operand.insert(self.backend.prepare(x, &linear.input, self.compute, windows)?),
            };
            let output = self.backend.linear(operand, &linear.matrix, linear.bias.as_deref(), self.compute);
            let mut output =
                output.map_err(|source| Error::Kernel { module: linear.module.clone(), source })?;
            if let Some(quantizer) = &linear.output {
                let width = self.backend.rows(&linear.matrix);
                self.backend.fake_quantize(&mut output, quantizer, width, windows)?;
            }
            outputs.push(output);
        }
        Ok(outputs.try_into().unwrap_or_else(|_| unreachable!("one output a linear")))
    }
}
