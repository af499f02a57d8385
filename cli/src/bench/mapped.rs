//! Bytes that lie in a file that nobody else can see, and are mapped: what a part of a container is to a run, without a
//! container.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use anyhow::Context;
use ctq_container::Bytes;
use memmap2::Mmap;

/// Bytes written at a time, so that they never are in memory as a whole; a multiple of 64.
const CHUNK: usize = 1 << 20;

/// Maps `length` bytes made by `fill`, which is called for one run after the other.
///
/// # Errors
/// Where no file can be made or written.
#[expect(unsafe_code, reason = "mapping a file")]
pub(super) fn mapped(length: usize, mut fill: impl FnMut(&mut [u8])) -> anyhow::Result<Bytes> {
    let folder = std::env::temp_dir();
    let told = || {
        let megabytes = length as f64 / 1e6;
        format!(
            "{}: {megabytes:.0} MB cannot be kept here; set TMPDIR to a folder with room",
            folder.display()
        )
    };
    let mut file: File = tempfile::tempfile_in(&folder).with_context(told)?;
    let mut chunk = vec![0; CHUNK.min(length)];
    let mut left = length;
    while left > 0 {
        let run = &mut chunk[..left.min(CHUNK)];
        fill(run);
        file.write_all(run).with_context(told)?;
        left -= run.len();
    }
    // SAFETY: the file has no name, so that no other process can change it, and this one is done with it.
    let map = unsafe { Mmap::map(&file) }.with_context(told)?;
    Ok(Bytes::of(Arc::new(map), 0..length))
}
