//! All ranks of a job, seen from one of them: what the rest of ctq calls.

use std::sync::Arc;
use std::time::Duration;

use ctq_kernels::KernelError;

use crate::error::Error;
use crate::group::Group;
use crate::launch::Launch;
use crate::limits::Limits;
use crate::link::Failure;
use crate::mesh::{MAIL, Mesh};
use crate::pipe::{PipeFrom, PipeTo};
use crate::rendezvous;

/// All ranks of a job, connected every two. A rank that drops it without [`World::leave`] is lost to the others.
#[derive(Debug)]
pub struct World {
    mesh: Arc<Mesh>,
    notes: Vec<String>,
}

impl World {
    /// Brings all ranks of a launch together; returns when all are connected. `version` is the same for all.
    ///
    /// # Errors
    /// Where they do not all come, or do not belong together; other ranks fail for the same reason.
    pub fn join(launch: &Launch, version: &str, limits: Limits) -> Result<Arc<World>, Error> {
        let mut joined = rendezvous::join(launch, version, limits)?;
        if launch.secret.is_empty() {
            let note = "this job has no secret: any process that reaches its ports may join; set CTQ_TOKEN to one secret, the same for all ranks";
            joined.notes.push(note.to_owned());
        }
        let mesh = Mesh::start(launch.rank, joined.names, joined.sockets, limits)
            .map_err(|source| Error::System { what: "threads for connections".to_owned(), source })?;
        Ok(Arc::new(World { mesh, notes: joined.notes }))
    }

    /// Which rank this is, from 0.
    pub fn rank(&self) -> usize {
        self.mesh.rank()
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.mesh.ranks()
    }

    /// What errors call a rank: "rank 2 (10.0.0.3)".
    pub fn name(&self, rank: usize) -> String {
        self.mesh.name(rank).to_owned()
    }

    /// What happened while ranks came together that should not have, and did no harm.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Some ranks that exchange bytes, in this order. Groups that share ranks have different tags. All members make the
    /// same group.
    ///
    /// # Panics
    /// Where this rank is not one of them.
    pub fn group(&self, members: &[usize], tag: u16) -> Group {
        Group::new(Arc::clone(&self.mesh), members, tag)
    }

    /// A pipe to another rank, which makes [`World::pipe_from`] of this one with the same tag. Once a rank and tag.
    ///
    /// # Panics
    /// Where it is this rank, or there is none such.
    pub fn pipe_to(&self, rank: usize, tag: u16) -> PipeTo {
        assert!(rank != self.rank() && rank < self.ranks(), "a pipe leads to another rank");
        PipeTo::new(Arc::clone(&self.mesh), rank, tag)
    }

    /// The other end of [`World::pipe_to`].
    ///
    /// # Panics
    /// Where it is this rank, or there is none such.
    pub fn pipe_from(&self, rank: usize, tag: u16) -> PipeFrom {
        assert!(rank != self.rank() && rank < self.ranks(), "a pipe comes from another rank");
        PipeFrom::new(Arc::clone(&self.mesh), rank, tag)
    }

    /// Sends `bytes` to the inbox of a rank, which may be this one; returns at once.
    ///
    /// # Errors
    /// [`KernelError::Lost`] where a rank is lost or has given up.
    pub fn mail(&self, to: usize, bytes: Vec<u8>) -> Result<(), KernelError> {
        self.mesh.send(to, MAIL, bytes)
    }

    /// Takes the next mail and who sent it; `None` where none comes in `wait`. Mails of one rank come in their order.
    ///
    /// # Errors
    /// [`KernelError::Lost`] where a rank is lost or has given up, when all mail that came before is taken.
    pub fn inbox(&self, wait: Duration) -> Result<Option<(usize, Vec<u8>)>, KernelError> {
        self.mesh.mail(wait)
    }

    /// Gives up for all ranks: whatever they wait for fails with `reason` and this rank's name. Returns when they were
    /// told, or after a second. `exit` is the exit code that all should end with.
    pub fn abort(&self, reason: &str, exit: u8) {
        self.mesh.abort(reason, exit);
    }

    /// Why the job has failed. A process that ends because of it drops its world first, or waits for the call of
    /// [`World::on_failure`]: then the others were told.
    pub fn failure(&self) -> Option<Failure> {
        self.mesh.failure()
    }

    /// Calls back when the job fails, or has failed: once, from another thread, after other ranks were told (or a
    /// second). For whoever must end a rank whose threads wait for a device.
    pub fn on_failure(&self, callback: impl FnOnce(&Failure) + Send + 'static) {
        self.mesh.on_failure(Box::new(callback));
    }

    /// Says goodbye; returns when the others have read everything, or after the limit of silence. Afterwards every call
    /// fails. A rank that still waits for something of this one fails.
    pub fn leave(&self) {
        self.mesh.leave();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.mesh.close();
    }
}
