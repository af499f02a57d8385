//! The tiled container: geometry of the tiles, the manifest, reading and writing, and the [`LayerSource`] trait
//! that hands packed parts of a model to a runtime.
//!
//! Integers and bytes only: nothing here knows what a code or a scale is worth, nor how a checkpoint stores them.
//!
//! A container is a directory: `ctq.json` ([`Manifest`]), one safetensors file per part, and copies of the
//! checkpoint's configuration and tokenizer. `ctq.json` appears last, by a rename, so a directory that has one is
//! whole; while a conversion is under way there is `ctq.progress` instead (see [`Writer`]). Read with [`Container`].
#![deny(clippy::float_arithmetic)]

mod bytes;
mod container;
mod digest;
mod early_file;
mod error;
mod fragments;
mod geometry;
mod journal;
mod manifest;
mod output;
mod part_file;
mod part_metadata;
mod part_writer;
mod sixteen;
mod source;
mod streamed;
mod tiled;
mod tiling;
mod writer;

pub use bytes::Bytes;
pub use container::Container;
pub use digest::{Digest, DigestWriter};
pub use error::{Error, ErrorKind, Result};
pub use geometry::MatrixRecord;
pub use manifest::{
    FileRecord, LeftOutRecord, MANIFEST, Manifest, Origin, PartRecord, SourceFile, SourceRecord,
    TensorRecord, part_file_name,
};
pub use output::{Overwrite, check_space};
pub use part_file::PartFile;
pub use part_metadata::{ALIGNMENT, Exception};
pub use part_writer::PartContents;
pub use source::{LayerSource, PartTiles, RawVector, SourceError};
pub use streamed::{PartTensor, StreamedMatrix, TensorDigest, TileCodes};
pub use tiled::{ScaleTable, TiledMatrix};
pub use tiling::{TILE, Tiling};
pub use writer::{Plan, Writer, WrittenPart};
