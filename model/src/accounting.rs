//! Bits per weight, counted from stored bytes in the conventions people quote, side by side.
//!
//! * `layer`, `head`: ExLlamaV3's (`eval/qbench`): stored bits of every matrix outside embedding and head (codes,
//!   scales, zero points, shapes, group indices and global scales; routers, norms and biases not), over its
//!   elements; the head alone, or the embedding standing in for a tied one.
//! * `file`: all tensor bytes of the checkpoint over all matrix elements.
//! * `container`: all tensor bytes of the container over the same elements.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::inventory::{Inventory, Linear, LinearClass};
use crate::{Result, TensorSource};

/// Stored bits over weights; the quotient is taken only to be shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bits {
    /// Stored bits.
    pub bits: u64,
    /// Weights they stand for.
    pub weights: u64,
}

impl Bits {
    /// Bits per weight; 0 for no weights.
    pub fn per_weight(self) -> f64 {
        if self.weights == 0 { 0.0 } else { self.bits as f64 / self.weights as f64 }
    }

    fn add(&mut self, other: Bits) {
        self.bits += other.bits;
        self.weights += other.weights;
    }
}

/// The accounting of one checkpoint, and of the container made from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounting {
    /// Matrices of the decoder.
    pub layer: Bits,
    /// The head, or the embedding in its place.
    pub head: Bits,
    /// All tensor bytes of the checkpoint's text model.
    pub file: Bits,
    /// All tile bytes of the container; `None` where there is no container.
    pub container: Option<Bits>,
    /// Each class of matrices.
    pub classes: BTreeMap<LinearClass, Bits>,
}

impl Accounting {
    /// Counts a checkpoint.
    ///
    /// # Errors
    /// None of its own; passes on those of `source`.
    pub fn of(source: &dyn TensorSource, inventory: &Inventory) -> Result<Accounting> {
        let mut accounting = Accounting::default();
        for linear in inventory.linears() {
            let bits = matrix_bits(source, linear);
            accounting.classes.entry(linear.class).or_default().add(bits);
            match linear.class {
                LinearClass::Attention | LinearClass::Ffn | LinearClass::Expert => accounting.layer.add(bits),
                LinearClass::Head => accounting.head = bits,
                LinearClass::Embedding if inventory.spec.tied() => accounting.head = bits,
                LinearClass::Embedding | LinearClass::Router => {}
            }
            accounting.file.weights += bits.weights;
        }
        for (_, part) in inventory.parts() {
            for name in &part.tensors {
                accounting.file.bits += source.info(name).map_or(0, |info| info.bytes() * 8);
            }
        }
        Ok(accounting)
    }

    /// Memory of layers and head in GiB, by ExLlamaV3's convention.
    pub fn vram_gb(&self) -> f64 {
        (self.layer.bits + self.head.bits) as f64 / 8.0 / (1_u64 << 30) as f64
    }
}

/// Stored bits of one matrix by ExLlamaV3's `eval/qbench/engines.py`: the tensors that it lists there.
fn matrix_bits(source: &dyn TensorSource, linear: &Linear) -> Bits {
    const WITH_WEIGHT: &[&str] = &["weight", "weight_scale", "input_scale", "input_global_scale"];
    const WITH_PACKED: &[&str] = &[
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
        "input_global_scale",
    ];
    let plain = source.info(&format!("{}.weight", linear.module)).is_some();
    let leaves = if plain { WITH_WEIGHT } else { WITH_PACKED };
    let bytes: u64 = leaves
        .iter()
        .filter_map(|leaf| source.info(&format!("{}.{leaf}", linear.module)))
        .map(|info| info.bytes())
        .sum();
    Bits { bits: bytes * 8, weights: linear.n as u64 * linear.k as u64 }
}
