//! Causal self-attention with grouped key-value heads, in f64.
//!
//! Source: `LlamaAttention`, `Qwen3Attention` and `eager_attention_forward` of transformers. One window, positions
//! from 0, no cache. Knows heads; a projection is a [`crate::linear`].

use ctq_model::inventory::KvScheme;
use ctq_model::spec::AttentionSpec;
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};
use rayon::prelude::*;

use crate::Result;
use crate::activation::{self, Role, quantized};
use crate::norm;
use crate::reference::{Acts, Reference};
use crate::rope::{Rotation, rotate};
use crate::stored;

impl Reference<'_> {
    /// Attention over normalised hidden states [tokens, hidden], without the residual.
    pub(crate) fn attention(
        &self,
        attention: &AttentionSpec,
        kv: Option<&KvScheme>,
        x: &Array2<f64>,
        acts: Acts,
    ) -> Result<Array2<f64>> {
        let mut queries = self.linear(&attention.q, x, acts)?;
        let mut keys = self.linear(&attention.k, x, acts)?;
        let mut values = self.linear(&attention.v, x, acts)?;
        if let Some((query_norm, key_norm)) = &attention.qk_norm {
            queries = self.head_norm(queries, query_norm, attention.head_dim)?;
            keys = self.head_norm(keys, key_norm, attention.head_dim)?;
        }
        let rotation = Rotation::new(&self.spec().rope, attention.head_dim);
        rotate_heads(&mut queries, &rotation, attention.head_dim);
        rotate_heads(&mut keys, &rotation, attention.head_dim);
        match (acts, kv) {
            (Acts::Off, _) | (Acts::Library, None) => {}
            (Acts::Library, Some(scheme)) => {
                for (role, states) in
                    [(Role::Query, &mut queries), (Role::Key, &mut keys), (Role::Value, &mut values)]
                {
                    if let Some(quantizer) = activation::of_attention(self.source(), attention, scheme, role)?
                    {
                        *states = quantized(&quantizer, states);
                    }
                }
            }
        }
        let mixed = mix(attention, &queries, &keys, &values);
        self.linear(&attention.o, &mixed, acts)
    }

    /// Norm of each head, one weight [head_dim] for all of them.
    fn head_norm(&self, states: Array2<f64>, module: &str, head_dim: usize) -> Result<Array2<f64>> {
        let weight = stored::floats(self.source(), &format!("{module}.weight"), head_dim)?;
        let (tokens, width) = states.dim();
        let heads = states.into_shape_with_order((tokens * width / head_dim, head_dim));
        let heads = norm::rms(heads.expect("heads divide the width").view(), &weight, self.spec().norm_eps);
        Ok(heads.into_shape_with_order((tokens, width)).expect("the shape it had"))
    }
}

/// Rotates every head of [tokens, heads * head_dim] by the position of its row.
fn rotate_heads(states: &mut Array2<f64>, rotation: &Rotation, head_dim: usize) {
    for (position, mut row) in states.rows_mut().into_iter().enumerate() {
        let turns = rotation.turns(position);
        for head in row.axis_chunks_iter_mut(Axis(0), head_dim) {
            rotate(head, &turns);
        }
    }
}

/// `softmax(q k^T / sqrt(head_dim) + mask) v` for every head, side by side: [tokens, heads * head_dim].
fn mix(
    attention: &AttentionSpec,
    queries: &Array2<f64>,
    keys: &Array2<f64>,
    values: &Array2<f64>,
) -> Array2<f64> {
    let dimension = attention.head_dim;
    let queries_a_key = attention.heads / attention.kv_heads;
    let heads: Vec<Array2<f64>> = (0..attention.heads)
        .into_par_iter()
        .map(|head| {
            let of = |states: &Array2<f64>, head: usize| {
                states.slice(s![.., head * dimension..(head + 1) * dimension]).to_owned()
            };
            let shared = head / queries_a_key;
            let mut scores = of(queries, head).dot(&of(keys, shared).t());
            scores /= (dimension as f64).sqrt();
            causal_softmax(&mut scores, attention.window);
            scores.dot(&of(values, shared))
        })
        .collect();
    let views: Vec<ArrayView2<'_, f64>> = heads.iter().map(|head| head.view()).collect();
    concatenate(Axis(1), &views).expect("heads have one shape")
}

/// Softmax of each row over the positions it may see: `p - window + 1 ..= p`. The others become 0.
fn causal_softmax(scores: &mut Array2<f64>, window: Option<usize>) {
    for (position, mut row) in scores.rows_mut().into_iter().enumerate() {
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let largest = row.slice(s![first..=position]).iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut sum = 0.0;
        for (seen, score) in row.iter_mut().enumerate() {
            *score = if (first..=position).contains(&seen) { libm::exp(*score - largest) } else { 0.0 };
            sum += *score;
        }
        row /= sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_of_two_sees_itself_and_the_one_before() {
        let mut scores = Array2::zeros((4, 4));
        causal_softmax(&mut scores, Some(2));
        assert_eq!(scores.row(0).to_vec(), [1.0, 0.0, 0.0, 0.0]);
        assert_eq!(scores.row(3).to_vec(), [0.0, 0.0, 0.5, 0.5]);
        let mut scores = Array2::zeros((4, 4));
        causal_softmax(&mut scores, None);
        assert_eq!(scores.row(3).to_vec(), [0.25; 4]);
    }
}
