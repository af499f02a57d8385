//! Gathers through a stand-in for NCCL that moves the host's memory between threads (`stub_nccl.cpp`).

use std::ffi::{CStr, c_char};
use std::path::Path;
use std::process::Command;
use std::ptr;

use super::*;
use crate::collective::Alone;
use crate::cuda::driver::nvrtc::{function, open};

/// Builds and loads the stand-in; each test has one of its own.
struct Stub {
    library: NcclLibrary,
    calls: unsafe extern "C" fn() -> *const c_char,
    _folder: tempfile::TempDir,
}

impl Stub {
    fn new() -> Stub {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("libnccl.so.2");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/driver/tests/stub_nccl.cpp");
        let compiled = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()))
            .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-o"])
            .args([&file, &source])
            .output()
            .expect("a C++ compiler");
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        let library = NcclLibrary::load(&file).expect("the stand-in");
        // SAFETY: the type of stub_nccl.cpp.
        let calls =
            unsafe { function(open(&file).expect("the stand-in"), "stub_calls") }.expect("a function");
        Stub { library, calls, _folder: folder }
    }

    fn join(&self, rank: usize, ranks: usize) -> Result<Communicator, KernelError> {
        let id = self.library.unique_id().expect("an id");
        Communicator::join("cuda:9".to_owned(), self.library, id, rank, ranks, MEETING)
    }

    /// Rank 0's calls since this was asked last.
    fn calls(&self) -> Vec<String> {
        // SAFETY: returns a C string that this thread may read until it asks again.
        let calls = unsafe { CStr::from_ptr((self.calls)()) };
        calls.to_str().expect("ASCII").lines().map(str::to_owned).collect()
    }
}

/// What ranks of these widths have gathered, and rank 0's calls.
fn gather(widths: &[usize], rows: usize) -> (Vec<Vec<f32>>, Vec<String>) {
    let stub = Stub::new();
    let gathered = thread::scope(|scope| {
        let rank = |rank: usize| {
            let stub = &stub;
            scope.spawn(move || {
                let communicator = stub.join(rank, widths.len()).expect("it joins");
                let part = part(rank, rows * widths[rank]);
                let mut all = vec![f32::NAN; rows * widths.iter().sum::<usize>()];
                let (from, to) = (Address(part.as_ptr() as u64), Address(all.as_mut_ptr() as u64));
                // SAFETY: both are as long as is said, and the stand-in is done when it returns.
                unsafe { communicator.all_gather(from, to, rows, widths, ptr::null_mut()) }
                    .expect("a gather");
                all
            })
        };
        let ranks: Vec<_> = (0..widths.len()).map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank that ends")).collect()
    });
    (gathered, stub.calls())
}

fn part(rank: usize, count: usize) -> Vec<f32> {
    (0..count).map(|index| (1000 * (rank + 1) + index) as f32).collect()
}

#[test]
fn equal_widths_take_one_call() {
    for ranks in [1, 2, 4] {
        let (gathered, calls) = gather(&vec![5; ranks], 3);
        let expected: Vec<f32> = (0..ranks).flat_map(|rank| part(rank, 15)).collect();
        assert!(gathered.iter().all(|gathered| *gathered == expected), "{gathered:?}");
        assert_eq!(calls, ["init", "gather 15", "destroy"]);
    }
}

#[test]
fn other_widths_take_a_broadcast_each_and_none_of_nothing() {
    for widths in [[4, 4, 3], [0, 2, 2], [7, 0, 0]] {
        let (gathered, calls) = gather(&widths, 2);
        let expected: Vec<f32> = (0..3).flat_map(|rank| part(rank, 2 * widths[rank])).collect();
        assert!(gathered.iter().all(|gathered| *gathered == expected), "{widths:?}: {gathered:?}");
        let of_root = |(root, width): (usize, &usize)| format!("broadcast {root}: {}", 2 * width);
        let broadcasts = widths.iter().enumerate().filter(|(_, width)| **width > 0).map(of_root);
        let expected: Vec<String> =
            ["init".to_owned()].into_iter().chain(broadcasts).chain(["destroy".to_owned()]).collect();
        assert_eq!(calls, expected);
    }
    assert_eq!(gather(&[0, 0], 2).1, ["init", "destroy"]);
    assert_eq!(gather(&[3, 4], 0).1, ["init", "destroy"]);
}

#[test]
fn a_lost_rank_and_a_refused_call_are_errors_of_their_own() {
    let stub = Stub::new();
    let communicator = stub.join(0, 2).expect("it joins");
    // SAFETY: the stand-in reads and writes nothing for these counts.
    let gather = |width: usize| unsafe {
        communicator.all_gather(Address::NULL, Address::NULL, 1, &[width; 2], ptr::null_mut())
    };
    let error = gather(14).expect_err("refused");
    assert!(matches!(error, KernelError::Device { .. }), "{error}");
    assert!(
        error.to_string().starts_with("cuda:9: NCCL 2.14.2: ncclAllGather: invalid argument; "),
        "{error}"
    );
    let error = gather(13).expect_err("lost");
    assert!(matches!(error, KernelError::Lost { .. }), "{error}");
    let expected = "cuda:9: another rank is lost: NCCL 2.14.2: joining or gathering: remote process exited; ";
    assert!(error.to_string().starts_with(expected), "{error}");
}

#[test]
fn a_communicator_is_given_up_once_and_for_all() {
    let stub = Stub::new();
    let communicator = stub.join(0, 2).expect("it joins");
    communicator.abort("rank 1 is gone");
    communicator.abort("rank 0 too");
    assert!(!communicator.is_open());
    // SAFETY: nothing is called any more.
    let gathered =
        unsafe { communicator.all_gather(Address::NULL, Address::NULL, 1, &[4; 2], ptr::null_mut()) };
    assert_eq!(gathered.expect_err("given up").to_string(), "rank 1 is gone");
    drop(communicator);
    assert_eq!(stub.calls(), ["init", "abort"]);
}

#[test]
fn ranks_that_do_not_meet_in_time_are_told_so() {
    let stub = Stub::new();
    let id = stub.library.unique_id().expect("an id");
    let joined = Communicator::join("cuda:9".to_owned(), stub.library, id, 0, 2, Duration::ZERO);
    let error = joined.expect_err("too late").to_string();
    assert!(error.starts_with("cuda:9: other ranks have not joined in time; "), "{error}");
    assert_eq!(stub.calls(), ["init", "abort"]);
    assert!(stub.join(2, 2).is_err(), "a rank that there is none of");
}

#[test]
fn all_ranks_learn_the_same_id() {
    let stub = Stub::new();
    let id = share_id("cuda:9", stub.library, &Alone).expect("an id");
    assert_eq!(id, stub.library.unique_id().expect("an id"));
    let team = crate::collective::InProcess::<crate::cpu::Cpu>::team(3);
    let ids: Vec<UniqueId> = thread::scope(|scope| {
        let share = |peers| scope.spawn(move || share_id("cuda:9", stub.library, peers).expect("an id"));
        let ranks: Vec<_> = team.iter().map(|peers| share(peers)).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank that ends")).collect()
    });
    assert_eq!(ids, [id; 3]);
}
