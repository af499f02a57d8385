//! Several processes, on one machine or many, that work as one.
//!
//! [`Launch`] says which of them this is, from what a launcher has set. [`World::join`] brings all of them together: a
//! rendezvous at rank 0, then a connection between every two. A [`World`] has groups whose members exchange bytes
//! ([`Group`]), pipes from one rank to another, and mail; where one rank is lost or gives up, whatever the others wait
//! for fails, with the name of that rank.
//!
//! Connections are authenticated with a secret of the job and are not encrypted: this is for a network that the job may
//! trust. Knows bytes and ranks; knows neither models nor devices.

mod collective;
mod error;
mod group;
mod handshake;
mod hosts;
mod launch;
mod limits;
mod link;
mod mesh;
mod pipe;
mod rendezvous;
mod world;

pub use collective::OverHost;
pub use error::Error;
pub use group::Group;
pub use launch::{Launch, Launcher, Secret};
pub use limits::Limits;
pub use link::Failure;
pub use pipe::{PipeFrom, PipeTo};
pub use world::World;
