//! The CPU as a device with little room: linears of too many rows fail, as an allocation on a full device does.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ctq_container::TiledMatrix;
use ctq_kernels::cpu::{Cpu, CpuBuffer, CpuMatrix, CpuOperand};
use ctq_kernels::{
    AttentionShape, Backend, BackendIdentity, Compute, ExpertTokens, HeadTiles, KernelError, Pieces,
    Quantizer, Renormalize, Rotation, Span, Treatment,
};

/// What an allocation that fails asks for.
pub const WANTED: u64 = 12_345;

/// A CPU that has room for linears of so many rows.
#[derive(Clone, Debug)]
pub struct Cramped {
    cpu: Cpu,
    rows: Arc<AtomicUsize>,
}

impl Cramped {
    /// Room for linears of `rows` rows.
    pub fn new(rows: usize) -> Cramped {
        Cramped { cpu: Cpu::detect(), rows: Arc::new(AtomicUsize::new(rows)) }
    }

    /// From now on there is room for `rows` rows.
    pub fn limit(&self, rows: usize) {
        self.rows.store(rows, Ordering::SeqCst);
    }
}

type Result<T> = std::result::Result<T, KernelError>;

impl Backend for Cramped {
    type Matrix = CpuMatrix;
    type Buffer = CpuBuffer;
    /// Rows, and what the CPU makes of them.
    type Operand = (usize, CpuOperand);
    type Watch = Option<usize>;

    fn identity(&self) -> BackendIdentity {
        self.cpu.identity()
    }

    fn matrix(&self, matrix: &TiledMatrix, rows: Range<usize>, pieces: Pieces) -> Result<CpuMatrix> {
        self.cpu.matrix(matrix, rows, pieces)
    }

    fn rows(&self, matrix: &CpuMatrix) -> usize {
        self.cpu.rows(matrix)
    }

    fn elements(&self, buffer: &CpuBuffer) -> usize {
        self.cpu.elements(buffer)
    }

    fn zeros(&self, rows: usize, width: usize) -> Result<CpuBuffer> {
        self.cpu.zeros(rows, width)
    }

    fn upload(&self, width: usize, values: &[f32]) -> Result<CpuBuffer> {
        self.cpu.upload(width, values)
    }

    fn download(&self, buffer: &CpuBuffer) -> Result<Vec<f32>> {
        self.cpu.download(buffer)
    }

    fn embed(&self, table: &CpuMatrix, ids: &[u32]) -> Result<CpuBuffer> {
        self.cpu.embed(table, ids)
    }

    fn norm(&self, x: &CpuBuffer, weight: &[f32], epsilon: f32) -> Result<CpuBuffer> {
        self.cpu.norm(x, weight, epsilon)
    }

    fn prepare(
        &self,
        x: &CpuBuffer,
        treatment: &Treatment,
        compute: Compute,
        windows: &[Range<usize>],
    ) -> Result<Self::Operand> {
        let rows = windows.last().map_or(0, |window| window.end);
        Ok((rows, self.cpu.prepare(x, treatment, compute, windows)?))
    }

    fn linear(
        &self,
        (rows, x): &Self::Operand,
        weight: &CpuMatrix,
        bias: Option<&[f32]>,
        compute: Compute,
    ) -> Result<CpuBuffer> {
        if *rows > self.rows.load(Ordering::SeqCst) {
            return Err(KernelError::OutOfMemory { device: "cramped".to_owned(), wanted: WANTED });
        }
        self.cpu.linear(x, weight, bias, compute)
    }

    fn fake_quantize(
        &self,
        x: &mut CpuBuffer,
        quantizer: &Quantizer,
        head_dim: usize,
        windows: &[Range<usize>],
    ) -> Result<()> {
        self.cpu.fake_quantize(x, quantizer, head_dim, windows)
    }

    fn rotate(&self, x: &mut CpuBuffer, rotation: &Rotation, spans: &[Span]) -> Result<()> {
        self.cpu.rotate(x, rotation, spans)
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
    ) -> Result<CpuBuffer> {
        self.cpu.attend(q, k, v, shape, heads, compute, queries, windows)
    }

    fn gate(&self, gate: CpuBuffer, up: &CpuBuffer) -> Result<CpuBuffer> {
        self.cpu.gate(gate, up)
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer) -> Result<()> {
        self.cpu.add(x, y)
    }

    fn watch(&self, x: &CpuBuffer) -> Result<Option<usize>> {
        self.cpu.watch(x)
    }

    fn seen(&self, watch: Option<usize>) -> Result<Option<usize>> {
        self.cpu.seen(watch)
    }

    fn route(&self, logits: &CpuBuffer, top_k: usize, renormalize: Renormalize) -> Result<Vec<ExpertTokens>> {
        self.cpu.route(logits, top_k, renormalize)
    }

    fn gather(&self, x: &CpuBuffer, rows: &[u32]) -> Result<CpuBuffer> {
        self.cpu.gather(x, rows)
    }

    fn scatter_add(&self, x: &mut CpuBuffer, y: &CpuBuffer, rows: &[u32], weights: &[f32]) -> Result<()> {
        self.cpu.scatter_add(x, y, rows, weights)
    }

    fn concatenate(&self, parts: &[&CpuBuffer]) -> Result<CpuBuffer> {
        self.cpu.concatenate(parts)
    }

    fn head(
        &self,
        (_, x): &Self::Operand,
        head: &CpuMatrix,
        vocabulary: Range<usize>,
        targets: &[Option<u32>],
        compute: Compute,
    ) -> Result<HeadTiles> {
        self.cpu.head(x, head, vocabulary, targets, compute)
    }
}
