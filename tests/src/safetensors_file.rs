//! A safetensors file as a test reads it: whole, by name, as f32 or as token ids.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

/// A file in memory.
#[derive(Clone, Debug)]
pub struct SafetensorsFile {
    bytes: Vec<u8>,
}

impl SafetensorsFile {
    /// Reads a file.
    ///
    /// # Panics
    /// If there is none.
    pub fn read(path: &Path) -> SafetensorsFile {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        SafetensorsFile { bytes }
    }

    /// All tensors.
    ///
    /// # Panics
    /// If it is no safetensors file.
    pub fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("safetensors")
    }

    /// A tensor as f32, exactly; `None` where there is none of that name.
    ///
    /// # Panics
    /// If it is neither BF16, F16 nor F32.
    pub fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).ok()?;
        let data = tensor.data();
        Some(match tensor.dtype() {
            Dtype::F32 => {
                data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            Dtype::BF16 => {
                data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            Dtype::F16 => {
                data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            other => panic!("{name} is {other:?}"),
        })
    }

    /// An F64 tensor; `None` where there is none of that name.
    ///
    /// # Panics
    /// If it is of another type.
    pub fn doubles(&self, name: &str) -> Option<Vec<f64>> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), Dtype::F64, "{name}");
        let double = |b: &[u8]| f64::from_le_bytes(b.try_into().expect("eight bytes"));
        Some(tensor.data().chunks_exact(8).map(double).collect())
    }

    /// Shape of a tensor.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors().tensor(name).expect("a tensor of that name").shape().to_vec()
    }

    /// `input_ids` [B, S] I64 as rows.
    ///
    /// # Panics
    /// If there are none.
    pub fn input_ids(&self) -> Vec<Vec<u32>> {
        let tensors = self.tensors();
        let ids = tensors.tensor("input_ids").expect("input_ids");
        assert_eq!(ids.dtype(), Dtype::I64);
        let id = |b: &[u8]| i64::from_le_bytes(b.try_into().expect("eight bytes")) as u32;
        let ids_of = |row: &[u8]| row.chunks_exact(8).map(id).collect();
        ids.data().chunks_exact(8 * ids.shape()[1]).map(ids_of).collect()
    }
}
