//! How two processes make sure that they belong to one job, before either believes a word of the other.
//!
//! Each proves that it knows the secret of the job by an HMAC of numbers that both have just drawn; the secret itself
//! never travels. Then each says who it is. All of it has one time limit, and sizes are bounded.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::launch::Secret;

/// What every conversation begins with; the last byte is the version of the protocol.
const MAGIC: &[u8; 8] = b"ctq-mesh";
const PROTOCOL: u8 = 1;
const NONCE: usize = 32;
const PROOF: usize = 32;
/// A message is a greeting, a reason, or a few dozen bytes a rank.
const LONGEST_MESSAGE: u32 = 4 << 20;

/// Who speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Greeting {
    pub(crate) version: String,
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
    /// Where it listens for the other ranks.
    pub(crate) port: u16,
}

/// Why two processes do not talk.
#[derive(Debug)]
pub(crate) enum Failed {
    /// It said nothing, or not enough, in time.
    Silent,
    /// It closed the connection.
    Closed,
    /// It speaks something else: the beginning.
    NotCtq(String),
    /// It speaks another version of this.
    Protocol(u8),
    /// It does not know the secret.
    Secret,
    /// The connection failed.
    Io(io::Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        use io::ErrorKind as K;
        match error.kind() {
            K::WouldBlock | K::TimedOut => Failed::Silent,
            K::UnexpectedEof | K::ConnectionReset | K::BrokenPipe | K::ConnectionAborted => Failed::Closed,
            _ => Failed::Io(error),
        }
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failed::Silent => f.write_str("it said nothing in time"),
            Failed::Closed => f.write_str("it closed the connection"),
            Failed::NotCtq(answer) => write!(f, "it is not ctq, it said {answer}"),
            Failed::Protocol(version) => {
                write!(f, "it speaks version {version} of the protocol, not {PROTOCOL}")
            }
            Failed::Secret => f.write_str("it does not have the secret of this job"),
            Failed::Io(error) => write!(f, "{error}"),
        }
    }
}

/// The side that has connected: who answers.
pub(crate) fn call(
    stream: &TcpStream,
    secret: &Secret,
    own: &Greeting,
    limit: Duration,
) -> Result<Greeting, Failed> {
    let mut timed = Timed { stream, until: Instant::now() + limit };
    let ours = nonce()?;
    timed.write_all(&hello(&ours))?;
    let theirs = read_hello(&mut timed)?;
    let mut proof = [0; PROOF];
    timed.read_exact(&mut proof)?;
    let genuine = prove(secret, b"answers", &ours, &theirs).verify_slice(&proof).is_ok();
    // Sent in either case, so that the other side can say as well what is wrong.
    timed.write_all(&prove(secret, b"calls", &ours, &theirs).finalize().into_bytes())?;
    if !genuine {
        return Err(Failed::Secret);
    }
    write_message(&mut timed, own)?;
    let greeting = read_message(&mut timed)?;
    timed.release()?;
    Ok(greeting)
}

/// The side that was connected to: who calls.
pub(crate) fn answer(
    stream: &TcpStream,
    secret: &Secret,
    own: &Greeting,
    limit: Duration,
) -> Result<Greeting, Failed> {
    let mut timed = Timed { stream, until: Instant::now() + limit };
    let theirs = read_hello(&mut timed)?;
    let ours = nonce()?;
    timed.write_all(&hello(&ours))?;
    timed.write_all(&prove(secret, b"answers", &theirs, &ours).finalize().into_bytes())?;
    let mut proof = [0; PROOF];
    timed.read_exact(&mut proof)?;
    prove(secret, b"calls", &theirs, &ours).verify_slice(&proof).map_err(|_| Failed::Secret)?;
    let greeting = read_message(&mut timed)?;
    write_message(&mut timed, own)?;
    timed.release()?;
    Ok(greeting)
}

fn nonce() -> Result<[u8; NONCE], Failed> {
    let mut nonce = [0; NONCE];
    getrandom::fill(&mut nonce).map_err(|error| Failed::Io(io::Error::other(error.to_string())))?;
    Ok(nonce)
}

fn hello(nonce: &[u8; NONCE]) -> Vec<u8> {
    [MAGIC.as_slice(), &[PROTOCOL], nonce].concat()
}

/// Reads magic, version and nonce; gives up at the first byte that is not ours.
fn read_hello(source: &mut impl Read) -> Result<[u8; NONCE], Failed> {
    let mut heard = [0; MAGIC.len() + 1 + NONCE];
    let mut length = 0;
    while length < heard.len() {
        let read = source.read(&mut heard[length..])?;
        if read == 0 {
            return Err(Failed::Closed);
        }
        length += read;
        let start = length.min(MAGIC.len());
        if heard[..start] != MAGIC[..start] {
            let line = heard[..length].split(|byte| *byte == b'\n').next().unwrap_or_default();
            return Err(Failed::NotCtq(format!("`{}`", line.escape_ascii())));
        }
        if length > MAGIC.len() && heard[MAGIC.len()] != PROTOCOL {
            return Err(Failed::Protocol(heard[MAGIC.len()]));
        }
    }
    let (_, nonce) = heard.split_last_chunk().expect("the hello ends in a nonce");
    Ok(*nonce)
}

