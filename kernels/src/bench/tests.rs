//! What is measured is what is told: bytes counted on their way, and by hand.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::collective::bytes_received;
use super::{Carried, Case, CollectiveTiming, Columns, Effort, Ends, Floor, MODELS, Model, Probe, cases};
use crate::backend::{Backend, KernelError};
use crate::collective::{Collective, InProcess, Peers, Pipe, Rank, team};
use crate::cpu::Cpu;
#[cfg(feature = "emulated")]
use crate::{
    collective::PeerCopies,
    cuda::{
        Cuda,
        emulated::{Emulated, Schedule},
    },
};

/// As little as there is: each case is done once to warm up, once to see how long it takes, and once.
const LEAST: Effort = Effort { rounds: 1, seconds: 0.0 };
const TIMES: usize = 3;

/// Numbers of 8 bytes that a rank tells each other one beside a measurement, and beside one of the floor.
const TOLD: usize = 7;

const TINY: Model = Model { name: "tiny", hidden: 160, inner: 96, heads: 3, vocabulary: 300 };

/// All that can be measured, of a model of no size to speak of.
fn tiny(tokens: usize) -> impl Iterator<Item = Case> {
    let of_model =
        Carried::ALL.into_iter().map(move |carried| Case::OfModel { carried, model: TINY, tokens });
    std::iter::once(Case::Byte).chain(of_model)
}

/// Counts bytes that come from other ranks as host bytes.
struct Counted {
    inner: InProcess<Cpu>,
    bytes: Arc<AtomicUsize>,
}

impl Peers for Counted {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn ranks(&self) -> usize {
        self.inner.ranks()
    }

    fn exchange(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, KernelError> {
        let all = self.inner.exchange(parts)?;
        let others = all.iter().enumerate().filter(|(from, _)| *from != self.rank());
        self.bytes.fetch_add(others.map(|(_, part)| part.len()).sum(), Ordering::Relaxed);
        Ok(all)
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }
}

impl Collective<Cpu> for Counted {
    fn all_gather(
        &self,
        cpu: &Cpu,
        part: <Cpu as Backend>::Buffer,
        widths: &[usize],
    ) -> Result<<Cpu as Backend>::Buffer, KernelError> {
        self.inner.all_gather(cpu, part, widths)
    }
}

/// Counts values that leave.
struct CountedPipe {
    inner: Box<dyn Pipe>,
    values: Arc<AtomicUsize>,
}

impl Pipe for CountedPipe {
    fn send(&self, hidden: Vec<f32>) -> Result<(), KernelError> {
        self.values.fetch_add(hidden.len(), Ordering::Relaxed);
        self.inner.send(hidden)
    }

