//! What crosses between devices, in elements of f32 for one token. Numbers from the model as data; moves nothing.

use ctq_model::Spec;
use ctq_model::spec::{BlockSpec, FfnSpec};

use crate::layout::Layout;

/// Columns that the ranks of a layer gather for one token: the heads' outputs, the output projection, and of the
/// feed-forward part the inner results and the outputs; of experts, the router's logits and the inner results of those
/// that the token goes to.
fn gathered_in_layer(spec: &Spec, block: &BlockSpec) -> usize {
    let heads = block.attention.heads * block.attention.head_dim;
    let ffn = match &block.ffn {
        FfnSpec::Gated(gated) => gated.width,
        FfnSpec::Moe { experts, top_k, .. } => {
            experts.len() + top_k * experts.first().map_or(0, |expert| expert.width)
        }
    };
    heads + spec.hidden + ffn + spec.hidden
}

/// Bytes that one rank receives from its peers for one token in one layer.
pub fn received_in_layer(layout: &Layout, spec: &Spec, block: &BlockSpec) -> u64 {
    let foreign = (layout.ranks - 1) as f64 / layout.ranks as f64;
    ((4 * gathered_in_layer(spec, block)) as f64 * foreign).round() as u64
}

/// Bytes that one rank hands to the next stage for one token.
pub fn handed_on(layout: &Layout, spec: &Spec) -> u64 {
    if layout.stages > 1 { 4 * spec.hidden as u64 } else { 0 }
}