fn prove(secret: &Secret, side: &[u8], caller: &[u8; NONCE], answerer: &[u8; NONCE]) -> Hmac<Sha256> {
    let mac = Hmac::<Sha256>::new_from_slice(secret.bytes()).expect("an HMAC takes keys of any length");
    mac.chain_update(MAGIC)
        .chain_update([PROTOCOL])
        .chain_update(side)
        .chain_update(caller)
        .chain_update(answerer)
}

/// Writes a message: its length, then JSON.
pub(crate) fn write_message(sink: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).ok().filter(|length| *length <= LONGEST_MESSAGE);
    let length = length.ok_or_else(|| io::Error::other("a message is too long"))?;
    sink.write_all(&[length.to_le_bytes().as_slice(), &text].concat())
}

/// Reads a message.
pub(crate) fn read_message<T: DeserializeOwned>(source: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    source.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > LONGEST_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {length} bytes")));
    }
    let mut text = vec![0; length as usize];
    source.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// A connection whose reads and writes together end at a time.
struct Timed<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }

    fn release(self) -> io::Result<()> {
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    const LIMIT: Duration = Duration::from_secs(5);

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let here = TcpStream::connect(listener.local_addr().expect("an address")).expect("it listens");
        (here, listener.accept().expect("it calls").0)
    }

    fn greeting(rank: usize) -> Greeting {
        Greeting { version: "1".to_owned(), rank, ranks: 2, port: 9 }
    }

    #[test]
    fn two_that_know_the_secret_greet() {
        let ((here, there), secret) = (pair(), Secret::new("s"));
        thread::scope(|scope| {
            let answered = scope.spawn(|| answer(&there, &secret, &greeting(0), LIMIT).expect("it knows"));
            assert_eq!(call(&here, &secret, &greeting(1), LIMIT).expect("it knows"), greeting(0));
            assert_eq!(answered.join().expect("no panic"), greeting(1));
        });
    }

    #[test]
    fn both_find_out_another_secret_and_neither_says_its_own() {
        let (here, there) = pair();
        thread::scope(|scope| {
            let answered = scope.spawn(|| answer(&there, &Secret::new("ours"), &greeting(0), LIMIT));
            assert!(matches!(call(&here, &Secret::new("theirs"), &greeting(1), LIMIT), Err(Failed::Secret)));
            assert!(matches!(answered.join().expect("no panic"), Err(Failed::Secret)));
        });
    }

    #[test]
    fn a_proof_sent_back_to_its_maker_proves_nothing() {
        let (mut here, there) = pair();
        thread::scope(|scope| {
            let answered = scope.spawn(|| answer(&there, &Secret::new("s"), &greeting(0), LIMIT));
            here.write_all(&hello(&[7; NONCE])).expect("it reads");
            let mut said = [0; MAGIC.len() + 1 + NONCE + PROOF];
            here.read_exact(&mut said).expect("it answers");
            here.write_all(&said[said.len() - PROOF..]).expect("it reads");
            assert!(matches!(answered.join().expect("no panic"), Err(Failed::Secret)));
        });
    }

    #[test]
    fn one_that_drips_does_not_prolong_the_limit() {
        let (mut here, there) = pair();
        thread::scope(|scope| {
            let limit = Duration::from_millis(300);
            let answered = scope.spawn(move || {
                let failed = answer(&there, &Secret::new("s"), &greeting(0), limit);
                drop(there);
                failed
            });
            // A byte each 50 ms takes two seconds for the hello; writing fails when the other side has closed.
            let hello = hello(&[7; NONCE]);
            let sent = hello.iter().take_while(|byte| {
                thread::sleep(Duration::from_millis(50));
                here.write_all(&[**byte]).is_ok()
            });
            assert!(sent.count() < hello.len());
            assert!(matches!(answered.join().expect("no panic"), Err(Failed::Silent)));
        });
    }

    #[test]
    fn another_protocol_is_told_from_garbage() {
        for (said, expected) in [
            (b"ctq-mesh\x09".as_slice(), "version 9 of the protocol"),
            (b"\x16\x03\x01\x00", "it is not ctq, it said `\\x16\\x03\\x01\\x00`"),
            (b"ctq-mush", "it is not ctq, it said `ctq-mush`"),
        ] {
            let (mut here, there) = pair();
            here.write_all(said).expect("it reads");
            let failed =
                answer(&there, &Secret::new("s"), &greeting(0), LIMIT).expect_err("that is no hello");
            assert!(failed.to_string().contains(expected), "{failed}");
        }
    }

    #[test]
    fn a_message_that_is_too_long_is_not_read() {
        let text = [u32::MAX.to_le_bytes().as_slice(), b"{}"].concat();
        let error = read_message::<Greeting>(&mut text.as_slice()).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
