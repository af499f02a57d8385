//! One decoder block over the windows of a group: `x += attention(norm(x)); x += ffn(norm(x))`. The order of the
//! operations; what each computes is the backend's.

use std::ops::Range;

use ctq_kernels::{AttentionShape, Backend, Compute, Rotation};
use ctq_model::spec::{AttentionSpec, BlockSpec, FfnSpec};

use crate::error::{Error, Result};
use crate::route::route;
use crate::weights::{BlockWeights, FfnWeights, GatedWeights, LinearWeights};

/// What every block of a run shares.
pub(crate) struct Context<'a, B> {
    pub(crate) backend: &'a B,
    pub(crate) compute: Compute,
    pub(crate) epsilon: f32,
    pub(crate) rotation: &'a Rotation,
    /// Rows of each window in the buffers.
    pub(crate) windows: &'a [Range<usize>],
}

impl<B: Backend> Context<'_, B> {
    /// Runs a block on the hidden states, [rows, hidden], in place.
    pub(crate) fn block(
        &self,
        spec: &BlockSpec,
        weights: &BlockWeights<B>,
        hidden: &mut B::Buffer,
    ) -> Result<()> {
        let x = self.backend.norm(hidden, &weights.attention_norm, self.epsilon);
        let attention = self.attention(&spec.attention, weights, &x)?;
        self.backend.add(hidden, &attention);
        self.check(&spec.attention.module, hidden)?;
        let x = self.backend.norm(hidden, &weights.ffn_norm, self.epsilon);
        let ffn = match (&weights.ffn, &spec.ffn) {
            (FfnWeights::Moe { router, experts }, FfnSpec::Moe { top_k, renormalize, .. }) => {
                self.moe(router, experts, *top_k, *renormalize, &x)?
            }
            (FfnWeights::Gated(gated), FfnSpec::Gated(_)) => self.gated(gated, &x, self.windows)?,
            (FfnWeights::Gated(_), FfnSpec::Moe { .. }) | (FfnWeights::Moe { .. }, FfnSpec::Gated(_)) => {
                unreachable!("weights are loaded by the same specification")
            }
        };
        self.backend.add(hidden, &ffn);
        self.check(spec.ffn_module(), hidden)
    }

    /// Names the window and position of the first row that is no longer finite.
    pub(crate) fn check(&self, module: &str, hidden: &B::Buffer) -> Result<()> {
        let Some(row) = self.backend.first_non_finite(hidden) else { return Ok(()) };
        let window = self.windows.iter().position(|window| window.contains(&row)).unwrap_or(0);
        Err(Error::NonFinite {
            module: module.to_owned(),
            window,
            position: row - self.windows[window].start,
        })
    }

    /// Projections, norms of heads, rotation, key-value quantization, attention and output projection.
    fn attention(&self, spec: &AttentionSpec, weights: &BlockWeights<B>, x: &B::Buffer) -> Result<B::Buffer> {
        let backend = self.backend;
        let [mut q, mut k, mut v] = self.linears([&weights.q, &weights.k, &weights.v], x, self.windows)?;
        if let Some((q_norm, k_norm)) = &weights.qk_norm {
            q = backend.norm(&q, q_norm, self.epsilon);
            k = backend.norm(&k, k_norm, self.epsilon);
        }
        backend.rotate(&mut q, self.rotation, self.windows);
        backend.rotate(&mut k, self.rotation, self.windows);
        if let Some(kv) = &weights.kv {
            backend.fake_quantize(&mut k, &kv.k, spec.head_dim, self.windows);
            backend.fake_quantize(&mut v, &kv.v, spec.head_dim, self.windows);
            if let Some(quantizer) = &kv.q {
                backend.fake_quantize(&mut q, quantizer, spec.head_dim, self.windows);
            }
        }
        let shape = AttentionShape {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            window: spec.window,
        };
        let mixed = backend.attend(&q, &k, &v, &shape, 0..spec.heads, self.compute, self.windows);
        self.linear(&weights.o, &mixed, self.windows)
    }

    /// `down(silu(gate(x)) * up(x))`.
    fn gated(&self, weights: &GatedWeights<B>, x: &B::Buffer, windows: &[Range<usize>]) -> Result<B::Buffer> {
        let [gate, up] = self.linears([&weights.gate, &weights.up], x, windows)?;
        let inner = self.backend.gate(&gate, &up);
        drop((gate, up));
        self.linear(&weights.down, &inner, windows)
    }

    /// Experts in ascending order, each on the tokens that the router sends it.
    fn moe(
        &self,
        router: &LinearWeights<B>,
        experts: &[GatedWeights<B>],
        top_k: usize,
        renormalize: bool,
        x: &B::Buffer,
    ) -> Result<B::Buffer> {
        let backend = self.backend;
        let logits = backend.download(&self.linear(router, x, self.windows)?);
        let rows = self.windows.last().map_or(0, |window| window.end);
        let width = experts.first().map_or(0, |expert| backend.rows(&expert.down.matrix));
        let mut sum = backend.upload(width, &vec![0.0; rows * width]);
        for (expert, tokens) in experts.iter().zip(route(&logits, experts.len(), top_k, renormalize)) {
            if tokens.rows.is_empty() {
                continue;
            }
            let x = backend.gather(x, &tokens.rows);
            let y = self.gated(expert, &x, &self.gathered_windows(&tokens.rows))?;
            backend.scatter_add(&mut sum, &y, &tokens.rows, &tokens.weights);
        }
        Ok(sum)
    }

    /// Where the rows of each window are among ascending gathered rows.
    fn gathered_windows(&self, rows: &[u32]) -> Vec<Range<usize>> {
        let before = |row: usize| rows.partition_point(|gathered| (*gathered as usize) < row);
        self.windows.iter().map(|window| before(window.start)..before(window.end)).collect()
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
                _ => &*operand.insert(self.backend.prepare(x, &linear.input, self.compute, windows)),
            };
            let output = self.backend.linear(operand, &linear.matrix, linear.bias.as_deref(), self.compute);
            let mut output =
                output.map_err(|source| Error::Kernel { module: linear.module.clone(), source })?;
            if let Some(quantizer) = &linear.output {
                let width = self.backend.rows(&linear.matrix);
                self.backend.fake_quantize(&mut output, quantizer, width, windows);
            }
            outputs.push(output);
        }
        Ok(outputs.try_into().unwrap_or_else(|_| unreachable!("one output a linear")))
    }
}
