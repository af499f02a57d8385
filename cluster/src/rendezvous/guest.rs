//! Every rank but the first: who comes to rank 0, and then connects to the others.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::door::{Door, listen_everywhere};
use super::reach::{Call, Unreached, resolve};
use super::{Event, Joined, Message, Place, Reason, check, listen, name, note, system};
use crate::error::Error;
use crate::handshake::{Greeting, write_message};
use crate::launch::{Launch, Secret};
use crate::limits::Limits;

/// Comes to rank 0, and connects to all others.
pub(super) fn join(launch: &Launch, version: &str, limits: Limits) -> Result<Joined, Error> {
    let until = Instant::now() + limits.wait;
    let places = resolve(&launch.address, launch.port, limits.handshake)?;
    let here = places[0].ip().is_loopback() && launch.local_ranks.is_none_or(|here| here == launch.ranks);
    let bound = if here { TcpListener::bind((places[0].ip(), 0)) } else { listen_everywhere(0) };
    let bound = bound.and_then(|listener| Ok((listener.local_addr()?.port(), listener)));
    let (port, listener) = bound.map_err(|error| system("a port to listen on", error))?;
    let own = Greeting { version: version.to_owned(), rank: launch.rank, ranks: launch.ranks, port };
    let (tell, told) = mpsc::channel();
    let _door = Door::open(listener, &launch.secret, &own, limits.handshake, tell.clone())
        .map_err(|error| system("a thread", error))?;

    let root = reach_root(launch, &own, &places, until, limits)?;
    let root_ip = root.peer_addr().map_err(|error| system("a connection", error))?.ip().to_canonical();
    let heard = tell.clone();
    let last = |message: &Message| matches!(message, Message::Go | Message::Refused(_));
    listen(0, &root, last, move |event| drop(heard.send(event)))?;

    let sockets = (0..launch.ranks).map(|_| None).collect();
    let names = (0..launch.ranks).map(|rank| format!("rank {rank}")).collect();
    let joined = Joined { sockets, names, notes: Vec::new() };
    // Rank 0 says so when time is up; this is for a rank 0 that cannot.
    let until = Instant::now() + limits.wait * 2 + limits.handshake;
    let mut guest =
        Guest { own, root, root_ip, secret: launch.secret.clone(), limits, until, tell, told, joined };
    let met = guest.meet();
    if let Err(error) = &met
        && !matches!(error, Error::Refused { .. } | Error::Lost { .. })
    {
        let _ = guest.root.set_write_timeout(Some(Duration::from_secs(1)));
        let _ = write_message(&mut guest.root, &Message::Failed(Reason::from(error)));
    }
    met?;
    let mut joined = guest.joined;
    joined.sockets[0] = Some(guest.root);
    Ok(joined)
}

fn reach_root(
    launch: &Launch,
    own: &Greeting,
    places: &[SocketAddr],
    until: Instant,
    limits: Limits,
) -> Result<TcpStream, Error> {
    let place = format!("{}:{}", launch.address, launch.port);
    let call = Call { places, secret: &launch.secret, own, handshake: limits.handshake, until };
    let (socket, greeting) = call.reach().map_err(|unreached| match unreached {
        Unreached::Late(last) => Error::Unreachable { place: place.clone(), wait: limits.wait, last },
        Unreached::Wrong(error) => error,
    })?;
    if greeting.rank != 0 {
        return Err(Error::Stranger { place, found: greeting.rank, expected: 0 });
    }
    check(own, &greeting, &format!("rank 0 ({})", launch.address))?;
    Ok(socket)
}

struct Guest {
    own: Greeting,
    root: TcpStream,
    root_ip: IpAddr,
    secret: Secret,
    limits: Limits,
    until: Instant,
    tell: Sender<Event>,
    told: Receiver<Event>,
    /// What there is so far.
    joined: Joined,
}

