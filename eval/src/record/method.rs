//! How a number was computed, as opposed to what was asked: the method and its id.
//!
//! Knows names only; what each name means is NUMERICS.md's and the runtime's affair.

use serde::{Deserialize, Serialize};

use crate::digest::sha256_hex;

/// The choices that may change the last digits of a score without changing the question.
///
/// Fields stand in alphabetical order, which makes their JSON canonical.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Method {
    /// Effective activation quantization: `none` (the checkpoint has none), `off`, `library` or `kernel`.
    pub acts: String,
    /// The backend that scored: `cpu`, `cuda`, `reference`.
    pub backend: String,
    /// Effective operand precision: `bf16` or `f32`.
    pub compute: String,
    /// The backend's instruction set or device class, as far as bits depend on it.
    pub isa: String,
    /// Effective quantization of keys and values: `off`, or what was applied.
    pub kv: String,
    /// Revision of NUMERICS.md that was followed.
    pub numerics_revision: u32,
}

impl Method {
    /// The first 16 hex digits of the SHA-256 of the canonical JSON: keys sorted, no white space.
    ///
    /// `none` counts as `off`: both leave activations alone, so the arithmetic is the same.
    pub fn id(&self) -> String {
        let acts = if self.acts == "none" { "off" } else { &self.acts };
        let json = serde_json::json!({
            "acts": acts, "backend": self.backend, "compute": self.compute, "isa": self.isa, "kv": self.kv,
            "numerics_revision": self.numerics_revision,
        });
        let mut hex = sha256_hex(json.to_string().as_bytes());
        hex.truncate(16);
        hex
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected: `printf '{"acts":"off","backend":"cpu",...}' | sha256sum`.
    #[test]
    fn id_is_the_hash_of_the_canonical_json() {
        let method = Method {
            acts: "off".into(),
            backend: "cpu".into(),
            compute: "f32".into(),
            isa: "avx512-bf16".into(),
            kv: "off".into(),
            numerics_revision: 1,
        };
        assert_eq!(method.id(), "30b85c8931364431");
        assert_eq!(Method { acts: "none".into(), ..method.clone() }.id(), method.id());
        assert_ne!(Method { acts: "library".into(), ..method.clone() }.id(), method.id());
    }
}
