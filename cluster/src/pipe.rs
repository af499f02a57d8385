//! Hidden states on their way from one rank to another: one group of windows waits, the next one is not sent.

use std::sync::{Arc, Mutex, PoisonError};

use ctq_kernels::KernelError;
use ctq_kernels::collective::Pipe;

use crate::mesh::{Mesh, UNFINISHED};

/// Kinds of channel, in the upper half of a tag.
const GROUPS: u32 = 2 << 16;
const TAKEN: u32 = 3 << 16;

/// The end of a pipe that sends.
#[derive(Debug)]
pub struct PipeTo {
    mesh: Arc<Mesh>,
    to: usize,
    tag: u16,
    /// Whether a group is under way that was not taken.
    under_way: Mutex<bool>,
}

/// The end of a pipe that receives.
#[derive(Debug)]
pub struct PipeFrom {
    mesh: Arc<Mesh>,
    from: usize,
    tag: u16,
}

impl PipeTo {
    pub(crate) fn new(mesh: Arc<Mesh>, to: usize, tag: u16) -> PipeTo {
        PipeTo { mesh, to, tag, under_way: Mutex::new(false) }
    }
}

impl PipeFrom {
    pub(crate) fn new(mesh: Arc<Mesh>, from: usize, tag: u16) -> PipeFrom {
        PipeFrom { mesh, from, tag }
    }
}

impl Pipe for PipeTo {
    fn send(&self, hidden: Vec<f32>) -> Result<(), KernelError> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if *under_way {
            self.mesh.receive(self.to, TAKEN | u32::from(self.tag))?;
            *under_way = false;
        }
        self.mesh.send(self.to, GROUPS | u32::from(self.tag), to_bytes(&hidden))?;
        *under_way = true;
        Ok(())
    }

    /// Nothing comes at this end.
    fn receive(&self) -> Result<Vec<f32>, KernelError> {
        let what =
            format!("nothing is received from the end of a pipe to {}; report this", self.mesh.name(self.to));
        Err(KernelError::Lost { what })
    }

    fn abort(&self, reason: &str) {
        self.mesh.abort(reason, UNFINISHED);
    }
}

impl Pipe for PipeFrom {
    /// Nothing goes out at this end.
    fn send(&self, _hidden: Vec<f32>) -> Result<(), KernelError> {
        let what =
            format!("nothing is sent into the end of a pipe from {}; report this", self.mesh.name(self.from));
        Err(KernelError::Lost { what })
    }

    fn receive(&self) -> Result<Vec<f32>, KernelError> {
        let bytes = self.mesh.receive(self.from, GROUPS | u32::from(self.tag))?;
        self.mesh.acknowledge(self.from, TAKEN | u32::from(self.tag));
        Ok(from_bytes(&bytes))
    }

    fn abort(&self, reason: &str) {
        self.mesh.abort(reason, UNFINISHED);
    }
}

/// Little-endian, bit for bit.
pub(crate) fn to_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * 4];
    for (chunk, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *chunk = value.to_le_bytes();
    }
    bytes
}

/// The values of [`to_bytes`].
pub(crate) fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
}
