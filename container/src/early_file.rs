//! A long file that the disk begins with while it is still being written, so that little is left to wait for at its end.
//! Knows bytes; does not make the file durable.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Bytes after which the disk is set to what there is.
const RUN: usize = 64 << 20;

/// Passes bytes on to a file, and from time to time has a thread wait for the disk to take them.
pub(crate) struct EarlyFile<'a> {
    file: &'a mut File,
    since: usize,
    flusher: Option<Flusher>,
}

struct Flusher {
    wake: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl<'a> EarlyFile<'a> {
    pub(crate) fn new(file: &'a mut File) -> EarlyFile<'a> {
        EarlyFile { file, since: 0, flusher: None }
    }

    /// Waits for what the disk was set to.
    ///
    /// # Errors
    /// Where the disk failed.
    pub(crate) fn finish(self) -> io::Result<()> {
        let Some(Flusher { wake, thread }) = self.flusher else { return Ok(()) };
        drop(wake);
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that waits for the disk panicked")))
    }

    fn begin(&mut self) -> io::Result<()> {
        if self.flusher.is_none() {
            let file = self.file.try_clone()?;
            let (wake, asked) = sync_channel(1);
            let thread = std::thread::Builder::new()
                .name("disk".to_owned())
                .spawn(move || asked.iter().try_for_each(|()| file.sync_data()))?;
            self.flusher = Some(Flusher { wake, thread });
        }
        // Where it is not taken, the thread still has one before it, or has failed, which `finish` tells.
        let _ = self.flusher.as_ref().map(|flusher| flusher.wake.try_send(()));
        Ok(())
    }
}

impl Write for EarlyFile<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.file.write(buffer)?;
        self.since += written;
        if self.since >= RUN {
            self.since = 0;
            self.begin()?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn a_file_longer_than_a_run_is_written_whole() {
        let mut file = tempfile::tempfile().unwrap();
        let mut early = EarlyFile::new(&mut file);
        let chunk: Vec<u8> = (0..RUN / 2 + 1).map(|i| (i % 251) as u8).collect();
        early.write_all(&chunk).unwrap();
        assert!(early.flusher.is_none());
        early.write_all(&chunk).unwrap();
        assert!(early.flusher.is_some());
        early.finish().unwrap();
        let mut read = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut read).unwrap();
        assert!(read == [&chunk[..], &chunk[..]].concat());
    }
}
