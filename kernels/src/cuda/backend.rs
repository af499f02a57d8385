//! The [`Backend`] of a CUDA device: which file does what.

use std::ops::Range;

use ctq_container::TiledMatrix;

use crate::backend::{
    AttentionShape, Backend, BackendIdentity, GatePair, HeadTiles, KernelError, Pieces, Quantizer, Span,
    Treatment,
};
use crate::cuda::buffer::{CudaBuffer, CudaOperand};
use crate::cuda::elementwise::CudaWatch;
use crate::cuda::matrix::CudaMatrix;
use crate::cuda::{
    Cuda, Device, attend, decode, elementwise, head, linear, norm, quantize, rotate, route, rows,
};
use crate::route::{ExpertTokens, Renormalize};
use crate::{Compute, Rotation, composed};

impl<D: Device> Backend for Cuda<D> {
    type Matrix = CudaMatrix<D::Memory>;
    type Buffer = CudaBuffer<D::Memory>;
    type Operand = CudaOperand<D::Memory>;
    type Watch = CudaWatch<D::Parcel>;

    fn identity(&self) -> BackendIdentity {
        let mut identity = self.device().identity();
        if let Some(path) = self.linears {
            identity.isa += &format!(", linears by {path}");
        }
        if let Some(path) = self.attention {
            identity.isa += &format!(", attention by {path}");
        }
        identity
    }

    fn matrix(
        &self,
        matrix: &TiledMatrix,
        rows: Range<usize>,
        _pieces: Pieces,
    ) -> Result<Self::Matrix, KernelError> {
        CudaMatrix::upload(self.device(), matrix, rows)
    }

    fn rows(&self, matrix: &Self::Matrix) -> usize {
        matrix.rows.len()
    }

    fn elements(&self, buffer: &Self::Buffer) -> usize {
        buffer.len()
    }

    fn upload(&self, width: usize, values: &[f32]) -> Result<Self::Buffer, KernelError> {
        CudaBuffer::upload(self.device(), width, values)
    }

    fn zeros(&self, rows: usize, width: usize) -> Result<Self::Buffer, KernelError> {
        elementwise::zeros(self.device(), rows, width)
    }

    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<f32>, KernelError> {
        buffer.download(self.device())
    }

    fn embed(&self, table: &Self::Matrix, ids: &[u32]) -> Result<Self::Buffer, KernelError> {
        decode::rows(self.device(), table, ids)
    }

    fn norm(&self, x: &Self::Buffer, weight: &[f32], epsilon: f32) -> Result<Self::Buffer, KernelError> {
        norm::norm(self.device(), x, weight, epsilon)
    }

    fn prepare(
        &self,
        x: &Self::Buffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError> {
        quantize::prepare(self.device(), x, treatment, self.preparing(compute), windows)
    }

    fn norm_operand(
        &self,
        x: &Self::Buffer,
        weight: &[f32],
        epsilon: f32,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<(Self::Operand, Self::Watch), KernelError> {
        rows::normed_operand(self.device(), x, (weight, epsilon), treatment, self.preparing(compute), windows)
    }

    fn gate_operand(
        &self,
        gate: Self::Buffer,
        up: &Self::Buffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError> {
        rows::gated_operand(self.device(), gate, up, treatment, self.preparing(compute), windows)
    }

    fn linear(
        &self,
        x: &Self::Operand,
        weight: &Self::Matrix,
        bias: Option<&[f32]>,
        compute: Compute,
    ) -> Result<Self::Buffer, KernelError> {
        linear::linear(self, x, weight, bias_of(weight, bias), compute)
    }

    fn linear_add(
        &self,
        sum: &mut Self::Buffer,
        x: &Self::Operand,
        weight: &Self::Matrix,
        bias: Option<&[f32]>,
        compute: Compute,
    ) -> Result<(), KernelError> {
        linear::linear_add(self, sum, x, weight, bias_of(weight, bias), compute)
    }

    fn gated(
        &self,
        x: &Self::Operand,
        pair: GatePair<'_, Self::Matrix>,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand, KernelError> {
        if matches!(treatment, Treatment::Plain)
            && compute == Compute::Bf16
            && let Some(operand) = linear::gated(self, x, pair)?
        {
            return Ok(operand);
        }
        composed::gated(self, x, pair, treatment, compute, windows)
    }

    fn linear_experts(
        &self,
        x: &[&Self::Operand],
        weights: &[&Self::Matrix],
        biases: &[Option<&[f32]>],
        compute: Compute,
    ) -> Result<Vec<Self::Buffer>, KernelError> {
        let biases: Vec<Option<&[f32]>> =
            weights.iter().zip(biases).map(|(weight, bias)| bias_of(weight, *bias)).collect();
        linear::linear_experts(self, x, weights, &biases, compute)
    }

    fn fake_quantize(
        &self,
        x: &mut Self::Buffer,
        quantizer: &Quantizer,
        head_dim: usize,
        windows: &[Range<usize>],
    ) -> Result<(), KernelError> {
        quantize::fake_quantize(self.device(), x, quantizer, head_dim, windows)
    }

    fn rotate(&self, x: &mut Self::Buffer, rotation: &Rotation, spans: &[Span]) -> Result<(), KernelError> {
        rotate::rotate(self, x, rotation, spans)
    }

    fn attend(
        &self,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        shape: &AttentionShape,
        heads: Range<usize>,
        compute: Compute,
        queries: &[Span],
        windows: &[Range<usize>],
    ) -> Result<Self::Buffer, KernelError> {
        let asked = attend::Asked { queries, windows };
        attend::attend(self.device(), [q, k, v], shape, heads, compute, self.attention, asked)
    }

    fn gate(&self, gate: Self::Buffer, up: &Self::Buffer) -> Result<Self::Buffer, KernelError> {
        elementwise::gate(self.device(), gate, up)
    }

    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<(), KernelError> {
        elementwise::add(self.device(), x, y)
    }

    fn watch(&self, x: &Self::Buffer) -> Result<Self::Watch, KernelError> {
        elementwise::watch(self.device(), x)
    }

    fn seen(&self, watch: Self::Watch) -> Result<Option<usize>, KernelError> {
        elementwise::seen(self.device(), watch)
    }

    fn gather(&self, x: &Self::Buffer, rows: &[u32]) -> Result<Self::Buffer, KernelError> {
        elementwise::gather(self.device(), x, rows)
    }

    fn scatter_add(
        &self,
        x: &mut Self::Buffer,
        y: &Self::Buffer,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<(), KernelError> {
        elementwise::scatter_add(self.device(), x, y, rows, weights)
    }

    fn concatenate(&self, parts: &[&Self::Buffer]) -> Result<Self::Buffer, KernelError> {
        elementwise::concatenate(self.device(), parts)
    }

    fn route(
        &self,
        logits: &Self::Buffer,
        top_k: usize,
        renormalize: Renormalize,
    ) -> Result<Vec<ExpertTokens>, KernelError> {
        route::route(self.device(), logits, top_k, renormalize)
    }

    fn head(
        &self,
        x: &Self::Operand,
        head: &Self::Matrix,
        vocabulary: Range<usize>,
        targets: &[Option<u32>],
        _compute: Compute,
    ) -> Result<HeadTiles, KernelError> {
        head::head(self, x, head, vocabulary, targets)
    }
}

/// The part of a whole matrix's bias that belongs to the rows that are here.
fn bias_of<'b, M>(weight: &CudaMatrix<M>, bias: Option<&'b [f32]>) -> Option<&'b [f32]> {
    bias.map(|bias| &bias[weight.rows.clone()])
}
