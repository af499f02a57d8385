//! The ranks of a layout on the devices there are: threads of this process, or this process among others.

use std::collections::BTreeSet;
use std::num::NonZero;

use ctq_cluster::{Group, OverHost};
use ctq_kernels::collective::{Collective, PeerCopies, Peers, Rank};
use ctq_kernels::cpu::Cpu;
use ctq_kernels::cuda::Cuda;
use ctq_kernels::cuda::driver::{CudaDevice, Nccl, NcclLibrary};
use ctq_kernels::{Backend, KernelError};
use ctq_runtime::{Layout, crew};

use crate::device::{Gpus, Opened};
use crate::machine;
use crate::party::ToldByParty;

/// Something to do on several seats, whichever backend computes.
pub(crate) trait OnSeats {
    /// What it gives.
    type Output;

    /// Does it on what `seats` hands out, which is made anew each time it is asked.
    fn run<B: Backend + 'static>(self, seats: &dyn Seats<B>) -> Self::Output;
}

/// Hands out the ranks of a layout.
pub(crate) trait Seats<B: Backend> {
    /// All ranks of a layout in this process, in the order of its seats.
    fn in_process(&self, layout: &Layout) -> Vec<Rank<B>>;

    /// The rank of a process that shares a stage with the processes of `group`.
    ///
    /// # Errors
    /// Where they cannot be reached.
    fn one(&self, group: ToldByParty<Group>) -> Result<Rank<B>, KernelError>;
}

impl Seats<Cpu> for Cpu {
    fn in_process(&self, layout: &Layout) -> Vec<Rank<Cpu>> {
        crew::ranks(layout, || *self)
    }

    fn one(&self, group: ToldByParty<Group>) -> Result<Rank<Cpu>, KernelError> {
        Ok(match group.ranks() {
            1 => Rank::alone(*self),
            _ => Rank::new(*self, Box::new(OverHost::new(group))),
        })
    }
}

impl Seats<Cuda<CudaDevice>> for Gpus {
    fn in_process(&self, layout: &Layout) -> Vec<Rank<Cuda<CudaDevice>>> {
        let devices = &self.devices;
        let backends: Vec<_> =
            (0..layout.seats()).map(|seat| devices[seat % devices.len()].another_rank()).collect();
        let teams = backends.chunks(layout.ranks).flat_map(|team| PeerCopies::team(team.len()));
        let collectives: Vec<Box<dyn Collective<_>>> = teams.map(|one| Box::new(one) as _).collect();
        backends.into_iter().zip(collectives).map(|(b, c)| Rank::new(b, c)).collect()
    }

    fn one(&self, group: ToldByParty<Group>) -> Result<Rank<Cuda<CudaDevice>>, KernelError> {
        let backend = self.devices[0].another_rank();
        if group.ranks() == 1 {
            return Ok(Rank::alone(backend));
        }
        match self.shared_library(&group)? {
            Some(library) => {
                let nccl = Nccl::join(backend.device(), library, group)?;
                Ok(Rank::new(backend, Box::new(nccl)))
            }
            None => Ok(Rank::new(backend, Box::new(OverHost::new(group)))),
        }
    }
}

impl Gpus {
    /// The library, where every rank of a group has it and a GPU of its own, which it demands. All ranks decide alike.
    fn shared_library(&self, group: &ToldByParty<Group>) -> Result<Option<NcclLibrary>, KernelError> {
        let own = match &self.nccl {
            Ok(_) => self.devices[0].device().identifier()?,
            Err(_) => String::new(),
        };
        let all = group.exchange(vec![own.into_bytes(); group.ranks()])?;
        let different: BTreeSet<&Vec<u8>> = all.iter().filter(|identifier| !identifier.is_empty()).collect();
        Ok(self.nccl.as_ref().ok().filter(|_| different.len() == group.ranks()).copied())
    }
}

impl Opened {
    /// Runs a task on seats, which share the devices where there are more seats.
    pub(crate) fn on_seats<T: OnSeats>(&self, task: T) -> T::Output {
        match self {
            Opened::Cpu(cpu) => task.run(cpu),
            Opened::Cuda(gpus) => task.run(gpus),
        }
    }
}

/// Workers of each of `seats` seats: what was asked for, or there is, and never none.
pub(crate) fn threads_of_seat(asked: Option<usize>, seats: usize) -> NonZero<usize> {
    let threads = asked.unwrap_or_else(machine::threads).div_ceil(seats);
    NonZero::new(threads).unwrap_or(NonZero::<usize>::MIN)
}
