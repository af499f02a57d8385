//! A packed model, a backend and windows of tokens make per-position scores.
//!
//! [`Engine`] is the layer loop: for each layer load, run all windows of a group, drop; the next layer is loaded
//! meanwhile. Inside a group, batches of windows go through a layer one after the other. There is no other path, so
//! memory is two layers, what a batch makes of itself and the hidden states of a group, and each weight is read once a
//! group. [`arrange`] gives windows, layers and rows to devices, [`plan()`] cuts the work of each by the memory there is,
//! and [`crew::run`] does it, with less where a device has no room. The scores do not depend on groups, batches, threads,
//! replicas, stages, ranks or interruptions.
//!
//! Knows blocks and their order; knows neither files, tokenizers nor protocols, and leaves arithmetic to the kernels.

mod block;
pub mod crew;
mod engine;
mod error;
mod experts;
mod groups;
mod head;
mod hidden;
mod last_layer;
mod layout;
mod lockstep;
mod needs;
mod observer;
mod parts;
mod plan;
mod plans;
mod rows;
mod schedule;
mod score;
mod snapshot;
mod stage;
mod traffic;
mod treatment;
mod watch;
mod weights;
mod work;
mod workers;

pub use engine::{Engine, Settings};
pub use error::{Error, Result};
pub use groups::groups;
pub use layout::{Arranged, CannotArrange, Layout, Seat, Wish, arrange};
pub use lockstep::Lockstep;
pub use needs::Needs;
pub use observer::Observer;
pub use plan::{PLENTY_TOKENS, Plan, Pool, Resources, TooSmall, plan};
pub use plans::{Plans, ReplicaPlan};
pub use schedule::{HiddenPlace, Schedule};
pub use score::HEAD_ROWS;
pub use snapshot::Snapshot;
pub use stage::Stage;
pub use traffic::{handed_on, received_in_layer};
pub use treatment::Acts;
pub use work::{Operations, Work};
pub use workers::Workers;
