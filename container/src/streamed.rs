//! Parts on their way to a file: what is made while it is written, so that no part is ever in memory.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;

use ctq_model::DType;
use rayon::ThreadPool;

use crate::digest::Running;
use crate::{Digest, Origin, TensorRecord, TiledMatrix};

/// Bytes that are made, hashed and written at a time: what still lies in a shared cache when it is hashed. One row of
/// tiles at least.
const PIECE: usize = 1 << 20;

/// The codes of one matrix, tiled some rows of tiles at a time.
pub trait TileCodes: Send + Sync {
    /// Rows of tiles.
    fn row_tiles(&self) -> usize;

    /// Bytes of one row of tiles.
    fn row_tile_bytes(&self) -> usize;

    /// Writes all of `out`, which is as long as these rows of tiles.
    fn tile(&self, row_tiles: Range<usize>, out: &mut [u8]);

    /// Bytes of the original tensor that these rows of tiles are made of. Those of consecutive ranges are consecutive,
    /// and those of all rows of tiles the whole tensor.
    fn original(&self, row_tiles: Range<usize>) -> &[u8];
}

/// A matrix whose codes are tiled while they are written.
pub struct StreamedMatrix<'a> {
    /// Everything else of the matrix; its codes are not looked at.
    pub matrix: TiledMatrix,
    /// The codes.
    pub codes: Box<dyn TileCodes + 'a>,
}

impl StreamedMatrix<'_> {
    /// Bytes of all codes.
    pub(crate) fn code_bytes(&self) -> usize {
        self.codes.row_tiles() * self.codes.row_tile_bytes()
    }
}

/// An original tensor of a part that is being written.
#[derive(Clone, Debug)]
pub struct PartTensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Index of the file it came from.
    pub file: usize,
    /// Where its bytes are.
    pub origin: Origin,
    /// Digest of its bytes in the checkpoint.
    pub sha256: TensorDigest,
}

/// Where the digest of an original tensor comes from.
#[derive(Clone, Debug)]
pub enum TensorDigest {
    /// It is known.
    Known(Digest),
    /// The tensor holds the codes of this module: its bytes are hashed as they are tiled.
    OfCodes(String),
}

impl PartTensor {
    /// `None` where its codes were not written.
    pub(crate) fn record(&self, of_codes: &BTreeMap<&str, Digest>) -> Option<TensorRecord> {
        let sha256 = match &self.sha256 {
            TensorDigest::Known(digest) => *digest,
            TensorDigest::OfCodes(module) => *of_codes.get(module.as_str())?,
        };
        let (name, dtype, shape) = (self.name.clone(), self.dtype, self.shape.clone());
        Some(TensorRecord { name, dtype, shape, sha256, file: self.file, origin: self.origin })
    }
}

/// Consecutive bytes of a file.
#[derive(Clone)]
pub(crate) enum Section<'a> {
    /// They are there.
    Bytes(&'a [u8]),
    /// They are made of the codes of a module.
    Codes { module: &'a str, codes: &'a dyn TileCodes },
}

/// What went to a file.
#[derive(Debug)]
pub(crate) struct Streamed<'a> {
    pub(crate) bytes: u64,
    pub(crate) sha256: Digest,
    /// Digests of the original tensors of the codes, by module.
    pub(crate) of_codes: BTreeMap<&'a str, Digest>,
}

/// Writes all sections. While one piece is hashed and written, the next one is made, in memory for two pieces. Each step
/// goes to `pool` by itself, so that files that are written at once wait for one another's steps and not for files.
pub(crate) fn write<'a>(
    out: &mut (impl Write + Send),
    sections: &[Section<'a>],
    pool: &ThreadPool,
) -> io::Result<Streamed<'a>> {
    let pieces: Vec<Piece<'a>> = sections.iter().flat_map(pieces).collect();
    let (mut ready, mut next) = (Vec::new(), Vec::new());
    let mut hashes = Hashes::default();
    let mut written = 0;
    pool.install(|| {
        pieces.iter().take(AHEAD).for_each(|piece| hashes.update(&[], piece.original()));
        pieces.iter().take(1).for_each(|piece| piece.make(&mut ready));
    });
    for (index, piece) in pieces.iter().enumerate() {
        let bytes = piece.bytes(&ready);
        let make_next = || pieces.iter().skip(index + 1).take(1).for_each(|piece| piece.make(&mut next));
        let hash = || hashes.update(bytes, pieces.get(index + AHEAD).and_then(Piece::original));
        let (_, (result, ())) = pool.join(hash, || rayon::join(|| out.write_all(bytes), make_next));
        result?;
        written += bytes.len() as u64;
        std::mem::swap(&mut ready, &mut next);
    }
    let of_codes = hashes.of_codes.into_iter().map(|(module, hash)| (module, hash.finish())).collect();
    Ok(Streamed { bytes: written, sha256: hashes.file.finish(), of_codes })
}

/// Pieces by which the hash of the original tensor is ahead: what it has read is in a cache when it is tiled.
const AHEAD: usize = 2;

enum Piece<'a> {
    Bytes(&'a [u8]),
    Codes { module: &'a str, codes: &'a dyn TileCodes, row_tiles: Range<usize> },
}

fn pieces<'a>(section: &Section<'a>) -> Vec<Piece<'a>> {
    match *section {
        Section::Bytes(bytes) => bytes.chunks(PIECE).map(Piece::Bytes).collect(),
        Section::Codes { module, codes } => {
            let at_a_time = (PIECE / codes.row_tile_bytes().max(1)).max(1);
            let starts = (0..codes.row_tiles()).step_by(at_a_time);
            let range = |start: usize| start..codes.row_tiles().min(start + at_a_time);
            starts.map(|start| Piece::Codes { module, codes, row_tiles: range(start) }).collect()
        }
    }
}

impl<'a> Piece<'a> {
    fn make(&self, buffer: &mut Vec<u8>) {
        match self {
            Piece::Bytes(_) => {}
            Piece::Codes { codes, row_tiles, .. } => {
                buffer.resize(row_tiles.len() * codes.row_tile_bytes(), 0);
                codes.tile(row_tiles.clone(), buffer);
            }
        }
    }

    /// What it is made of, and the module's name.
    fn original(&self) -> Option<(&'a str, &'a [u8])> {
        match self {
            Piece::Bytes(_) => None,
            Piece::Codes { module, codes, row_tiles } => Some((module, codes.original(row_tiles.clone()))),
        }
    }

    fn bytes<'b>(&'b self, buffer: &'b [u8]) -> &'b [u8] {
        match self {
            Piece::Bytes(bytes) => bytes,
            Piece::Codes { .. } => buffer,
        }
    }
}

/// The hash of the file, and those of the tensors behind its codes.
#[derive(Default)]
struct Hashes<'a> {
    file: Running,
    of_codes: BTreeMap<&'a str, Running>,
}

impl<'a> Hashes<'a> {
    /// Takes the next bytes of the file, and the next of the tensor behind a module's codes.
    fn update(&mut self, file: &[u8], original: Option<(&'a str, &'a [u8])>) {
        match original {
            None => self.file.update(file),
            Some((module, original)) => {
                let of_codes = self.of_codes.entry(module).or_default();
                Running::update_both((&mut self.file, file), (of_codes, original));
            }
        }
    }
}
