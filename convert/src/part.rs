//! One part of a checkpoint, encoded and tiled: for a runtime as it is, or for a container with everything that makes
//! it lossless.

use std::borrow::Cow;
use std::collections::BTreeMap;

use ctq_container::{Digest, Exception, Origin, PartContents, PartTiles, RawVector, TensorRecord};
use ctq_model::inventory::{Linear, PartInventory};
use ctq_model::scheme::{Activation, ActivationScale};
use ctq_model::{Error, QuantMatrix, Result, TensorSource};
use rayon::prelude::*;

use crate::codec::{self, Leaf};
use crate::tiles::{tile, tile_linear};

/// What a runtime needs of a part. The same bits as the part of a container.
pub(crate) fn tiles(source: &dyn TensorSource, part: &PartInventory) -> Result<PartTiles> {
    let matrices = in_order(&part.linears, |linear| tile_linear(source, linear))?;
    let modules = part.linears.iter().map(|linear| linear.module.clone());
    Ok(PartTiles { matrices: modules.zip(matrices).collect(), vectors: vectors(source, part)? })
}

/// What a container holds of a part: its tiles, and whatever of the original tensors the tiles do not regenerate.
///
/// `file_index` gives the number of the source's file that holds a tensor.
pub(crate) fn contents(
    source: &dyn TensorSource,
    part: &PartInventory,
    file_index: &(dyn Fn(&str) -> usize + Sync),
) -> Result<PartContents> {
    let mut contents = PartContents::default();
    let mut kept = BTreeMap::new();
    let encoded = in_order(&part.linears, |linear| {
        let matrix = codec::encode(source, linear)?;
        Ok((tile(&matrix), losses(source, part, linear, &matrix)?))
    })?;
    for (linear, (tiled, losses)) in part.linears.iter().zip(encoded) {
        contents.tiles.matrices.insert(linear.module.clone(), tiled);
        kept.extend(losses);
    }
    contents.tiles.vectors = vectors(source, part)?;
    contents.tensors = in_order(&part.tensors, |name| {
        let tensor = tensor(source, name)?;
        let (dtype, shape, sha256) = (tensor.dtype, tensor.shape.clone(), Digest::of(&tensor.bytes));
        let origin = kept.get(name).map_or(Origin::Stored, Loss::origin);
        Ok(TensorRecord { name: name.clone(), dtype, shape, sha256, file: file_index(name), origin })
    })?;
    for (name, loss) in kept {
        match loss {
            Loss::Nothing => {}
            Loss::Bytes(exceptions) => {
                contents.exceptions.insert(name, exceptions);
            }
            Loss::Everything => {
                let bytes = tensor(source, &name)?.bytes.into_owned();
                contents.originals.insert(name, bytes.into());
            }
        }
    }
    Ok(contents)
}

/// What the tiles lose of an original tensor.
enum Loss {
    Nothing,
    Bytes(Vec<Exception>),
    Everything,
}

impl Loss {
    fn origin(&self) -> Origin {
        match self {
            Loss::Nothing => Origin::Tiles,
            Loss::Bytes(_) => Origin::TilesWithExceptions,
            Loss::Everything => Origin::Original,
        }
    }

    /// Compares what comes back with what was there.
    fn between(original: &[u8], regenerated: Option<Cow<'_, [u8]>>) -> Loss {
        /// What an exception takes in a container; a list that is longer than the tensor is not worth it.
        const EXCEPTION_BYTES: usize = 9;
        let Some(regenerated) = regenerated.filter(|bytes| bytes.len() == original.len()) else {
            return Loss::Everything;
        };
        if *regenerated == *original {
            return Loss::Nothing;
        }
        let differing = original.iter().zip(&*regenerated).enumerate().filter(|(_, (a, b))| a != b);
        let limit = original.len() / EXCEPTION_BYTES;
        let exceptions: Vec<Exception> = differing
            .take(limit + 1)
            .map(|(offset, (byte, _))| Exception { offset: offset as u64, byte: *byte })
            .collect();
        if exceptions.len() > limit { Loss::Everything } else { Loss::Bytes(exceptions) }
    }
}