    fn receive(&self) -> Result<Vec<f32>, KernelError> {
        self.inner.receive()
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }
}

/// What every rank measures.
fn measured<B: Backend>(
    ranks: &[Rank<B>],
    ends: &[Option<Ends>],
    floor: Floor,
    case: &Case,
) -> Vec<CollectiveTiming> {
    let threads = NonZero::<usize>::MIN;
    let timings = team::run(ranks, threads, |rank| {
        let ends = ends[rank.peers().rank()].as_ref();
        Probe { rank, ends, effort: LEAST, floor }.measure(case)
    });
    timings.into_iter().collect::<Result<_, _>>().expect("ranks that measure")
}

fn is_sound(timing: &CollectiveTiming) {
    let CollectiveTiming { fastest_seconds, seconds, slowest_seconds, floor_seconds, bytes, .. } = timing;
    assert!(0.0 < *fastest_seconds && fastest_seconds <= seconds && seconds <= slowest_seconds, "{timing:?}");
    assert!(floor_seconds.is_none_or(|floor| floor > 0.0) && *bytes > 0, "{timing:?}");
}

/// What comes to each rank: activations, host bytes, values through the pipe to it.
fn received(ranks: usize, case: &Case) -> (CollectiveTiming, Vec<[usize; 3]>) {
    let counts: Vec<_> = (0..ranks).map(|_| Arc::new(AtomicUsize::new(0))).collect();
    let counted = InProcess::team(ranks).into_iter().zip(&counts).map(|(inner, bytes)| {
        Rank::new(Cpu::detect(), Box::new(Counted { inner, bytes: Arc::clone(bytes) }))
    });
    let team: Vec<Rank<Cpu>> = counted.collect();
    let values: Vec<_> = (0..ranks).map(|_| Arc::new(AtomicUsize::new(0))).collect();
    let mut ends = Ends::in_process(ranks);
    for (rank, ends) in ends.iter_mut().enumerate() {
        if let Some(Ends { outgoing, incoming }) = ends.take() {
            let values = Arc::clone(&values[1 - rank]);
            *ends = Some(Ends { outgoing: Box::new(CountedPipe { inner: outgoing, values }), incoming });
        }
    }
    let timing = measured(&team, &ends, Floor::Host, case).swap_remove(0);
    let count = |rank: usize| {
        let [bytes, values] = [&counts, &values].map(|counts| counts[rank].load(Ordering::Relaxed));
        [team[rank].received() as usize, bytes, values]
    };
    (timing, (0..ranks).map(count).collect())
}

#[test]
fn bytes_that_are_told_are_those_that_come() {
    for (ranks, tokens) in [(2, 5), (3, 4), (5, 1)] {
        for case in tiny(tokens) {
            let (timing, counts) = received(ranks, &case);
            is_sound(&timing);
            let told = |measurements: usize| 8 * TOLD * measurements * (ranks - 1);
            let most = |which: usize| counts.iter().map(|count| count[which]).max().expect("ranks");
            let bytes = TIMES * timing.bytes;
            let came = match case {
                Case::Byte => [0, told(1) + bytes, 0],
                Case::OfModel { carried: Carried::Columns(_), .. } => [bytes, told(2), 0],
                Case::OfModel { carried: Carried::LogSumExps | Carried::Embeddings, .. } => {
                    [0, told(2) + bytes, 0]
                }
                Case::OfModel { carried: Carried::HandOver, .. } => [0, told(2), bytes / 4],
            };
            assert_eq!([most(0), most(1), most(2)], came, "{case:?}, {ranks} ranks");
        }
    }
}

#[test]
fn bytes_of_a_llama_8b() {
    let bytes =
        |carried, tokens, ranks| bytes_received(&Case::OfModel { carried, model: MODELS[0], tokens }, ranks);
    let columns = |columns, tokens, ranks| bytes(Carried::Columns(columns), tokens, ranks);
    // Half of 4096 and of 14336 columns of four bytes.
    assert_eq!(columns(Columns::Heads, 256, 2), 2_097_152);
    assert_eq!(columns(Columns::Hidden, 256, 2), 2_097_152);
    assert_eq!(columns(Columns::Inner, 256, 2), 7_340_032);
    // 22 of 32 heads, 171 of 256 runs of 16, 598 of 896.
    assert_eq!(columns(Columns::Heads, 1, 3), 11_264);
    assert_eq!(columns(Columns::Hidden, 1, 3), 10_944);
    assert_eq!(columns(Columns::Inner, 1, 3), 38_272);
    // 501 of 1002 tiles for 128 rows; 668 for the one row that one rank folds.
    assert_eq!(bytes(Carried::LogSumExps, 256, 2), 769_536);
    assert_eq!(bytes(Carried::LogSumExps, 1, 3), 8016);
    // Every other row of 16 KiB.
    assert_eq!(bytes(Carried::Embeddings, 256, 2), 2_097_152);
    assert_eq!(bytes(Carried::Embeddings, 1, 3), 16_384);
    assert_eq!(bytes(Carried::HandOver, 256, 4), 4_194_304);
    assert_eq!(bytes_received(&Case::Byte, 4), 3);
}

#[test]
fn every_model_at_every_number_of_tokens() {
    let all = cases(&[1, 7]);
    assert_eq!(all.len(), 1 + 3 * 6 * 2);
    for model in MODELS {
        for carried in Carried::ALL {
            for tokens in [1, 7] {
                let case = Case::OfModel { carried, model, tokens };
                assert_eq!(all.iter().filter(|other| **other == case).count(), 1, "{case:?}");
            }
        }
    }
}

/// Takes nothing.
struct Broken(Box<dyn Pipe>);

impl Pipe for Broken {
    fn send(&self, _hidden: Vec<f32>) -> Result<(), KernelError> {
        Err(KernelError::Device { device: "pipe".to_owned(), what: "it is broken".to_owned() })
    }

    fn receive(&self) -> Result<Vec<f32>, KernelError> {
        self.0.receive()
    }

    fn abort(&self, reason: &str) {
        self.0.abort(reason);
    }
}

/// Rank 1 takes what rank 0 sends, and fails at the answer that rank 0 waits for; rank 2 waits for both.
#[test]
fn nobody_waits_for_a_rank_that_has_failed() {
    let ranks = team::in_process(vec![Cpu::detect(); 3]);
    let mut ends = Ends::in_process(3);
    let Ends { outgoing, incoming } = ends[1].take().expect("rank 1 has ends");
    ends[1] = Some(Ends { outgoing: Box::new(Broken(outgoing)), incoming });
    let case = Case::OfModel { carried: Carried::HandOver, model: TINY, tokens: 2 };
    let outcomes = team::run(&ranks, NonZero::<usize>::MIN, |rank| {
        let ends = ends[rank.peers().rank()].as_ref();
        Probe { rank, ends, effort: LEAST, floor: Floor::Host }.measure(&case)
    });
    let lost = |rank: usize| matches!(outcomes[rank], Err(KernelError::Lost { .. }));
    assert!(lost(0) && matches!(outcomes[1], Err(KernelError::Device { .. })) && lost(2), "{outcomes:?}");
}

#[test]
#[cfg(feature = "emulated")]
fn devices_that_copy_from_one_another() {
    let devices = (0..2).map(|_| Cuda::new(Emulated::new(Schedule::ALL[0])));
    let ranks: Vec<_> = devices
        .zip(PeerCopies::team(2))
        .map(|(device, collective)| Rank::new(device, Box::new(collective)))
        .collect();
    let ends = Ends::in_process(2);
    for case in tiny(3) {
        measured(&ranks, &ends, Floor::Device, &case).iter().for_each(is_sound);
    }
}

/// 256 x 128 weights: 64 bytes of codes and a scale of 2 bytes a row, 256 bytes of operands.
#[cfg(feature = "emulated")]
#[test]
fn operands_are_counted_as_read_and_written() {
    let cuda = Cuda::new(Emulated::new(Schedule::ALL[0]));
    let timing = super::operands(&cuda, super::Weights::Int4, (256, 128), LEAST).expect("a timing");
    assert_eq!(timing.bytes, f64::from(256 * (64 + 2 + 256)));
    assert_eq!((timing.operation.as_str(), timing.operations), ("decode", f64::from(256 * 128)));
}
