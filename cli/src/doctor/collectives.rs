//! What ranks hand one another, held against what went in: two ranks on one GPU, all GPUs, and NCCL on one.

use ctq_kernels::check::{Bound, Finding};
use ctq_kernels::collective::{Alone, Collective, PeerCopies};
use ctq_kernels::cuda::Cuda;
use ctq_kernels::cuda::driver::{CudaDevice, Nccl};
use ctq_kernels::{Backend, KernelError};

use crate::device::Gpus;

const ROWS: usize = 67;

/// Columns of each rank, in turn: whole tiles, odd ones, none.
const WIDTHS: [usize; 3] = [128, 37, 0];

/// All cases that this machine has devices for.
pub(super) fn check(gpus: &Gpus) -> Vec<Finding> {
    let first = || gpus.devices[0].another_rank();
    let mut findings = vec![copies("two ranks on one GPU".to_owned(), &[first(), first()])];
    if gpus.devices.len() > 1 {
        let all: Vec<_> = gpus.devices.iter().map(Cuda::another_rank).collect();
        findings.push(copies(format!("{} GPUs", all.len()), &all));
    }
    if let Ok(library) = &gpus.nccl {
        let case = format!("NCCL {}, one rank", library.version());
        let nccl = Nccl::join(gpus.devices[0].device(), *library, Alone);
        findings.push(finding(case, nccl.and_then(|nccl| gather(&first(), &nccl, &WIDTHS[..1]))));
    }
    findings
}

/// Ranks that are threads of this process.
fn copies(case: String, backends: &[Cuda<CudaDevice>]) -> Finding {
    let widths: Vec<usize> = (0..backends.len()).map(|rank| WIDTHS[rank % WIDTHS.len()]).collect();
    let teams = PeerCopies::team(backends.len());
    let outcome = std::thread::scope(|scope| {
        let start = |(backend, peers)| {
            let widths = &widths;
            scope.spawn(move || gather(backend, &peers, widths))
        };
        let ranks: Vec<_> = backends.iter().zip(teams).map(start).collect();
        ranks.into_iter().try_fold(true, |equal, rank| {
            Ok(equal & rank.join().map_err(|_| lost("a rank panicked".to_owned()))??)
        })
    });
    finding(case, outcome)
}

fn lost(what: String) -> KernelError {
    KernelError::Lost { what }
}

/// Whether the columns of all ranks come back side by side.
fn gather<C: Collective<Cuda<CudaDevice>>>(
    backend: &Cuda<CudaDevice>,
    peers: &C,
    widths: &[usize],
) -> Result<bool, KernelError> {
    let value = |rank: usize, row: usize, column: usize| (rank * 100_000 + row * 200 + column) as f32;
    let row_of = |rank: usize, row: usize| (0..widths[rank]).map(move |column| value(rank, row, column));
    let own: Vec<f32> = (0..ROWS).flat_map(|row| row_of(peers.rank(), row)).collect();
    let all: Vec<f32> =
        (0..ROWS).flat_map(|row| (0..widths.len()).flat_map(move |rank| row_of(rank, row))).collect();
    let whole = peers.all_gather(backend, backend.upload(widths[peers.rank()], &own)?, widths);
    let whole = whole.inspect_err(|error| peers.abort(&error.to_string()))?;
    Ok(backend.download(&whole)? == all)
}

fn finding(case: String, equal: Result<bool, KernelError>) -> Finding {
    let failure = match equal {
        Ok(true) => None,
        Ok(false) => Some("what comes back is not what went in".to_owned()),
        Err(error) => Some(error.to_string()),
    };
    let error = if failure.is_none() { 0.0 } else { f64::INFINITY };
    Finding { operation: "all-gather", case, bound: Bound::Bits, error, failure }
}
