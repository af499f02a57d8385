//! SHA-256 in the two forms that identities take here: the whole digest as hex, and its first 16 digits.
//!
//! Refuses to know what is being hashed: callers document their own canonical byte strings.

use sha2::{Digest, Sha256};

/// A running SHA-256 over little-endian integers and byte strings.
#[derive(Default)]
pub(crate) struct Hasher(Sha256);

impl Hasher {
    /// Appends bytes as they are.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Appends a count or an index as 8 little-endian bytes.
    pub(crate) fn count(&mut self, value: usize) {
        self.0.update((value as u64).to_le_bytes());
    }

    /// Appends a token id as 4 little-endian bytes.
    pub(crate) fn token(&mut self, id: u32) {
        self.0.update(id.to_le_bytes());
    }

    /// The raw digest, 32 bytes.
    pub(crate) fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }

    /// All 64 lower-case hex digits.
    pub(crate) fn hex(self) -> String {
        self.finish().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The first 16 hex digits: an id that people can paste.
    pub(crate) fn short_hex(self) -> String {
        let mut hex = self.hex();
        hex.truncate(16);
        hex
    }
}

/// SHA-256 of one byte string, as 64 lower-case hex digits.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    let mut hasher = Hasher::default();
    hasher.bytes(bytes);
    hasher.hex()
}
