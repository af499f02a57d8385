//! The CPU backend: panels of packed weights decoded block by block, then a register-blocked kernel over all rows.
//!
//! The portable scalar arithmetic is the definition; wider instruction sets run the same source and give the same
//! bits, because lanes run across outputs and never along a sum.

pub(crate) mod attend;
pub(crate) mod elementwise;
mod exact;
mod exponential;
pub(crate) mod head;
mod isa;
mod line;
pub(crate) mod linear;
pub(crate) mod math;
pub(crate) mod matrix;
pub mod peak;
pub(crate) mod product;
pub(crate) mod quantize;
mod recycle;
pub(crate) mod row_tiles;
pub(crate) mod weights;

use std::ops::Range;

use ctq_container::TiledMatrix;

pub use self::isa::Isa;
pub use self::matrix::CpuMatrix;
pub use self::quantize::CpuOperand;

use crate::backend::{
    AttentionShape, Backend, BackendIdentity, HeadTiles, KernelError, Pieces, Quantizer, Span, Treatment,
};
use crate::route::{self, ExpertTokens, Renormalize};
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

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        recycle::FLOATS.give(std::mem::take(&mut self.values));
    }
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
    type Watch = Option<usize>;

    fn identity(&self) -> BackendIdentity {
        BackendIdentity { name: "cpu".to_owned(), isa: self.isa.name().to_owned() }
    }

    fn matrix(
        &self,
        matrix: &TiledMatrix,
        rows: Range<usize>,
        _pieces: Pieces,
    ) -> Result<CpuMatrix, KernelError> {
        Ok(CpuMatrix::new(matrix, rows))
    }

    fn rows(&self, matrix: &CpuMatrix) -> usize {
        matrix.rows.len()
    }

    fn elements(&self, buffer: &CpuBuffer) -> usize {
        buffer.values.len()
    }

    fn upload(&self, width: usize, values: &[f32]) -> Result<CpuBuffer, KernelError> {
        let mut copy = recycle::FLOATS.take(values.len());
        copy.copy_from_slice(values);
        Ok(CpuBuffer { width, values: copy })
    }

    fn zeros(&self, rows: usize, width: usize) -> Result<CpuBuffer, KernelError> {
        let mut values = recycle::FLOATS.take(rows * width);
        values.fill(0.0);
        Ok(CpuBuffer { width, values })
    }

    fn download(&self, buffer: &CpuBuffer) -> Result<Vec<f32>, KernelError> {
        Ok(buffer.values.clone())
    }

    fn embed(&self, table: &CpuMatrix, ids: &[u32]) -> Result<CpuBuffer, KernelError> {
        Ok(weights::rows(self.isa, table, ids))
    }

    fn norm(&self, x: &CpuBuffer, weight: &[f32], epsilon: f32) -> Result<CpuBuffer, KernelError> {
        Ok(elementwise::norm(self.isa, x, weight, epsilon))
    }

    fn prepare(
        &self,
        x: &CpuBuffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<CpuOperand, KernelError> {
        Ok(quantize::prepare(self.isa, x, treatment, compute, windows))
    }

    fn linear(
        &self,
        x: &CpuOperand,
        weight: &CpuMatrix,
        bias: Option<&[f32]>,
        _compute: Compute,
    ) -> Result<CpuBuffer, KernelError> {
        let mut y = linear::linear(self.isa, x, weight, weight.rows.clone())?;
        if let Some(bias) = bias {
            elementwise::add_bias(self.isa, &mut y, &bias[weight.rows.clone()]);
        }
        Ok(y)
    }

    fn fake_quantize(
        &self,
        x: &mut CpuBuffer,
        quantizer: &Quantizer,
        head_dim: usize,
        windows: &[Range<usize>],
    ) -> Result<(), KernelError> {
        quantize::fake_quantize(self.isa, x, quantizer, head_dim, windows);
        Ok(())
    }

    fn rotate(&self, x: &mut CpuBuffer, rotation: &Rotation, spans: &[Span]) -> Result<(), KernelError> {
        elementwise::rotate(self.isa, x, rotation, spans);
        Ok(())
    }

    fn attend(
        &self,
        q: &CpuBuffer,
        k: &CpuBuffer,
        v: &CpuBuffer,
        shape: &AttentionShape,
        heads: Range<usize>,
        compute: Compute,
        queries: &[Span],
        windows: &[Range<usize>],
    ) -> Result<CpuBuffer, KernelError> {
        Ok(attend::attend(self.isa, [q, k, v], shape, heads, compute, queries, windows))
    }

    fn gate(&self, gate: CpuBuffer, up: &CpuBuffer) -> Result<CpuBuffer, KernelError> {
        Ok(elementwise::gate(self.isa, gate, up))
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer) -> Result<(), KernelError> {
        elementwise::add(self.isa, x, y);
        Ok(())
    }

    fn watch(&self, x: &CpuBuffer) -> Result<Option<usize>, KernelError> {
        Ok(elementwise::first_non_finite(self.isa, x))
    }

    fn seen(&self, watch: Option<usize>) -> Result<Option<usize>, KernelError> {
        Ok(watch)
    }

    fn route(
        &self,
        logits: &CpuBuffer,
        top_k: usize,
        renormalize: Renormalize,
    ) -> Result<Vec<ExpertTokens>, KernelError> {
        Ok(route::route(&logits.values, logits.width, top_k, renormalize))
    }

    fn gather(&self, x: &CpuBuffer, rows: &[u32]) -> Result<CpuBuffer, KernelError> {
        Ok(elementwise::gather(x, rows))
    }

    fn scatter_add(
        &self,
        x: &mut CpuBuffer,
        y: &CpuBuffer,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<(), KernelError> {
        elementwise::scatter_add(self.isa, x, y, rows, weights);
        Ok(())
    }

    fn concatenate(&self, parts: &[&CpuBuffer]) -> Result<CpuBuffer, KernelError> {
        Ok(elementwise::concatenate(parts))
    }

    fn head(
        &self,
        x: &CpuOperand,
        head: &CpuMatrix,
        vocabulary: Range<usize>,
        targets: &[Option<u32>],
        _compute: Compute,
    ) -> Result<HeadTiles, KernelError> {
        head::head(self.isa, x, head, vocabulary, targets)
    }
}
