//! One part of a checkpoint, encoded and tiled: for a runtime as it is, or for a container with everything that makes
//! it lossless.

use std::collections::BTreeMap;

use ctq_container::{
    Digest, Origin, PartContents, PartTensor, PartTiles, RawVector, StreamedMatrix, TensorDigest,
};
use ctq_model::inventory::{Linear, PartInventory};
use ctq_model::scheme::{Activation, ActivationScale};
use ctq_model::{Error, Result, TensorSource};
use rayon::prelude::*;

use crate::codec::{self, CodeRows, Leaf};
use crate::loss::Loss;
use crate::tiles::{tile_around, tile_linear};

/// What a runtime needs of a part. The same bits as the part of a container.
pub(crate) fn tiles(source: &dyn TensorSource, part: &PartInventory) -> Result<PartTiles> {
    let matrices = in_order(&part.linears, |linear| tile_linear(source, linear))?;
    let modules = part.linears.iter().map(|linear| linear.module.clone());
    Ok(PartTiles { matrices: modules.zip(matrices).collect(), vectors: vectors(source, part)? })
}

/// What a container holds of a part: its tiles, to be made while they are written, and whatever of the original tensors
/// the tiles do not regenerate.
///
/// `file_index` gives the number of the source's file that holds a tensor.
pub(crate) fn contents<'a>(
    source: &'a dyn TensorSource,
    part: &'a PartInventory,
    file_index: &(dyn Fn(&str) -> usize + Sync),
) -> Result<PartContents<'a>> {
    let mut contents = PartContents::default();
    let mut kept = BTreeMap::new();
    let mut of_codes = BTreeMap::new();
    for (linear, read) in
        part.linears.iter().zip(in_order(&part.linears, |linear| read(source, part, linear))?)
    {
        of_codes.insert(read.codes_tensor, linear.module.clone());
        contents.matrices.insert(linear.module.clone(), read.matrix);
        kept.extend(read.losses);
    }
    contents.vectors = vectors(source, part)?;
    contents.tensors = in_order(&part.tensors, |name| {
        let tensor = tensor(source, name)?;
        let sha256 = match of_codes.get(name) {
            Some(module) => TensorDigest::OfCodes(module.clone()),
            None => TensorDigest::Known(Digest::of(&tensor.bytes)),
        };
        let (dtype, shape, file) = (tensor.dtype, tensor.shape, file_index(name));
        let origin = kept.get(name).map_or(Origin::Stored, Loss::origin);
        Ok(PartTensor { name: name.clone(), dtype, shape, file, origin, sha256 })
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

/// A linear that has been looked through, and is ready to be tiled.
struct Read<'a> {
    matrix: StreamedMatrix<'a>,
    /// Name of the tensor that holds its codes.
    codes_tensor: String,
    /// What the tiles lose of each tensor on the weight's side.
    losses: Vec<(String, Loss)>,
}

fn read<'a>(source: &'a dyn TensorSource, part: &PartInventory, linear: &'a Linear) -> Result<Read<'a>> {
    let codes = CodeRows::new(source, linear)?;
    codes.check_all()?;
    let bare = codec::encode_around(source, linear, Vec::new())?;
    let codes_tensor = codes.tensor_name();
    let mut losses = Vec::new();
    for name in &part.tensors {
        let Some(leaf) = weight_leaf(name, linear) else { continue };
        let loss = match leaf {
            Leaf::Codes if *name == codes_tensor => codes.loss(),
            // A second tensor of codes, which nothing is made of.
            Leaf::Codes => Loss::Everything,
            Leaf::Scales | Leaf::Zeros | Leaf::GroupIndex | Leaf::Shape | Leaf::GlobalScale => {
                let tensor = tensor(source, name)?;
                Loss::between(&tensor.bytes, codec::regenerate(&bare, linear, leaf, tensor.dtype))
            }
        };
        losses.push((name.clone(), loss));
    }
    let matrix = StreamedMatrix { matrix: tile_around(&bare, Vec::new()), codes: Box::new(codes) };
    Ok(Read { matrix, codes_tensor, losses })
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
fn in_order<'a, T: Sync, U: Send>(
    items: &'a [T],
    work: impl Fn(&'a T) -> Result<U> + Send + Sync,
) -> Result<Vec<U>> {
    let results: Vec<Result<U>> = items.par_iter().map(work).collect();
    results.into_iter().collect()
}
