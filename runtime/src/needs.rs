//! What a model takes while it runs, in bytes: its packed parts, and what a token makes of itself. Estimates from the
//! model as data; decides nothing.

use std::ops::Range;

use ctq_container::MatrixRecord;
use ctq_model::Spec;
use ctq_model::inventory::{Inventory, Part, PartInventory};
use ctq_model::spec::{BlockSpec, FfnSpec};

use crate::schedule::EXPERTS_AT_ONCE;

/// Bytes that a model takes on a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Packed bytes of each layer.
    pub layers: Vec<u64>,
    /// Packed bytes of the embedding.
    pub embedding: u64,
    /// Packed bytes of the head, of the embedding again where it is tied.
    pub head: u64,
    /// Packed bytes of all parts, with a tied head counted once.
    pub all: u64,
    /// Bytes of one token's hidden state, on the device.
    pub hidden: u64,
    /// Bytes of one token's hidden state, on the host.
    pub hidden_on_host: u64,
    /// Bytes of everything else that a token takes while a layer runs over it, on a device.
    pub activations: u64,
    /// The same on each of several devices that share a layer.
    pub activations_shared: u64,
    /// The same on a backend that computes in host memory.
    pub activations_on_host: u64,
}

impl Needs {
    /// What a model takes on one rank that holds all of it.
    pub fn of(inventory: &Inventory) -> Needs {
        let spec = &inventory.spec;
        let layers: Vec<u64> =
            (0..spec.blocks.len()).map(|index| packed_bytes(inventory.part(Part::Layer(index)))).collect();
        let embedding = packed_bytes(inventory.part(Part::Embedding));
        let own_head = packed_bytes(inventory.part(Part::Head));
        let hidden = (4 * spec.hidden) as u64;
        Needs {
            all: layers.iter().sum::<u64>() + embedding + own_head,
            layers,
            embedding,
            head: if spec.tied() { embedding } else { own_head },
            hidden,
            hidden_on_host: hidden,
            activations: (4 * activations(spec)) as u64,
            activations_shared: (4 * activations_shared(spec)) as u64,
            activations_on_host: (4 * activations_on_host(spec)) as u64,
        }
    }

    /// What one of `ranks` ranks takes of some of the layers: its rows of every matrix, and all that a token takes.
    #[must_use]
    pub fn share(&self, layers: &Range<usize>, ranks: usize) -> Needs {
        let part = |bytes: u64| bytes.div_ceil(ranks as u64);
        let (begins, ends) = (layers.start == 0, layers.end == self.layers.len());
        let share: Vec<u64> = self.layers[layers.clone()].iter().map(|bytes| part(*bytes)).collect();
        let embedding = if begins { part(self.embedding) } else { 0 };
        let head = if ends { part(self.head) } else { 0 };
        let all = if begins && ends { part(self.all) } else { share.iter().sum::<u64>() + embedding + head };
        let activations = if ranks > 1 { self.activations_shared } else { self.activations };
        Needs { layers: share, embedding, head, all, activations, ..self.clone() }
    }

    /// The most that is on the device when parts pass through it: two layers, for the next is loaded while one runs;
    /// or the embedding, or the head.
    pub(crate) fn passing(&self) -> u64 {
        let pairs = self.layers.windows(2).map(|pair| pair[0] + pair[1]);
        pairs.chain(self.layers.iter().copied()).chain([self.embedding, self.head]).max().unwrap_or(0)
    }
}

/// Four layers of 100 bytes, embedding and head of 150; 10 bytes of hidden state and 90 of activations a token.
#[cfg(test)]
pub(crate) fn example() -> Needs {
    Needs {
        layers: vec![100; 4],
        embedding: 150,
        head: 150,
        all: 700,
        hidden: 10,
        hidden_on_host: 10,
        activations: 90,
        activations_shared: 90,
        activations_on_host: 90,
    }
}

/// Packed bytes of a part's matrices; its vectors are not worth counting.
fn packed_bytes(part: &PartInventory) -> u64 {
    part.linears.iter().map(|linear| MatrixRecord::of(linear).stored_bytes()).sum()
}

/// Elements of f32 that a token takes beside its hidden state while a layer runs over it in host memory, at the moment
/// that takes most. Outputs are written in place; an operand is counted as f32, which with bf16 it is not.
fn activations_on_host(spec: &Spec) -> usize {
    let hidden = spec.hidden;
    let of_block = |block: &BlockSpec| {
        let attention = &block.attention;
        let (queries, keys) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        // Normed input and its operand beside what is projected; then that beside what is attended to.
        let attention = (2 * hidden + queries + 2 * keys).max(2 * queries + 2 * keys);
        let ffn = match &block.ffn {
            // Normed input and its operand beside gate and up; or the inner results, their operand and the output.
            FfnSpec::Gated(gated) => 2 * gated.width + 2 * hidden,
            // Normed input and sum; of each expert at once, inputs and their operand beside gate and up.
            FfnSpec::Moe { top_k, experts, .. } => {
                let width = experts.first().map_or(0, |expert| expert.width);
                2 * hidden + (*top_k).min(EXPERTS_AT_ONCE) * (2 * hidden + 2 * width)
            }
        };
        attention.max(ffn)
    };
    spec.blocks.iter().map(of_block).max().unwrap_or(0)
}

/// Elements of f32 that a token takes beside its hidden state while a layer runs over it on a device of its own, at the
/// moment that takes most. An operand is counted as f32, which with bf16 it is not; that leaves room for one in another
/// order of columns.
fn activations(spec: &Spec) -> usize {
    let hidden = spec.hidden;
    let of_block = |block: &BlockSpec| {
        let attention = &block.attention;
        let (queries, keys) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        // Normed input and its operand beside what is projected; then that beside keys and values of the attention's own
        // and what is attended to.
        let attention = (2 * hidden + queries + 2 * keys).max(2 * queries + 4 * keys);
        let ffn = match &block.ffn {
            // Normed input and its operand beside gate and up; or these and the operand that is made of both.
            FfnSpec::Gated(gated) => 3 * gated.width + 2 * hidden,
            FfnSpec::Moe { .. } => return activations_shared(spec),
        };
        attention.max(ffn)
    };
    spec.blocks.iter().map(of_block).max().unwrap_or(0)
}

/// The same on each of several devices that share a layer: normed input, prepared operand, and the widest intermediate
/// results. Gathered outputs exist twice for a moment, once in blocks and once in place.
fn activations_shared(spec: &Spec) -> usize {
    let widest = spec.blocks.iter().map(|block| {
        let attention = &block.attention;
        let projections = (2 * attention.heads + 2 * attention.kv_heads) * attention.head_dim;
        let ffn = match &block.ffn {
            FfnSpec::Gated(gated) => 4 * gated.width,
            FfnSpec::Moe { top_k, experts, .. } => {
                // Of each expert that it goes to, a token has a copy, its operand and the inner results at once.
                let copies = (*top_k).min(EXPERTS_AT_ONCE);
                spec.hidden + copies * (spec.hidden + 2 * experts.first().map_or(0, |expert| expert.width))
            }
        };
        2 * projections.max(ffn)
    });
    4 * spec.hidden + widest.max().unwrap_or(0)
}
