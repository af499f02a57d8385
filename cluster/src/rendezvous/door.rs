//! Where other ranks come in: a listening port whose visitors are each heard by a thread of their own, so that one who
//! says nothing keeps nobody waiting.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::Event;
use crate::handshake::{Greeting, answer};
use crate::launch::Secret;

/// How often the door is looked at: `accept` cannot be called off.
const LOOK: Duration = Duration::from_millis(5);

/// An open door; closed when dropped.
pub(super) struct Door {
    closed: Arc<AtomicBool>,
    porter: Option<JoinHandle<()>>,
}

/// Who says who comes in.
struct Porter {
    secret: Secret,
    own: Greeting,
    limit: Duration,
    tell: Sender<Event>,
    closed: Arc<AtomicBool>,
    /// Visitors that are being heard.
    inside: AtomicUsize,
}

/// Listens where ranks of other machines come in too.
pub(super) fn listen_everywhere(port: u16) -> io::Result<TcpListener> {
    // Both families, where the machine has both.
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
        }
        bound => bound,
    }
}

impl Door {
    pub(super) fn open(
        listener: TcpListener,
        secret: &Secret,
        own: &Greeting,
        limit: Duration,
        tell: Sender<Event>,
    ) -> io::Result<Door> {
        listener.set_nonblocking(true)?;
        let closed = Arc::new(AtomicBool::new(false));
        let (secret, own) = (secret.clone(), own.clone());
        let inside = AtomicUsize::new(0);
        let porter = Arc::new(Porter { secret, own, limit, tell, closed: Arc::clone(&closed), inside });
        let porter =
            thread::Builder::new().name("ctq-door".to_owned()).spawn(move || porter.work(&listener))?;
        Ok(Door { closed, porter: Some(porter) })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        if let Some(porter) = self.porter.take() {
            let _ = porter.join();
        }
    }
}

impl Porter {
    fn work(self: &Arc<Porter>, listener: &TcpListener) {
        while !self.closed.load(Ordering::Relaxed) {
            // No connection, or one that has ended already, or no file descriptor for it: later.
            let Ok((socket, from)) = listener.accept() else {
                thread::sleep(LOOK);
                continue;
            };
            // More at once than there are ranks to come are not ranks.
            if self.inside.fetch_add(1, Ordering::Relaxed) > self.own.ranks + 64 {
                self.inside.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let porter = Arc::clone(self);
            let visit = move || {
                porter.hear(socket, from.ip().to_canonical());
                porter.inside.fetch_sub(1, Ordering::Relaxed);
            };
            if thread::Builder::new().name("ctq-visitor".to_owned()).spawn(visit).is_err() {
                self.inside.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn hear(&self, socket: TcpStream, ip: IpAddr) {
        // Some systems hand the listener's mode on.
        let heard = socket
            .set_nonblocking(false)
            .map_err(Into::into)
            .and_then(|()| answer(&socket, &self.secret, &self.own, self.limit));
        let event = match heard {
            Ok(greeting) => Event::Arrived { greeting, socket, ip },
            Err(failed) => Event::Stranger { note: format!("a connection from {ip} was dropped: {failed}") },
        };
        let _ = self.tell.send(event);
    }
}