impl Guest {
    fn meet(&mut self) -> Result<(), Error> {
        let roster = loop {
            if let Some(Message::Roster(roster)) = self.step()? {
                break roster;
            }
        };
        self.call_lower(&roster)?;
        let missing = |joined: &Joined, own: usize| {
            let mut sockets = joined.sockets.iter().enumerate().skip(1);
            sockets.any(|(rank, socket)| rank != own && socket.is_none())
        };
        while missing(&self.joined, self.own.rank) {
            self.step()?;
        }
        // Where rank 0 is gone, listening to it tells.
        let _ = write_message(&mut self.root, &Message::Ready);
        while !matches!(self.step()?, Some(Message::Go)) {}
        Ok(())
    }

    /// Waits for the next event; returns what rank 0 says.
    fn step(&mut self) -> Result<Option<Message>, Error> {
        let root = || name(0, self.root_ip);
        let left = self.until.saturating_duration_since(Instant::now());
        let Ok(event) = self.told.recv_timeout(left) else {
            return Err(Error::Lost { rank: root() });
        };
        match event {
            Event::Said { message: Message::Refused(Reason { text, may_pass }), .. } => {
                return Err(Error::Refused { reason: text, may_pass });
            }
            Event::Said { message, .. } => return Ok(Some(message)),
            Event::Gone { .. } => return Err(Error::Lost { rank: root() }),
            Event::NotReached { error } => return Err(error),
            Event::Reached { rank, socket } => self.joined.sockets[rank] = Some(socket),
            Event::Stranger { note: what } => note(&mut self.joined.notes, what),
            Event::Arrived { greeting, socket, ip } => {
                let rank = greeting.rank;
                check(&self.own, &greeting, &name(rank, ip))?;
                match self.joined.sockets.get_mut(rank) {
                    Some(place @ None) if rank > self.own.rank => *place = Some(socket),
                    Some(_) | None => {
                        let what = format!("a connection from {ip} was dropped: it says it is rank {rank}");
                        note(&mut self.joined.notes, what);
                    }
                }
            }
        }
        Ok(None)
    }

    /// Connects to the ranks between rank 0 and this one, each from a thread of its own.
    fn call_lower(&mut self, roster: &[Place]) -> Result<(), Error> {
        if roster.len() != self.own.ranks {
            return Err(Error::Ranks {
                rank: name(0, self.root_ip),
                theirs: roster.len(),
                ours: self.own.ranks,
            });
        }
        // Rank 0 reaches ranks of its own machine by the loopback; others reach them where they reach rank 0.
        let ip_of = |place: &Place| if place.ip.is_loopback() { self.root_ip } else { place.ip };
        for (rank, place) in roster.iter().enumerate() {
            let ip = if rank == 0 { self.root_ip } else { ip_of(place) };
            self.joined.names[rank] = name(rank, ip);
        }
        for (rank, place) in roster.iter().enumerate().take(self.own.rank).skip(1) {
            let at = SocketAddr::new(ip_of(place), place.port);
            let (own, secret, tell) = (self.own.clone(), self.secret.clone(), self.tell.clone());
            let handshake = self.limits.handshake;
            let call = move || {
                let until = Instant::now() + handshake;
                let call = Call { places: &[at], secret: &secret, own: &own, handshake, until };
                let _ = tell.send(reached(rank, at, call.reach(), &own));
            };
            let thread = thread::Builder::new().name(format!("ctq-call-{rank}")).spawn(call);
            thread.map_err(|error| system("a thread", error))?;
        }
        Ok(())
    }
}

fn reached(
    rank: usize,
    at: SocketAddr,
    reached: Result<(TcpStream, Greeting), Unreached>,
    own: &Greeting,
) -> Event {
    let place = at.to_string();
    let error = match reached {
        Ok((socket, greeting)) if greeting.rank == rank => {
            return match check(own, &greeting, &name(rank, at.ip())) {
                Ok(()) => Event::Reached { rank, socket },
                Err(error) => Event::NotReached { error },
            };
        }
        Ok((_, greeting)) => Error::Stranger { place, found: greeting.rank, expected: rank },
        Err(Unreached::Wrong(error)) => error,
        Err(Unreached::Late(last)) => Error::NoWay { from: own.rank, to: rank, place, last },
    };
    Event::NotReached { error }
}
