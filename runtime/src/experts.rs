//! A mixture of experts: each expert on the tokens that the router sends it, summed in ascending order of experts.

use std::ops::Range;

use ctq_kernels::{Backend, ExpertTokens, Renormalize};

use crate::block::{Context, Inputs, names};
use crate::error::{Error, Result};
use crate::schedule::EXPERTS_AT_ONCE;
use crate::watch::Watches;
use crate::weights::{GatedWeights, LinearWeights};

/// An expert that got tokens.
struct Busy<'a, B: Backend> {
    weights: &'a GatedWeights<B>,
    tokens: ExpertTokens,
    /// Where the rows of each window are among its tokens.
    windows: Vec<Range<usize>>,
}

impl<B: Backend> Context<'_, B> {
    /// Experts in ascending order, each on the tokens that the router sends it: [rows, hidden].
    pub(crate) fn moe(
        &self,
        router: &LinearWeights<B>,
        experts: &[GatedWeights<B>],
        top_k: usize,
        renormalize: Renormalize,
        x: &B::Buffer,
        watches: &mut Watches<'_, B>,
    ) -> Result<B::Buffer> {
        let backend = self.backend;
        let ([logits], _) = self.linears([router], &Inputs::Given(x), &self.rows.windows)?;
        // Routing waits for the device anyway, and nothing can be routed by what is not a number.
        watches.settle()?;
        let tokens = backend.route(&logits, top_k, renormalize)?;
        drop(logits);
        let busy: Vec<Busy<'_, B>> = experts
            .iter()
            .zip(tokens)
            .filter(|(_, tokens)| !tokens.rows.is_empty())
            .map(|(weights, tokens)| Busy { weights, windows: self.gathered(&tokens.rows), tokens })
            .collect();
        let width = experts.first().map_or(0, |expert| backend.rows(&expert.down.matrix));
        let mut sum = backend.zeros(self.rows.len(), width)?;
        for experts in busy.chunks(EXPERTS_AT_ONCE) {
            let outputs = self.gated_experts(experts, x)?;
            for (expert, y) in experts.iter().zip(&outputs) {
                backend.scatter_add(&mut sum, y, &expert.tokens.rows, &expert.tokens.weights)?;
            }
        }
        Ok(sum)
    }

    /// `down(silu(gate(x)) * up(x))` of several experts, each on its own rows of `x`.
    fn gated_experts(&self, experts: &[Busy<'_, B>], x: &B::Buffer) -> Result<Vec<B::Buffer>> {
        let backend = self.backend;
        let linears = |of: fn(&GatedWeights<B>) -> &LinearWeights<B>| -> Vec<&LinearWeights<B>> {
            experts.iter().map(|expert| of(expert.weights)).collect()
        };
        let gates = linears(|expert| &expert.gate);
        let ups = linears(|expert| &expert.up);
        let downs = linears(|expert| &expert.down);
        let gathered = experts.iter().map(|expert| Ok(backend.gather(x, &expert.tokens.rows)?));
        let gathered: Vec<B::Buffer> = gathered.collect::<Result<_>>()?;

        let mut operands = self.prepare_experts(experts, &gates, &gathered)?;
        let gate = self.linear_experts(experts, &gates, &operands)?;
        if gates.iter().zip(&ups).any(|(gate, up)| gate.input != up.input) {
            drop(operands);
            operands = self.prepare_experts(experts, &ups, &gathered)?;
        }
        drop(gathered);
        let up = self.linear_experts(experts, &ups, &operands)?;
        drop(operands);
        let inner = experts.iter().zip(&downs).zip(gate.into_iter().zip(&up));
        let inner = inner.map(|((expert, down), (gate, up))| {
            Ok(backend.gate_operand(gate, up, &down.input, self.compute, &expert.windows)?)
        });
        let operands: Vec<B::Operand> = inner.collect::<Result<_>>()?;
        drop(up);
        self.linear_experts(experts, &downs, &operands)
    }

    /// Inputs of one linear of each expert after their treatment, which is each expert's own.
    fn prepare_experts(
        &self,
        experts: &[Busy<'_, B>],
        linears: &[&LinearWeights<B>],
        inputs: &[B::Buffer],
    ) -> Result<Vec<B::Operand>> {
        let prepare = |((expert, linear), x): ((&Busy<'_, B>, &&LinearWeights<B>), &B::Buffer)| {
            Ok(self.backend.prepare(x, &linear.input, self.compute, &expert.windows)?)
        };
        experts.iter().zip(linears).zip(inputs).map(prepare).collect()
    }

    /// One linear of each expert, with its outputs quantized where the scheme says so.
    fn linear_experts(
        &self,
        experts: &[Busy<'_, B>],
        linears: &[&LinearWeights<B>],
        operands: &[B::Operand],
    ) -> Result<Vec<B::Buffer>> {
        let matrices: Vec<&B::Matrix> = linears.iter().map(|linear| &linear.matrix).collect();
        let biases: Vec<Option<&[f32]>> = linears.iter().map(|linear| linear.bias.as_deref()).collect();
        let operands: Vec<&B::Operand> = operands.iter().collect();
        let mut outputs = self
            .backend
            .linear_experts(&operands, &matrices, &biases, self.compute)
            .map_err(|source| Error::Kernel { module: names(linears), source })?;
        for ((expert, linear), output) in experts.iter().zip(linears).zip(&mut outputs) {
            if let Some(quantizer) = &linear.output {
                let width = self.backend.rows(&linear.matrix);
                self.backend.fake_quantize(output, quantizer, width, &expert.windows)?;
            }
        }
        Ok(outputs)
    }

    /// Where the rows of each window are among ascending gathered rows.
    fn gathered(&self, rows: &[u32]) -> Vec<Range<usize>> {
        let before = |row: usize| rows.partition_point(|gathered| (*gathered as usize) < row);
        self.rows.windows.iter().map(|window| before(window.start)..before(window.end)).collect()
    }
}
