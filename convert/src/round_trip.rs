//! Whether a container gives back what it was made from: every original tensor regenerated and held against the hash
//! that was taken of it, and where the checkpoint is still there, against the checkpoint.

use std::collections::BTreeSet;

use ctq_container::{Container, Digest, PartRecord};
use ctq_model::checkpoint::TensorInfo;
use ctq_model::{DType, TensorSource};
use rayon::prelude::*;

use crate::Result;
use crate::original::Cache;

/// What was compared and what differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoundTrip {
    /// Tensors regenerated.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Tensors that differ, in the order of a forward pass; empty when the round trip is exact.
    pub mismatches: Vec<Mismatch>,
    /// Tensors of the checkpoint that are not in the container.
    pub left_out: Vec<String>,
}

/// A tensor that did not come back, or that is not that of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Its name.
    pub tensor: String,
    /// How it differs.
    pub what: String,
}

/// Regenerates every tensor of `container` and compares it with its recorded hash; with `against`, also the checkpoint's
/// tensors with the recorded dtypes, shapes and hashes, those that were left out included.
///
/// # Errors
/// Where a part file cannot be read, or does not hold what the manifest says it holds.
pub fn check_round_trip(container: &Container, against: Option<&dyn TensorSource>) -> Result<RoundTrip> {
    let manifest = container.manifest();
    let parts: Vec<Result<RoundTrip>> =
        manifest.parts.par_iter().map(|part| check_part(container, part, against)).collect();
    let mut whole = RoundTrip::default();
    for part in parts {
        let part = part?;
        whole.tensors += part.tensors;
        whole.bytes += part.bytes;
        whole.mismatches.extend(part.mismatches);
    }
    for record in &manifest.left_out {
        whole.left_out.push(record.name.clone());
        if let Some(source) = against {
            let differs = differs(source, &record.name, record.dtype, &record.shape, record.sha256)?;
            whole.mismatches.extend(differs);
        }
    }
    if let Some(source) = against {
        let tensors = manifest.parts.iter().flat_map(|part| &part.tensors).map(|tensor| &tensor.name);
        let known: BTreeSet<&str> = tensors.chain(&whole.left_out).map(String::as_str).collect();
        let unknown = source.names().into_iter().filter(|name| !known.contains(name));
        whole.mismatches.extend(unknown.map(|name| Mismatch {
            tensor: name.to_owned(),
            what: "is in the checkpoint and not in the container".to_owned(),
        }));
    }
    Ok(whole)
}

fn check_part(
    container: &Container,
    part: &PartRecord,
    against: Option<&dyn TensorSource>,
) -> Result<RoundTrip> {
    let mut report = RoundTrip::default();
    let mut cache = Cache::default();
    for record in &part.tensors {
        let bytes = cache.tensor(container, part.part, record)?;
        report.tensors += 1;
        report.bytes += bytes.len() as u64;
        if Digest::of(&bytes) != record.sha256 {
            let what = "does not come back: its bytes differ from those that were converted".to_owned();
            report.mismatches.push(Mismatch { tensor: record.name.clone(), what });
        }
        if let Some(source) = against {
            let differs = differs(source, &record.name, record.dtype, &record.shape, record.sha256)?;
            report.mismatches.extend(differs);
        }
    }
    Ok(report)
}

/// How the checkpoint's tensor is not the recorded one.
fn differs(
    source: &dyn TensorSource,
    name: &str,
    dtype: DType,
    shape: &[usize],
    sha256: Digest,
) -> Result<Option<Mismatch>> {
    let what = match source.tensor(name)? {
        None => "is not in the checkpoint".to_owned(),
        Some(tensor)
            if (TensorInfo { dtype, shape: shape.to_vec() })
                != (TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone() }) =>
        {
            format!("is {} {:?} in the checkpoint and was {dtype} {shape:?}", tensor.dtype, tensor.shape)
        }
        Some(tensor) if Digest::of(&tensor.bytes) != sha256 => {
            "has other bytes in the checkpoint than those that were converted".to_owned()
        }
        Some(_) => return Ok(None),
    };
    Ok(Some(Mismatch { tensor: name.to_owned(), what }))
}
