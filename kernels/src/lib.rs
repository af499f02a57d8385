//! The operations of a transformer on packed weights, once per backend.
//!
//! [`Backend`] is the trait: about twenty coarse operations over opaque buffers. [`cpu::Cpu`] is the backend that is
//! always there and whose scalar arithmetic is the definition; [`Rank`](collective::Rank) is a backend among others that
//! share a model, which is all that tensor parallelism is. Every formula and rounding point is written down in NUMERICS.md.
//!
//! Knows tiles, shapes and arithmetic; knows neither models nor files.

mod backend;
pub mod bench;
pub mod check;
pub mod collective;
mod composed;
pub mod cpu;
pub mod cuda;
mod error;
mod exact_product;
mod numerics;
mod peers;
mod random;
mod rotation;
mod route;

pub use backend::{
    AttentionShape, Backend, BackendIdentity, GatePair, HeadTiles, KernelError, Pieces, Quantizer, Span,
    Treatment, VOCABULARY_TILE,
};
pub use numerics::{Compute, NUMERICS_REVISION};
pub use rotation::Rotation;
pub use route::{ExpertTokens, Renormalize};
