//! The hidden states of a group between two layers, kept on disk so that a killed run goes on where it was.
//!
//! A snapshot belongs to a key that the caller makes of everything the states depend on. A damaged or foreign file is
//! no snapshot: the run starts the group again.

use std::fs;
use std::io::Write;
use std::path::Path;

use ctq_kernels::collective::Peers;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Hidden states of a group before layer `layer`.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Layers that are done.
    pub layer: usize,
    /// [rows, hidden].
    pub hidden: Vec<f32>,
}

/// Elements of a snapshot that ranks hand on at a time.
const ELEMENTS_AT_ONCE: usize = 1 << 20;

const MAGIC: &[u8; 8] = b"ctqsnap1";

impl Snapshot {
    /// Writes the snapshot beside `path` and renames it there.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn save(&self, path: &Path, key: &str) -> Result<()> {
        let write = || -> std::io::Result<()> {
            let folder = path.parent().unwrap_or(Path::new("."));
            fs::create_dir_all(folder)?;
            let temporary = tempfile::NamedTempFile::new_in(folder)?;
            // The file itself: its errors do not name the temporary path, which would tell nobody anything.
            let mut file = temporary.as_file();
            let mut hasher = hasher(key, self.layer);
            self.bytes().for_each(|bytes| hasher.update(bytes));
            file.write_all(MAGIC)?;
            file.write_all(&hasher.finalize())?;
            file.write_all(&(self.layer as u64).to_le_bytes())?;
            self.bytes().try_for_each(|bytes| file.write_all(&bytes))?;
            file.sync_all()?;
            temporary.persist(path)?;
            Ok(())
        };
        write().map_err(|source| Error::Snapshot { path: path.to_owned(), source })
    }

    /// The hidden states as bytes, some at a time: another copy of all of them may be more than there is room for.
    fn bytes(&self) -> impl Iterator<Item = Vec<u8>> {
        let parts = self.hidden.chunks(ELEMENTS_AT_ONCE);
        parts.map(|part| part.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// What the first of several ranks has, for all of them; some of it at a time, for every rank gets a copy.
    pub(crate) fn shared(peers: &dyn Peers, own: Option<Snapshot>) -> Result<Option<Snapshot>> {
        if peers.ranks() == 1 {
            return Ok(own);
        }
        let of_first = |bytes: Vec<u8>| -> Result<Vec<u8>> {
            Ok(peers.exchange(vec![bytes; peers.ranks()])?.swap_remove(0))
        };
        let begin = own.as_ref().map_or_else(Vec::new, |own| {
            [own.layer, own.hidden.len()].iter().flat_map(|number| (*number as u64).to_le_bytes()).collect()
        });
        let begin = of_first(begin)?;
        let ([layer, elements], []) = begin.as_chunks::<8>() else { return Ok(None) };
        let number = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes) as usize;
        let (layer, elements) = (number(layer), number(elements));
        let mut hidden = Vec::with_capacity(elements);
        while hidden.len() < elements {
            let next = hidden.len()..elements.min(hidden.len() + ELEMENTS_AT_ONCE);
            let bytes = own.as_ref().map_or_else(Vec::new, |own| {
                own.hidden[next].iter().flat_map(|value| value.to_le_bytes()).collect()
            });
            hidden.extend(floats(&of_first(bytes)?));
        }
        Ok(Some(Snapshot { layer, hidden }))
    }

    /// Reads a snapshot; `None` where there is none, or none of this key.
    pub fn load(path: &Path, key: &str) -> Option<Snapshot> {
        let bytes = fs::read(path).ok()?;
        let rest = bytes.strip_prefix(MAGIC.as_slice())?;
        let (checksum, rest) = rest.split_at_checked(32)?;
        let (layer, body) = rest.split_at_checked(8)?;
        let layer = u64::from_le_bytes(layer.try_into().ok()?) as usize;
        if *checksum != *hasher(key, layer).chain_update(body).finalize() || body.len() % 4 != 0 {
            return None;
        }
        Some(Snapshot { layer, hidden: floats(body) })
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

/// A digest of everything that comes before the hidden states.
fn hasher(key: &str, layer: usize) -> Sha256 {
    let mut hasher = Sha256::new();
    hasher.update((key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update((layer as u64).to_le_bytes());
    hasher
}

#[cfg(test)]
mod tests {
    use ctq_kernels::collective::InProcess;
    use ctq_kernels::cpu::Cpu;

    use super::*;

    #[test]
    fn a_snapshot_comes_back_bit_for_bit_and_only_to_its_key() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("group-0.snapshot");
        let snapshot = Snapshot { layer: 3, hidden: vec![1.5, -0.0, f32::MIN_POSITIVE / 4.0] };
        snapshot.save(&path, "key").expect("saved");
        let loaded = Snapshot::load(&path, "key").expect("loaded");
        let bits = |s: &Snapshot| s.hidden.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!((loaded.layer, bits(&loaded)), (3, bits(&snapshot)));
        assert_eq!(Snapshot::load(&path, "other"), None);

        let mut bytes = fs::read(&path).expect("read");
        *bytes.last_mut().expect("not empty") ^= 1;
        fs::write(&path, &bytes).expect("written");
        assert_eq!(Snapshot::load(&path, "key"), None);
        fs::write(&path, &bytes[..20]).expect("written");
        assert_eq!(Snapshot::load(&path, "key"), None);
    }

    /// More elements than cross at a time.
    #[test]
    fn all_ranks_have_the_snapshot_of_the_first() {
        let hidden: Vec<f32> = (0..2 * ELEMENTS_AT_ONCE + 77).map(|at| at as f32).collect();
        for own in [Some(Snapshot { layer: 5, hidden }), None] {
            let ranks = InProcess::<Cpu>::team(3);
            let seen: Vec<Option<Snapshot>> = std::thread::scope(|scope| {
                let rank = |peers: &'_ InProcess<Cpu>| {
                    let own = own.clone().filter(|_| peers.rank() == 0);
                    Snapshot::shared(peers, own).expect("a snapshot")
                };
                let threads: Vec<_> = ranks.iter().map(|peers| scope.spawn(move || rank(peers))).collect();
                threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
            });
            assert!(seen.iter().all(|seen| *seen == own));
        }
    }
}
