//! The bytes of one connection between two ranks: frames, and the loops that write and read them.
//!
//! A frame is [length of the payload: u64][kind: u8][tag: u32], little-endian, and the payload. Long messages travel in
//! fragments, so that a sign of life or a farewell never waits for more than one of them. Knows neither other
//! connections nor what a message means.

use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The longest payload of a frame.
const FRAGMENT: usize = 1 << 20;
const HEADER: usize = 13;

/// Why a job ended before its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The rank that is lost, or has given up.
    pub rank: usize,
    /// Who, why, and what to do.
    pub what: String,
    /// The exit code that every rank ends with.
    pub exit: u8,
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Kind {
    /// The end of a message, or all of it.
    Data = 1,
    /// A fragment of a message that goes on.
    More = 2,
    /// A sign of life.
    Beat = 3,
    Abort = 4,
    Goodbye = 5,
    /// The goodbye was read, and all before it.
    Seen = 6,
}

impl Kind {
    fn of(byte: u8) -> Option<Kind> {
        [Kind::Data, Kind::More, Kind::Beat, Kind::Abort, Kind::Goodbye, Kind::Seen]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// What a rank has to say to another one.
#[derive(Debug)]
pub(crate) enum Outgoing {
    Message {
        tag: u32,
        bytes: Vec<u8>,
    },
    Abort(Failure),
    Goodbye,
    Seen,
    /// Nothing more.
    Close,
}

/// What a rank has heard from another one.
#[derive(Debug)]
pub(crate) enum Incoming {
    Message { tag: u32, bytes: Vec<u8> },
    Abort(Failure),
    Goodbye,
    Seen,
}

/// How the reading of a connection ended.
#[derive(Debug)]
pub(crate) enum Ended {
    Closed,
    /// What came is no frame.
    Garbage,
    Failed(io::Error),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Ended {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Ended::Closed,
            _ => Ended::Failed(error),
        }
    }
}

/// Writes what `queue` holds, and a sign of life each `beat` that it holds nothing. Ends after an abort or a close.
/// Once `failed` is set, messages are left out, so that the abort behind them goes out at once.
pub(crate) fn write_frames(
    mut socket: &TcpStream,
    queue: &Receiver<Outgoing>,
    beat: Duration,
    failed: &AtomicBool,
) -> io::Result<()> {
    loop {
        match queue.recv_timeout(beat) {
            Ok(Outgoing::Message { tag, bytes }) => {
                write_message(socket, tag, &bytes, failed)?;
            }
            Ok(Outgoing::Abort(failure)) => {
                return write_frame(&mut socket, Kind::Abort, 0, &serde_json::to_vec(&failure)?);
            }
            Ok(Outgoing::Goodbye) => write_frame(&mut socket, Kind::Goodbye, 0, &[])?,
            Ok(Outgoing::Seen) => write_frame(&mut socket, Kind::Seen, 0, &[])?,
            Ok(Outgoing::Close) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => write_frame(&mut socket, Kind::Beat, 0, &[])?,
        }
    }
}

fn write_message(mut socket: &TcpStream, tag: u32, bytes: &[u8], failed: &AtomicBool) -> io::Result<()> {
    let mut rest = bytes;
    loop {
        if failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (fragment, after) = rest.split_at(rest.len().min(FRAGMENT));
        let kind = if after.is_empty() { Kind::Data } else { Kind::More };
        write_frame(&mut socket, kind, tag, fragment)?;
        if after.is_empty() {
            return Ok(());
        }
        rest = after;
    }
}

fn write_frame(sink: &mut impl Write, kind: Kind, tag: u32, payload: &[u8]) -> io::Result<()> {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    header[8] = kind as u8;
    header[9..].copy_from_slice(&tag.to_le_bytes());
    if payload.len() <= 4096 {
        // One segment instead of two.
        return sink.write_all(&[&header, payload].concat());
    }
    sink.write_all(&header)?;
    sink.write_all(payload)
}

/// Reads frames until the connection ends. `heard` is called whenever bytes have come.
pub(crate) fn read_frames(source: impl Read, heard: impl Fn(), mut deliver: impl FnMut(Incoming)) -> Ended {
    let mut source = BufReader::with_capacity(64 << 10, Listened { source, heard });
    let mut message = Vec::new();
    loop {
        match read_frame(&mut source, &mut message) {
            Ok(Some(incoming)) => deliver(incoming),
            Ok(None) => {}
            Err(ended) => return ended,
        }
    }
}

/// Reads a frame; `message` gathers fragments.
fn read_frame(source: &mut impl Read, message: &mut Vec<u8>) -> Result<Option<Incoming>, Ended> {
    let mut header = [0; HEADER];
    source.read_exact(&mut header)?;
    let (length, rest) = header.split_first_chunk().expect("a header of 13 bytes");
    let length = u64::from_le_bytes(*length);
    let (kind, tag) =
        (Kind::of(rest[0]).ok_or(Ended::Garbage)?, rest.last_chunk().expect("a tag of 4 bytes"));
    if length > FRAGMENT as u64 {
        return Err(Ended::Garbage);
    }
    let before = message.len() as u64;
    if source.take(length).read_to_end(message)? as u64 != length {
        return Err(Ended::Closed);
    }
    Ok(match kind {
        Kind::More => None,
        Kind::Data => {
            Some(Incoming::Message { tag: u32::from_le_bytes(*tag), bytes: std::mem::take(message) })
        }
        // These come between two fragments as well.
        Kind::Abort => {
            let failure = serde_json::from_slice(&message[before as usize..]);
            Some(Incoming::Abort(failure.map_err(|_| Ended::Garbage)?))
        }
        Kind::Beat | Kind::Goodbye | Kind::Seen if length > 0 => return Err(Ended::Garbage),
        Kind::Beat => None,
        Kind::Goodbye => Some(Incoming::Goodbye),
        Kind::Seen => Some(Incoming::Seen),
    })
}

struct Listened<R, H> {
    source: R,
    heard: H,
}

impl<R: Read, H: Fn()> Read for Listened<R, H> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        (self.heard)();
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: u64, kind: u8, payload: &[u8]) -> Vec<u8> {
        [length.to_le_bytes().as_slice(), &[kind], &7u32.to_le_bytes(), payload].concat()
    }

    fn heard_in(bytes: &[u8]) -> (Vec<Incoming>, Ended) {
        let mut incoming = Vec::new();
        let ended = read_frames(bytes, || {}, |message| incoming.push(message));
        (incoming, ended)
    }

    #[test]
    fn fragments_make_a_message_with_signs_of_life_between_them() {
        let bytes = [frame(2, 2, b"ab"), frame(0, 3, b""), frame(3, 1, b"cde"), frame(0, 1, b"")].concat();
        let (incoming, ended) = heard_in(&bytes);
        let messages: Vec<(u32, Vec<u8>)> = incoming
            .into_iter()
            .map(|incoming| match incoming {
                Incoming::Message { tag, bytes } => (tag, bytes),
                Incoming::Abort(_) | Incoming::Goodbye | Incoming::Seen => panic!("{incoming:?}"),
            })
            .collect();
        assert_eq!(messages, [(7, b"abcde".to_vec()), (7, Vec::new())]);
        assert!(matches!(ended, Ended::Closed));
    }

    #[test]
    fn an_abort_between_fragments_is_read() {
        let failure = Failure { rank: 3, what: "no room".to_owned(), exit: 2 };
        let text = serde_json::to_vec(&failure).expect("JSON");
        let (incoming, _) = heard_in(&[frame(2, 2, b"ab"), frame(text.len() as u64, 4, &text)].concat());
        assert!(matches!(&incoming[..], [Incoming::Abort(read)] if *read == failure), "{incoming:?}");
    }

    #[test]
    fn what_is_no_frame_allocates_nothing_and_ends_the_connection() {
        for bytes in [frame(u64::MAX, 1, b""), frame(1, 9, b"x"), frame(1, 3, b"x"), frame(2, 4, b"{}")] {
            let (incoming, ended) = heard_in(&bytes);
            assert!(
                incoming.is_empty() && matches!(ended, Ended::Garbage),
                "{bytes:?}: {incoming:?} {ended:?}"
            );
        }
        for bytes in [frame(5, 1, b"abc"), b"short".to_vec()] {
            let (incoming, ended) = heard_in(&bytes);
            assert!(
                incoming.is_empty() && matches!(ended, Ended::Closed),
                "{bytes:?}: {incoming:?} {ended:?}"
            );
        }
    }
}
