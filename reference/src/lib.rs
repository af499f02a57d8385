//! The oracle: a text model computed the plain way, from the tensors that the checkpoint stores.
//!
//! It exists to be held against the runtime, so it is written to be read beside the formulas rather than to be fast:
//! weights are unpacked one by one, products are f64, every formula stands once. It shares names and shapes with the
//! other rooms (`ctq-model`) and nothing that computes: it has its own unpacking, its own rounding, its own
//! activation quantization. It knows neither tiles, nor containers, nor kernels, nor protocols.
//!
//! What is exact and what is not:
//! * a decompressed weight ([`OperandMatrix`]) is bit for bit what compressed-tensors' own `decompress` yields;
//! * quantized activations follow compressed-tensors in f32, operation by operation ([`quantize`]);
//! * rotation angles and their cosines are rounded to f32 as transformers does ([`rope`]);
//! * everything else is f64. The order of the sums is that of a blocked product, so the last bits of an f64 may
//!   differ between instruction sets; nobody is promised them.
//!
//! The way through it: [`Reference::open`], [`Reference::embed`], [`Reference::layer`] once a block,
//! [`Reference::logits`], [`nll`].

mod activation;
mod attention;
mod codes;
mod error;
mod feed_forward;
mod linear;
mod norm;
mod number;
mod operand;
pub mod quantize;
mod reference;
pub mod rope;
mod scaling;
mod score;
mod stored;

pub use error::{Error, Result};
pub use operand::{OperandMatrix, decompress};
pub use reference::{Acts, Reference};
pub use score::nll;
