//! What a quantized checkpoint says: its files, names, shapes, schemes and architecture.
//!
//! This crate is the waist of the house: plain data that every other room passes around. It reads bytes and JSON,
//! checks that they agree with one another, and gives things their names. It computes nothing with the numbers
//! inside a tensor, and it knows neither tiles, kernels nor protocols.
//!
//! The way through it:
//! [`Checkpoint`] (files) and [`config::ModelConfig`] (`config.json`) give a [`Spec`] (the model as data) by way of
//! the table in [`families`]; [`quantization::QuantizationConfig`] gives every linear its [`scheme::Scheme`]; the
//! [`Inventory`] ties both together: each module of the text model with its shape, scheme and tensors.

pub mod accounting;
pub mod checkpoint;
pub mod config;
pub mod dtype;
mod error;
pub mod families;
pub mod inventory;
mod json;
pub mod matching;
pub mod matrix;
mod presets;
pub mod quantization;
mod resolve;
pub mod rope;
pub mod scheme;
mod shard;
pub mod spec;
pub mod window;

pub use checkpoint::{Checkpoint, Tensor, TensorSource};
pub use dtype::DType;
pub use error::{Error, Result};
pub use inventory::Inventory;
pub use matrix::QuantMatrix;
pub use scheme::Scheme;
pub use spec::Spec;
