//! Gathers between real devices, or between two that are one, where this machine has one; otherwise these tests say so
//! and pass.
#![expect(clippy::print_stdout, reason = "says what a test found, or why it is skipped")]

use std::thread;

use crate::KernelError;
use crate::backend::Backend;
use crate::collective::{Collective, InProcess, PeerCopies};
use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::cuda::driver::{CudaDevice, Nccl, NcclLibrary, probe};

/// Tall enough that copies take a while.
const ROWS: usize = 4096;

/// Every device that can be used, and the first one again as often as `at_least` takes.
fn devices(at_least: usize) -> Option<(Vec<CudaDevice>, Option<NcclLibrary>)> {
    let machine = match probe() {
        Ok(machine) => machine,
        Err(why) => {
            println!("skipped: {why}");
            return None;
        }
    };
    let mut ordinals = machine.usable();
    while ordinals.len() < at_least {
        ordinals.push(ordinals[0]);
    }
    let open =
        |ordinal: &usize| CudaDevice::open(&machine, *ordinal, None, None).expect("a device that opens");
    let devices: Vec<CudaDevice> = ordinals.iter().map(open).collect();
    CudaDevice::connect(&devices.iter().collect::<Vec<_>>()).expect("devices that reach one another");
    println!("ranks on {ordinals:?}");
    let nccl =
        machine.nccl.as_ref().ok().map(|found| NcclLibrary::load(&found.path).expect("it was loaded before"));
    Some((devices, nccl))
}

/// Of one rank in one round: numbers that say where they belong.
fn values(rank: usize, width: usize, round: usize) -> Vec<f32> {
    (0..ROWS * width).map(|index| (index * 8 + rank + 1000 * round) as f32).collect()
}

/// Gathers a few times, in parts that are freed at once, and holds what comes out against what went in.
fn gathers(rank: &dyn Collective<Cuda<CudaDevice>>, backend: &Cuda<CudaDevice>, widths: &[usize]) {
    let gather = |round: usize| -> Result<Vec<f32>, KernelError> {
        let width = widths[rank.rank()];
        let mut part = backend.zeros(ROWS, width)?;
        if width > 0 {
            backend.add(&mut part, &backend.upload(width, &values(rank.rank(), width, round))?)?;
        }
        backend.download(&rank.all_gather(backend, part, widths)?)
    };
    for round in 0..5 {
        let found = gather(round).expect("a gather");
        let parts: Vec<Vec<f32>> =
            widths.iter().enumerate().map(|(rank, width)| values(rank, *width, round)).collect();
        let row =
            |row: usize| parts.iter().zip(widths).flat_map(move |(part, w)| &part[row * w..(row + 1) * w]);
        let expected: Vec<f32> = (0..ROWS).flat_map(row).copied().collect();
        assert!(found == expected, "{widths:?}, rank {}, round {round}", rank.rank());
    }
}

/// Widths of ranks: all alike, and no two alike.
fn shapes(ranks: usize) -> [Vec<usize>; 2] {
    [vec![96; ranks], (0..ranks).map(|rank| 33 * rank).collect()]
}

#[test]
fn devices_gather_by_copies() {
    let Some((devices, _)) = devices(2) else { return };
    let backends: Vec<Cuda<CudaDevice>> = devices.into_iter().map(Cuda::new).collect();
    for widths in shapes(backends.len()) {
        let team = PeerCopies::team(backends.len());
        thread::scope(|scope| {
            for (rank, backend) in team.iter().zip(&backends) {
                scope.spawn(|| gathers(rank, backend, &widths));
            }
        });
    }
}

#[test]
fn devices_gather_by_nccl() {
    let Some((devices, nccl)) = devices(1) else { return };
    let Some(nccl) = nccl else { return println!("skipped: there is no NCCL") };
    let backends: Vec<Cuda<CudaDevice>> = devices.into_iter().map(Cuda::new).collect();
    let shapes = shapes(backends.len());
    thread::scope(|scope| {
        for (peers, backend) in InProcess::<Cpu>::team(backends.len()).into_iter().zip(&backends) {
            let shapes = &shapes;
            scope.spawn(move || {
                let rank = Nccl::join(backend.device(), nccl, peers).expect("it joins");
                shapes.iter().for_each(|widths| gathers(&rank, backend, widths));
            });
        }
    });
}
