//! What is known of a conversion before the first byte is moved: which checkpoint it is, and how large each part file
//! will be.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use ctq_container::{ALIGNMENT, Digest, MatrixRecord, Plan, SourceFile, SourceRecord};
use ctq_model::accounting::Accounting;
use ctq_model::inventory::{Inventory, Part, PartInventory};
use ctq_model::{Checkpoint, Result, TensorSource};

use crate::codec::Leaf;

/// Identifies a checkpoint by its headers: SHA-256 over `config.json` and the name, length and header of each
/// safetensors file. Weights of equal shape in the same places are not told apart by it; the hashes of the tensors
/// in a container are what does that.
///
/// # Errors
/// Where a header cannot be read.
pub fn source_record(source: &Checkpoint) -> Result<SourceRecord> {
    let mut identity = Digest::of(source.config().bytes()).to_string();
    let mut files = Vec::new();
    for (path, bytes) in source.files() {
        let name = file_name(path);
        identity.push_str(&format!("\n{name} {bytes} {}", Digest::of(&header(path)?)));
        files.push(SourceFile { name, bytes });
    }
    let path = std::path::absolute(source.root()).unwrap_or_else(|_| source.root().to_owned());
    // A manifest is JSON, and so Unicode.
    let path = path.to_string_lossy().into_owned().into();
    Ok(SourceRecord { path, files, fingerprint: Digest::of(identity.as_bytes()) })
}

/// Plans the conversion of `source`.
pub(crate) fn plan(source: &Checkpoint, inventory: &Inventory, name: Option<&str>) -> Result<Plan> {
    let record = source_record(source)?;
    let own_name =
        record.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    Ok(Plan {
        name: name.map_or(own_name, str::to_owned),
        resume_key: resume_key(source, &record)?,
        accounting: Accounting::of(source, inventory)?,
        part_bytes: inventory.parts().map(|(part, of)| (part, part_bytes(source, of))).collect(),
        inventory: inventory.clone(),
        source: record,
    })
}

/// The fingerprint with everything else that must not change between two runs that write one container: times of
/// modification, because weights may change in place, and the program.
fn resume_key(source: &Checkpoint, record: &SourceRecord) -> Result<Digest> {
    let mut identity = format!("{} {}", env!("CARGO_PKG_VERSION"), record.fingerprint);
    for (path, _) in source.files() {
        let modified = path.metadata().and_then(|metadata| metadata.modified());
        let modified = modified.map_err(|e| unreadable(path, e))?;
        let since = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        identity.push_str(&format!("\n{}", since.as_nanos()));
    }
    Ok(Digest::of(identity.as_bytes()))
}

/// Expected length of a part file. Exceptions are not foreseen, and rare.
fn part_bytes(source: &dyn TensorSource, part: &PartInventory) -> u64 {
    let align = |bytes: u64| bytes.next_multiple_of(ALIGNMENT as u64);
    let matrices: u64 =
        part.linears.iter().map(|linear| align(MatrixRecord::of(linear).stored_bytes())).sum();
    let stored = part.tensors.iter().filter(|name| {
        let segment = name.rsplit_once('.').map_or(name.as_str(), |(_, segment)| segment);
        Leaf::of(segment).is_none() || part.vectors.iter().any(|vector| vector.tensor == **name)
    });
    let stored: u64 = stored.map(|name| align(source.info(name).map_or(0, |info| info.bytes()))).sum();
    // Codes, scales, zero points and permutation are aligned one by one, and described in the header.
    let described = (part.linears.len() * 4 + part.tensors.len()) as u64;
    matrices + stored + part.linears.len() as u64 * 3 * ALIGNMENT as u64 + align(described * 256)
}

/// Source bytes of each part, for telling how far a conversion has come.
pub(crate) fn source_bytes(source: &dyn TensorSource, inventory: &Inventory) -> BTreeMap<Part, u64> {
    let bytes = |part: &PartInventory| {
        part.tensors.iter().filter_map(|name| source.info(name)).map(|info| info.bytes()).sum()
    };
    inventory.parts().map(|(part, of)| (part, bytes(of))).collect()
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

fn header(path: &Path) -> Result<Vec<u8>> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let mut header = Vec::new();
        // The checkpoint was opened before: its header is shorter than its file.
        file.take(u64::from_le_bytes(length)).read_to_end(&mut header)?;
        Ok(header)
    };
    read().map_err(|e| unreadable(path, e))
}

fn unreadable(path: &Path, source: io::Error) -> ctq_model::Error {
    ctq_model::Error::Io {
        path: path.to_owned(),
        source,
        next: "check the permissions and the disk".to_owned(),
    }
}