/// What the tiles lose of each tensor on the weight's side of one linear.
fn losses(
    source: &dyn TensorSource,
    part: &PartInventory,
    linear: &Linear,
    matrix: &QuantMatrix,
) -> Result<Vec<(String, Loss)>> {
    let mut losses = Vec::new();
    for name in &part.tensors {
        let Some(leaf) = weight_leaf(name, linear) else { continue };
        let tensor = tensor(source, name)?;
        let regenerated = codec::regenerate(matrix, linear, leaf, tensor.dtype);
        losses.push((name.clone(), Loss::between(&tensor.bytes, regenerated)));
    }
    Ok(losses)
}

/// What `tensor` says of the weight of `linear`; `None` where it says nothing of it.
pub(crate) fn weight_leaf(tensor: &str, linear: &Linear) -> Option<Leaf> {
    let segment = tensor.strip_prefix(linear.module.as_str())?.strip_prefix('.')?;
    Leaf::of(segment)
}

/// Everything small that a runtime may need, as stored: whatever is not on the weight's side of a linear.
fn vectors(source: &dyn TensorSource, part: &PartInventory) -> Result<BTreeMap<String, RawVector>> {
    for name in used_floats(part) {
        codec::check_vector(source, &name)?;
    }
    let linears: BTreeMap<&str, &Linear> =
        part.linears.iter().map(|linear| (linear.module.as_str(), linear)).collect();
    let mut vectors = BTreeMap::new();
    for name in &part.tensors {
        let linear = name.rsplit_once('.').and_then(|(module, _)| linears.get(module));
        if linear.is_none_or(|linear| weight_leaf(name, linear).is_none()) {
            let tensor = tensor(source, name)?;
            let vector = RawVector { dtype: tensor.dtype, bytes: tensor.bytes.into_owned().into() };
            vectors.insert(name.clone(), vector);
        }
    }
    Ok(vectors)
}

/// Tensors whose elements enter the computation as they are: one that is not a number would spoil every result.
fn used_floats(part: &PartInventory) -> Vec<String> {
    let mut names: Vec<String> = part.vectors.iter().map(|vector| vector.tensor.clone()).collect();
    for linear in &part.linears {
        let module = &linear.module;
        names.extend(linear.bias.then(|| format!("{module}.bias")));
        for (side, activation) in [("input", &linear.scheme.input), ("output", &linear.scheme.output)] {
            names.extend(activation.as_ref().and_then(|activation| static_scale(module, side, activation)));
        }
    }
    if let Some(kv) = &part.kv {
        names.extend([&kv.k_scale, &kv.v_scale, &kv.q_scale].into_iter().flatten().cloned());
    }
    names
}

fn static_scale(module: &str, side: &str, activation: &Activation) -> Option<String> {
    match activation.scale {
        ActivationScale::Static => Some(format!("{module}.{side}_scale")),
        ActivationScale::Local => Some(format!("{module}.{side}_global_scale")),
        ActivationScale::Dynamic | ActivationScale::PowerOfTwo => None,
    }
}

fn tensor<'a>(source: &'a dyn TensorSource, name: &str) -> Result<ctq_model::Tensor<'a>> {
    let found = source.tensor(name)?;
    found.ok_or_else(|| Error::missing(source.root(), name, "it was there when the checkpoint was opened"))
}

/// Does the work in parallel and reports the first failure in the order of `items`.
fn in_order<T: Sync, U: Send>(items: &[T], work: impl Fn(&T) -> Result<U> + Send + Sync) -> Result<Vec<U>> {
    let results: Vec<Result<U>> = items.par_iter().map(work).collect();
    results.into_iter().collect()
}
