//! Hidden states of one batch between two layers: on the device, or in host memory until the next.

use ctq_kernels::Backend;

use crate::error::Result;
use crate::schedule::HiddenPlace;

/// Hidden states of a batch, [rows, width].
pub(crate) enum Hidden<B: Backend> {
    Device(B::Buffer),
    Host { width: usize, values: Vec<f32> },
}

impl<B: Backend> Hidden<B> {
    /// Puts what a layer has left on the device to where it waits.
    pub(crate) fn put(backend: &B, width: usize, buffer: B::Buffer, place: HiddenPlace) -> Result<Hidden<B>> {
        Ok(match place {
            HiddenPlace::Device => Hidden::Device(buffer),
            HiddenPlace::Host => Hidden::Host { width, values: backend.download(&buffer)? },
        })
    }

    /// Changes the states on the device.
    pub(crate) fn update(
        &mut self,
        backend: &B,
        change: impl FnOnce(&mut B::Buffer) -> Result<()>,
    ) -> Result<()> {
        match self {
            Hidden::Device(buffer) => change(buffer),
            Hidden::Host { width, values } => {
                let mut buffer = backend.upload(*width, values)?;
                change(&mut buffer)?;
                *values = backend.download(&buffer)?;
                Ok(())
            }
        }
    }

    /// Shows the states on the device.
    pub(crate) fn look(&self, backend: &B, look: impl FnOnce(&B::Buffer) -> Result<()>) -> Result<()> {
        match self {
            Hidden::Device(buffer) => look(buffer),
            Hidden::Host { width, values } => look(&backend.upload(*width, values)?),
        }
    }

    /// The states on the device, for good.
    pub(crate) fn into_buffer(self, backend: &B) -> Result<B::Buffer> {
        match self {
            Hidden::Device(buffer) => Ok(buffer),
            Hidden::Host { width, values } => Ok(backend.upload(width, &values)?),
        }
    }

    /// Appends the states, row-major, to `all`.
    pub(crate) fn append_to(&self, backend: &B, all: &mut Vec<f32>) -> Result<()> {
        match self {
            Hidden::Device(buffer) => all.extend(backend.download(buffer)?),
            Hidden::Host { values, .. } => all.extend_from_slice(values),
        }
        Ok(())
    }
}
