//! Weights, bit for bit: what the runtime multiplies with against what the reference unpacks.

use ctq_model::Inventory;
use ctq_model::inventory::Part;
use ctq_reference::Reference;
use ctq_runtime::Lockstep;
use serde::Serialize;

use crate::{Error, Result};

/// Outcome of comparing every weight of some parts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct OperandReport {
    /// Matrices compared.
    pub matrices: usize,
    /// Weights compared.
    pub weights: u64,
    /// Weights whose bits differ.
    pub differing: u64,
    /// The first of them.
    pub first: Option<OperandMismatch>,
}

/// One weight on which the two sides disagree.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OperandMismatch {
    /// Module.
    pub module: String,
    /// Output row.
    pub row: usize,
    /// Input.
    pub k: usize,
    /// What the runtime multiplies with.
    pub runtime: f32,
    /// What the reference unpacks.
    pub reference: f32,
}

impl OperandReport {
    /// True where no bit differs.
    pub fn passed(&self) -> bool {
        self.differing == 0
    }
}

/// Compares the operand bits of every matrix of `parts`. `advance` is called after each matrix; false stops.
///
/// # Errors
/// Where either side cannot read a weight, or `advance` asks to stop.
pub fn check_operands(
    runtime: &dyn Lockstep,
    reference: &Reference<'_>,
    inventory: &Inventory,
    parts: &[Part],
    mut advance: impl FnMut() -> bool,
) -> Result<OperandReport> {
    let mut report = OperandReport::default();
    for part in parts {
        for linear in &inventory.part(*part).linears {
            let expected = reference.weight(&linear.module)?.values;
            let found = runtime.operands(*part, &linear.module)?;
            report.matrices += 1;
            report.weights += expected.len() as u64;
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                if found.to_bits() != expected.to_bits() {
                    report.differing += 1;
                    report.first.get_or_insert_with(|| OperandMismatch {
                        module: linear.module.clone(),
                        row: index / linear.k,
                        k: index % linear.k,
                        runtime: *found,
                        reference: *expected,
                    });
                }
            }
            if !advance() {
                return Err(Error::Interrupted);
            }
        }
    }
    Ok(report)
}
