//! Connecting to a rank that may not listen yet.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::handshake::{Failed, Greeting, call};
use crate::launch::Secret;

/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// Addresses of rank 0. Names that do not resolve are asked for again until `limit`: a node may be new.
pub(super) fn resolve(address: &str, port: u16, limit: Duration) -> Result<Vec<SocketAddr>, Error> {
    let until = Instant::now() + limit;
    // As in a URL.
    let host = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    loop {
        let source = match (host, port).to_socket_addrs() {
            Ok(places) => {
                let mut places: Vec<SocketAddr> = places.collect();
                // Where a machine meets itself all ranks take the same family, and one that is always there.
                places.sort_by_key(|place| place.ip().is_loopback() && place.is_ipv6());
                if !places.is_empty() {
                    return Ok(places);
                }
                io::Error::other("it has no address")
            }
            Err(error) => error,
        };
        if Instant::now() + PAUSE > until {
            return Err(Error::Unresolved { address: address.to_owned(), source });
        }
        thread::sleep(PAUSE);
    }
}

/// Who is called, and as whom.
pub(super) struct Call<'a> {
    pub(super) places: &'a [SocketAddr],
    pub(super) secret: &'a Secret,
    pub(super) own: &'a Greeting,
    /// Of one handshake.
    pub(super) handshake: Duration,
    pub(super) until: Instant,
}

/// Why nobody was reached.
pub(super) enum Unreached {
    /// In all the time; what came of the last attempt.
    Late(String),
    /// Somebody else answers.
    Wrong(Error),
}

impl Call<'_> {
    /// Connects to whichever place answers first, and greets.
    pub(super) fn reach(&self) -> Result<(TcpStream, Greeting), Unreached> {
        let mut last = "it was not tried".to_owned();
        loop {
            for place in self.places {
                match self.attempt(*place) {
                    Ok(reached) => return Ok(reached),
                    Err(Unreached::Late(why)) => last = why,
                    Err(wrong) => return Err(wrong),
                }
            }
            if Instant::now() + PAUSE > self.until {
                return Err(Unreached::Late(last));
            }
            thread::sleep(PAUSE);
        }
    }

    fn attempt(&self, at: SocketAddr) -> Result<(TcpStream, Greeting), Unreached> {
        let late = |error: io::Error| Unreached::Late(error.to_string());
        let left = self.until.saturating_duration_since(Instant::now());
        let limit = self.handshake.min(left).max(Duration::from_millis(1));
        let socket = TcpStream::connect_timeout(&at, limit).map_err(late)?;
        // A free port of this machine that was tried can connect to itself.
        if socket.local_addr().map_err(late)? == at {
            return Err(Unreached::Late("nobody listens there".to_owned()));
        }
        let place = at.to_string();
        match call(&socket, self.secret, self.own, self.handshake) {
            Ok(greeting) => Ok((socket, greeting)),
            Err(Failed::Silent) => Err(Unreached::Wrong(Error::Silent { place, limit: self.handshake })),
            Err(Failed::NotCtq(answer)) => Err(Unreached::Wrong(Error::NotCtq { place, answer })),
            Err(Failed::Secret) => Err(Unreached::Wrong(Error::Secret { place })),
            Err(failed @ Failed::Protocol(_)) => {
                Err(Unreached::Wrong(Error::NotCtq { place, answer: format!("that {failed}") }))
            }
            // A listener that was just being closed does this, and one that has too many visitors.
            Err(failed @ (Failed::Closed | Failed::Io(_))) => Err(Unreached::Late(failed.to_string())),
        }
    }
}
