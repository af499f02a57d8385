//! The protocol id: a hash of the question that a perplexity answers.
//!
//! Numbers only, so that two presets that ask the same of the same tokens have the same id, whatever they are
//! called.

use ctq_model::window::Window;

use crate::digest::Hasher;

/// Marks the serialisation; a change of it is a new number.
const VERSION: &[u8] = b"ctq-protocol-1\n";

/// The first 16 hex digits of the SHA-256 of this byte string, integers little-endian:
///
/// ```text
/// "ctq-protocol-1\n"
/// u64  vocabulary: the logits that take part in the softmax
/// u64  number of windows
/// for each window, in order:
///   u64      index in the token stream of its first id
///   u64      number of ids
///   u32 ...  the ids that are fed, BOS in place where the protocol puts it
///   u64 u64  first scored position, and one past the last
/// ```
///
/// The ids carry the tokenizer, the text, the join rule and the BOS rule as far as they reach a scored
/// position's window; tokens that no window feeds do not count.
pub fn protocol_id(windows: &[Window], vocabulary: usize) -> String {
    let mut hasher = Hasher::default();
    hasher.bytes(VERSION);
    hasher.count(vocabulary);
    hasher.count(windows.len());
    for window in windows {
        hasher.count(window.start);
        hasher.count(window.ids.len());
        for &id in &window.ids {
            hasher.token(id);
        }
        hasher.count(window.scored.start);
        hasher.count(window.scored.end);
    }
    hasher.short_hex()
}
