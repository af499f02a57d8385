//! Gathers between threads on emulated devices: separate ones, and several ranks on one.

use std::thread;

use crate::backend::{Backend, KernelError};
use crate::collective::{Collective, PeerCopies, Peers};
use crate::cuda::elementwise::samples::{numbers, same_bits};
use crate::cuda::emulated::{Emulated, EmulatedMemory, Schedule};
use crate::cuda::{Cuda, CudaBuffer, Device};

const ROWS: usize = 5;

/// A rank for each entry of `places`, on the device of that number.
fn on_devices(places: &[usize], schedule: Schedule) -> Vec<Cuda<Emulated>> {
    let mut first: Vec<Option<Cuda<Emulated>>> = Vec::new();
    first.resize_with(places.len(), || None);
    let rank = |place: &usize| {
        let device = first[*place].get_or_insert_with(|| Cuda::new(Emulated::new(schedule)));
        device.another_rank()
    };
    places.iter().map(rank).collect()
}

/// Lets a test fail rather than wait for a rank that panics.
struct GiveUp<'a>(&'a PeerCopies<Emulated>);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.abort("a rank panicked");
        }
    }
}

/// What `program` gives on each rank, every one in a thread.
fn on_ranks<T: Send>(
    backends: &[Cuda<Emulated>],
    program: impl Fn(&PeerCopies<Emulated>, &Cuda<Emulated>) -> T + Sync,
) -> Vec<T> {
    let team = PeerCopies::team(backends.len());
    let run = |rank: &PeerCopies<Emulated>, backend: &Cuda<Emulated>| {
        let _guard = GiveUp(rank);
        program(rank, backend)
    };
    thread::scope(|scope| {
        let ranks: Vec<_> =
            team.iter().zip(backends).map(|(rank, backend)| scope.spawn(|| run(rank, backend))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank that ends")).collect()
    })
}

fn values(rank: usize, width: usize, round: usize) -> Vec<f32> {
    numbers((100 * round + rank + 1) as u64, ROWS * width)
}

/// This rank's columns, made by a kernel, of any width.
fn part(backend: &Cuda<Emulated>, values: &[f32], width: usize) -> CudaBuffer<EmulatedMemory> {
    let mut part = backend.zeros(ROWS, width).expect("room");
    if width > 0 {
        backend.add(&mut part, &backend.upload(width, values).expect("room")).expect("a sum");
    }
    part
}

/// Rows of the parts, one rank's behind the other's.
fn side_by_side(widths: &[usize], round: usize) -> Vec<f32> {
    let parts: Vec<Vec<f32>> =
        widths.iter().enumerate().map(|(rank, width)| values(rank, *width, round)).collect();
    let row = |row: usize| -> Vec<f32> {
        let of = |(part, width): (&Vec<f32>, &usize)| part[row * width..(row + 1) * width].to_vec();
        parts.iter().zip(widths).flat_map(of).collect()
    };
    (0..ROWS).flat_map(row).collect()
}

fn gathers_are_right(places: &[usize], widths: &[usize], schedule: Schedule) {
    let backends = on_devices(places, schedule);
    let found = on_ranks(&backends, |rank, backend| {
        let gather = |round: usize| {
            let width = widths[rank.rank()];
            let part = part(backend, &values(rank.rank(), width, round), width);
            let whole = rank.all_gather(backend, part, widths).expect("a gather");
            assert_eq!((whole.rows, whole.width), (ROWS, widths.iter().sum()));
            whole
        };
        // Several under way before the first is looked at.
        let rounds: Vec<_> = (0..3).map(gather).collect();
        rounds.iter().map(|whole| backend.download(whole).expect("a result")).collect::<Vec<_>>()
    });
    for (rank, rounds) in found.iter().enumerate() {
        for (round, found) in rounds.iter().enumerate() {
            let expected = side_by_side(widths, round);
            same_bits(found, &expected, &format!("{places:?} {widths:?}, rank {rank}, round {round}"));
        }
    }
    assert!(backends.iter().all(|backend| backend.device().used() == 0), "memory that nobody has freed");
}

#[test]
fn separate_devices_gather_what_each_has() {
    for schedule in Schedule::ALL {
        for widths in [&[16, 16][..], &[3, 40, 17], &[0, 5, 0], &[8, 0, 24, 1], &[64; 4]] {
            let places: Vec<usize> = (0..widths.len()).collect();
            gathers_are_right(&places, widths, schedule);
        }
    }
}

#[test]
fn ranks_may_share_devices() {
    for schedule in Schedule::ALL {
        gathers_are_right(&[0, 0], &[7, 9], schedule);
        gathers_are_right(&[0, 0, 1], &[16, 0, 16], schedule);
        gathers_are_right(&[0, 1, 0, 1], &[4, 8, 12, 16], schedule);
    }
    gathers_are_right(&[0], &[12], Schedule::ALL[0]);
}

#[test]
fn bytes_reach_the_rank_they_are_for() {
    let backends = on_devices(&[0, 1, 2], Schedule::ALL[0]);
    let found = on_ranks(&backends, |rank, _| {
        let parts = (0..3_u8).map(|to| vec![10 * rank.rank() as u8 + to]).collect();
        rank.exchange(parts).expect("an exchange")
    });
    for (to, found) in found.iter().enumerate() {
        let expected: Vec<Vec<u8>> = (0..3).map(|from| vec![10 * from + to as u8]).collect();
        assert_eq!(*found, expected);
    }
}

/// Rank 1 has room for its part and not for those of others.
#[test]
fn a_rank_that_fails_wakes_the_others_and_leaves_nothing_behind() {
    let roomy = || Cuda::new(Emulated::new(Schedule::ALL[0]));
    let small = Cuda::new(Emulated::new(Schedule::ALL[0]).with_capacity(2 * ROWS * 16 * 4));
    let backends = [roomy(), small, roomy()];
    let errors = on_ranks(&backends, |rank, backend| {
        let part = part(backend, &values(rank.rank(), 16, 0), 16);
        rank.all_gather(backend, part, &[16; 3]).expect_err("no room")
    });
    assert!(matches!(errors[1], KernelError::OutOfMemory { .. }), "{}", errors[1]);
    for error in [&errors[0], &errors[2]] {
        assert!(matches!(error, KernelError::Lost { .. }), "{error}");
        assert!(error.to_string().starts_with("rank 1: the emulated device has no room"), "{error}");
    }
    assert!(backends.iter().all(|backend| backend.device().used() == 0), "memory that nobody has freed");
}

#[test]
fn giving_up_ends_a_gather_that_waits() {
    let backends = on_devices(&[0, 1], Schedule::ALL[0]);
    let ends = on_ranks(&backends, |rank, backend| {
        if rank.rank() == 1 {
            rank.abort("rank 1 has had enough");
            return None;
        }
        let part = part(backend, &values(0, 4, 0), 4);
        Some(rank.all_gather(backend, part, &[4, 4]).expect_err("nobody comes").to_string())
    });
    assert_eq!(ends, [Some("rank 1 has had enough".to_owned()), None]);
}

#[test]
fn the_emulation_notices_a_mark_that_is_not_waited_for() {
    let [owner, reader] = [(); 2].map(|()| Emulated::new(Schedule::ALL[0]));
    let early = owner.mark().expect("a mark");
    let memory = owner.upload(&[1, 2, 3]).expect("room");
    for _ in 0..2 {
        let error = reader.fetch(&owner, &memory).expect_err("nothing was waited for");
        assert!(error.to_string().contains("no mark was waited for"), "{error}");
        // One from before the memory was there says nothing about it.
        reader.wait_for(&early).expect("it waits");
    }
    reader.wait_for(&owner.mark().expect("a mark")).expect("it waits");
    let copy = reader.fetch(&owner, &memory).expect("a copy");
    let mut bytes = [0; 3];
    reader.download(&copy, 0, &mut bytes).expect("downloaded");
    assert_eq!(bytes, [1, 2, 3]);
}

#[test]
#[should_panic(expected = "3 bytes are freed while another device may read them")]
fn the_emulation_notices_memory_that_is_freed_too_early() {
    let [owner, reader] = [(); 2].map(|()| Emulated::new(Schedule::ALL[0]));
    let memory = owner.upload(&[1, 2, 3]).expect("room");
    reader.wait_for(&owner.mark().expect("a mark")).expect("it waits");
    let _copy = reader.fetch(&owner, &memory).expect("a copy");
    drop(memory);
}

#[test]
fn the_emulation_notices_memory_of_another_device() {
    let [one, other] = [(); 2].map(|()| Cuda::new(Emulated::new(Schedule::ALL[0])));
    let (mut x, y) = (one.upload(4, &[1.0; 8]).expect("room"), other.upload(4, &[1.0; 8]).expect("room"));
    let error = one.add(&mut x, &y).expect_err("not its memory").to_string();
    assert!(error.contains("`add` is given memory of another device, 32 bytes"), "{error}");
    one.another_rank().add(&mut x, &one.upload(4, &[1.0; 8]).expect("room")).expect("its own memory");
}
