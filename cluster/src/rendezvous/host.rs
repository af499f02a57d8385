//! Rank 0: whom the others come to.

use std::io;
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use super::door::{Door, listen_everywhere};
use super::reach::resolve;
use super::{Event, Joined, Message, Place, Reason, check, listen, name, note, system};
use crate::error::Error;
use crate::handshake::{Greeting, write_message};
use crate::launch::Launch;
use crate::limits::Limits;

/// How long ranks that come in are still told why there will be no job.
const GRACE: Duration = Duration::from_millis(300);

/// Waits for all ranks, and for all to be connected.
pub(super) fn gather(launch: &Launch, version: &str, limits: Limits) -> Result<Joined, Error> {
    let places = resolve(&launch.address, launch.port, limits.handshake)?;
    let own_ip = places[0].ip();
    // A name that is loopback here may be something else on other nodes.
    let here = own_ip.is_loopback() && launch.local_ranks.is_none_or(|here| here == launch.ranks);
    let bound = if here { TcpListener::bind(places[0]) } else { listen_everywhere(launch.port) };
    let listener = bound.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => Error::PortTaken { port: launch.port },
        _ => system(&format!("listening on port {}", launch.port), error),
    })?;
    let own = Greeting { version: version.to_owned(), rank: 0, ranks: launch.ranks, port: launch.port };
    let (tell, told) = mpsc::channel();
    let door = Door::open(listener, &launch.secret, &own, limits.handshake, tell.clone())
        .map_err(|error| system("a thread", error))?;

    let guests = (0..launch.ranks).map(|_| None).collect();
    let door = Some(door);
    let mut host = Host { own, guests, wait: limits.wait, door, tell, told, notes: Vec::new() };
    match host.gather().and_then(|()| host.settle()) {
        Ok(()) => Ok(host.joined(own_ip)),
        Err(error) => {
            host.refuse(&error);
            Err(error)
        }
    }
}

struct Guest {
    socket: TcpStream,
    place: Place,
    ready: bool,
}

impl Guest {
    fn name(&self, rank: usize) -> String {
        name(rank, self.place.ip)
    }
}

struct Host {
    own: Greeting,
    /// One a rank; none for rank 0 and for those that have not come.
    guests: Vec<Option<Guest>>,
    wait: Duration,
    /// Open until all have come.
    door: Option<Door>,
    tell: Sender<Event>,
    told: Receiver<Event>,
    notes: Vec<String>,
}

impl Host {
    fn next(&self, until: Instant) -> Option<Event> {
        self.told.recv_timeout(until.saturating_duration_since(Instant::now())).ok()
    }

    fn without(&self, wanting: impl Fn(&Option<Guest>) -> bool) -> Vec<usize> {
        (1..self.own.ranks).filter(|rank| wanting(&self.guests[*rank])).collect()
    }

    fn missing(&self, missing: Vec<usize>) -> Error {
        let came = self.own.ranks - missing.len();
        let (ranks, wait, port) = (self.own.ranks, self.wait, self.own.port);
        Error::Missing { missing, came, ranks, wait, port, notes: self.notes.clone() }
    }

    /// Until every rank has come.
    fn gather(&mut self) -> Result<(), Error> {
        let until = Instant::now() + self.wait;
        loop {
            let missing = self.without(Option::is_none);
            if missing.is_empty() {
                return Ok(());
            }
            match self.next(until) {
                None => return Err(self.missing(missing)),
                Some(Event::Arrived { greeting, socket, ip }) => self.admit(&greeting, socket, ip)?,
                Some(event) => self.other(event)?,
            }
        }
    }

