//! SHA-256, the one hash of the house: of bytes at hand, and of bytes on their way to a file.

use std::fmt;
use std::io::{self, Write};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest; shown and stored as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Digest of some bytes.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// Reads 64 hexadecimal digits; `None` where they are something else.
    pub fn parse(text: &str) -> Option<Digest> {
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Digest(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = String::deserialize(deserializer)?;
        Digest::parse(&text).ok_or_else(|| de::Error::custom(format!("`{text}` is not a SHA-256 digest")))
    }
}

/// A digest of bytes that come one after the other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Running(Sha256);

impl Running {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }

    /// Updates two digests at once. Each step of a hash waits for the one before it: a processor that is given both
    /// by turns takes little longer than for one.
    pub(crate) fn update_both(a: (&mut Running, &[u8]), b: (&mut Running, &[u8])) {
        /// Two blocks: short enough for a processor to look ahead to the other's.
        const TURN: usize = 128;
        let ((a, of_a), (b, of_b)) = (a, b);
        let turns = of_a.len().min(of_b.len()) / TURN * TURN;
        let ((of_a, rest_of_a), (of_b, rest_of_b)) = (of_a.split_at(turns), of_b.split_at(turns));
        for (of_a, of_b) in of_a.as_chunks::<TURN>().0.iter().zip(of_b.as_chunks::<TURN>().0) {
            a.update(of_a);
            b.update(of_b);
        }
        a.update(rest_of_a);
        b.update(rest_of_b);
    }
}

/// Passes bytes on to another writer and remembers their digest and number.
#[derive(Debug)]
pub struct DigestWriter<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> DigestWriter<W> {
    /// Starts with the digest of nothing.
    pub fn new(inner: W) -> DigestWriter<W> {
        DigestWriter { inner, hash: Sha256::new(), bytes: 0 }
    }

    /// The writer, the digest of everything that went through, and how many bytes that was.
    pub fn finish(self) -> (W, Digest, u64) {
        (self.inner, Digest(self.hash.finalize().into()), self.bytes)
    }
}

impl<W: Write> Write for DigestWriter<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.hash.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_abc_is_that_of_fips_180() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Digest::of(b"abc").to_string(), expected);
        assert_eq!(Digest::parse(expected), Some(Digest::of(b"abc")));
        assert_eq!(Digest::parse("ba78"), None);
        let mut writer = DigestWriter::new(Vec::new());
        writer.write_all(b"a").unwrap();
        writer.write_all(b"bc").unwrap();
        assert_eq!(writer.finish(), (b"abc".to_vec(), Digest::of(b"abc"), 3));
    }

    #[test]
    fn two_digests_at_once_are_those_of_each() {
        let bytes: Vec<u8> = (0..5000_u32).map(|i| (i * i / 7) as u8).collect();
        for (of_a, of_b) in [(0, 5000), (5000, 1), (127, 129), (1000, 4096), (4096, 4096)] {
            let (mut a, mut b) = (Running::default(), Running::default());
            a.update(b"odd");
            Running::update_both((&mut a, &bytes[..of_a]), (&mut b, &bytes[..of_b]));
            assert_eq!(a.finish(), Digest::of(&[b"odd", &bytes[..of_a]].concat()));
            assert_eq!(b.finish(), Digest::of(&bytes[..of_b]));
        }
    }
}
