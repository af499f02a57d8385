//! The CPU backend: panels of packed weights decoded block by block, then a register-blocked kernel over all rows.
//!
//! The portable scalar arithmetic is the definition; wider instruction sets run the same source and give the same
//! bits, because lanes run across outputs and never along a sum.

mod attend;
mod decode;
mod elementwise;
mod exact;
mod head;
mod isa;
mod linear;
mod math;
mod matrix;
mod panel;
mod quantize;
mod row_tiles;
mod vector;

use std::ops::Range;

use ctq_container::TiledMatrix;

pub use self::isa::Isa;
pub use self::matrix::CpuMatrix;
pub use self::quantize::CpuOperand;

use crate::backend::{
    AttentionShape, Backend, BackendIdentity, HeadTiles, KernelError, Pieces, Quantizer, Treatment,
};
use crate::{Compute, Rotation};

/// The CPU as a [`Backend`]. Work is spread over the rayon pool it is called in.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    isa: Isa,
}

/// Activations: [rows, width] row-major.
#[derive(Clone, Debug)]
pub struct CpuBuffer {
    pub(crate) width: usize,
    pub(crate) values: Vec<f32>,
}

impl CpuBuffer {
    pub(crate) fn rows(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }
}

impl Cpu {
    /// The widest instruction set that this machine has.
    pub fn detect() -> Cpu {
        Cpu { isa: Isa::detect() }
    }

    /// A given instruction set; `None` where this machine lacks it.
    pub fn with_isa(isa: Isa) -> Option<Cpu> {
        isa.available().then_some(Cpu { isa })
    }
}

impl Backend for Cpu {
    type Matrix = CpuMatrix;
    type Buffer = CpuBuffer;
    type Operand = CpuOperand;

    fn identity(&self) -> BackendIdentity {
        BackendIdentity { name: "cpu".to_owned(), isa: self.isa.name().to_owned() }
    }

    fn matrix(&self, matrix: &TiledMatrix, rows: Range<usize>, _pieces: Pieces) -> CpuMatrix {
        CpuMatrix::new(matrix, rows)
    }

    fn rows(&self, matrix: &CpuMatrix) -> usize {
        matrix.rows.len()
    }

    fn upload(&self, width: usize, values: &[f32]) -> CpuBuffer {
        CpuBuffer { width, values: values.to_vec() }
    }

    fn download(&self, buffer: &CpuBuffer) -> Vec<f32> {
        buffer.values.clone()
    }

    fn embed(&self, table: &CpuMatrix, ids: &[u32]) -> CpuBuffer {
        decode::rows(table, ids)
    }

    fn norm(&self, x: &CpuBuffer, weight: &[f32], epsilon: f32) -> CpuBuffer {
        elementwise::norm(x, weight, epsilon)
    }

    fn prepare(
        &self,
        x: &CpuBuffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> CpuOperand {
        quantize::prepare(x, treatment, compute, windows)
    }

    fn linear(
        &self,
        x: &CpuOperand,
        weight: &CpuMatrix,
        bias: Option<&[f32]>,
        compute: Compute,
    ) -> Result<CpuBuffer, KernelError> {
        let mut y = linear::linear(self.isa, x, weight, weight.rows.clone(), compute)?;
        if let Some(bias) = bias {
            elementwise::add_bias(&mut y, &bias[weight.rows.clone()]);
        }
        Ok(y)
    }

    fn fake_quantize(
        &self,
        x: &mut CpuBuffer,
        quantizer: &Quantizer,
        head_dim: usize,
        windows: &[Range<usize>],
    ) {
        quantize::fake_quantize(x, quantizer, head_dim, windows);
    }

    fn rotate(&self, x: &mut CpuBuffer, rotation: &Rotation, windows: &[Range<usize>]) {
        elementwise::rotate(x, rotation, windows);
    }

    fn attend(
        &self,
        q: &CpuBuffer,
        k: &CpuBuffer,
        v: &CpuBuffer,
        shape: &AttentionShape,
        heads: Range<usize>,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> CpuBuffer {
        attend::attend(self.isa, [q, k, v], shape, heads, compute, windows)
    }

    fn gate(&self, gate: &CpuBuffer, up: &CpuBuffer) -> CpuBuffer {
        elementwise::gate(gate, up)
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer) {
        elementwise::add(x, y);
    }

    fn first_non_finite(&self, x: &CpuBuffer) -> Option<usize> {
        elementwise::first_non_finite(x)
    }

    fn gather(&self, x: &CpuBuffer, rows: &[u32]) -> CpuBuffer {
        elementwise::gather(x, rows)
    }

    fn scatter_add(&self, x: &mut CpuBuffer, y: &CpuBuffer, rows: &[u32], weights: &[f32]) {
        elementwise::scatter_add(x, y, rows, weights);
    }

    fn concatenate(&self, parts: &[&CpuBuffer]) -> CpuBuffer {
        elementwise::concatenate(parts)
    }

    fn head(
        &self,
        x: &CpuOperand,
        head: &CpuMatrix,
        vocabulary: Range<usize>,
        targets: &[Option<u32>],
        compute: Compute,
    ) -> Result<HeadTiles, KernelError> {
        head::head(self.isa, x, head, vocabulary, targets, compute)
    }
}