    fn admit(&mut self, greeting: &Greeting, mut socket: TcpStream, ip: IpAddr) -> Result<(), Error> {
        let rank = greeting.rank;
        let checked =
            check(&self.own, greeting, &name(rank, ip)).and_then(|()| match self.guests.get(rank) {
                Some(None) if rank > 0 => Ok(()),
                Some(None) => {
                    Err(Error::Twice { rank, first: "rank 0 itself".to_owned(), second: ip.to_string() })
                }
                Some(Some(first)) => {
                    Err(Error::Twice { rank, first: first.place.ip.to_string(), second: ip.to_string() })
                }
                None => Err(Error::Ranks { rank: name(rank, ip), theirs: rank + 1, ours: self.own.ranks }),
            });
        if let Err(error) = checked {
            let _ = write_message(&mut socket, &Message::Refused(Reason::from(&error)));
            return Err(error);
        }
        let tell = self.tell.clone();
        let last = |message: &Message| matches!(message, Message::Ready | Message::Failed(_));
        listen(rank, &socket, last, move |event| drop(tell.send(event)))?;
        let place = Place { ip, port: greeting.port };
        self.guests[rank] = Some(Guest { socket, place, ready: false });
        Ok(())
    }

    /// What happens beside arrivals.
    fn other(&mut self, event: Event) -> Result<(), Error> {
        let named = |rank: usize| {
            self.guests[rank].as_ref().map_or_else(|| format!("rank {rank}"), |guest| guest.name(rank))
        };
        match event {
            Event::Stranger { note: what } => note(&mut self.notes, what),
            Event::Arrived { greeting, ip, .. } => {
                let what =
                    format!("a connection from {ip} was dropped: rank {} was there already", greeting.rank);
                note(&mut self.notes, what);
            }
            Event::Gone { rank } => return Err(Error::Lost { rank: named(rank) }),
            Event::Said { rank, message: Message::Failed(Reason { text, may_pass }) } => {
                return Err(Error::Failed { rank: named(rank), reason: text, may_pass });
            }
            Event::Said { rank, .. } => {
                if let Some(guest) = &mut self.guests[rank] {
                    guest.ready = true;
                }
            }
            // Rank 0 connects to nobody.
            Event::Reached { .. } | Event::NotReached { .. } => {}
        }
        Ok(())
    }

    /// Hands out the roster; until every rank is connected to all.
    fn settle(&mut self) -> Result<(), Error> {
        self.door = None;
        let nobody = Place { ip: IpAddr::from([0, 0, 0, 0]), port: 0 };
        let place = |guest: &Option<Guest>| guest.as_ref().map_or(nobody, |guest| guest.place);
        self.say(&Message::Roster(self.guests.iter().map(place).collect()));
        let until = Instant::now() + self.wait;
        loop {
            let unready = self.without(|guest| guest.as_ref().is_none_or(|guest| !guest.ready));
            if unready.is_empty() {
                break;
            }
            match self.next(until) {
                None => return Err(self.missing(unready)),
                Some(event) => self.other(event)?,
            }
        }
        self.say(&Message::Go);
        Ok(())
    }

    /// A rank that is gone is found out by who listens to it.
    fn say(&mut self, message: &Message) {
        for guest in self.guests.iter_mut().flatten() {
            let _ = guest.socket.set_write_timeout(Some(Duration::from_secs(1)));
            let _ = write_message(&mut guest.socket, message);
        }
    }

    /// Tells all that are there why there will be no job, and those that are just coming in.
    fn refuse(&mut self, error: &Error) {
        let refused = Message::Refused(Reason::from(error));
        self.say(&refused);
        for guest in self.guests.iter().flatten() {
            let _ = guest.socket.shutdown(Shutdown::Write);
        }
        let until = Instant::now() + GRACE;
        while let Some(event) = self.next(until) {
            if let Event::Arrived { mut socket, .. } = event {
                let _ = write_message(&mut socket, &refused);
            }
        }
    }

    fn joined(self, own_ip: IpAddr) -> Joined {
        let name_of = |(rank, guest): (usize, &Option<Guest>)| {
            guest.as_ref().map_or_else(|| name(rank, own_ip), |guest| guest.name(rank))
        };
        let names = self.guests.iter().enumerate().map(name_of).collect();
        let sockets = self.guests.into_iter().map(|guest| guest.map(|guest| guest.socket)).collect();
        Joined { sockets, names, notes: self.notes }
    }
}
