//! Hidden states on their way between stages.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use ctq_kernels::collective::Pipe;

use crate::worlds;

#[test]
fn bits_survive_and_groups_come_in_order() {
    let worlds = worlds(2);
    let (to, from) = (worlds[0].pipe_to(1, 4), worlds[1].pipe_from(0, 4));
    // A NaN with a payload, a negative zero, a subnormal.
    let special = [0x7fa0_1234, 0x8000_0000, 0x0000_0001, 0xff80_0000].map(f32::from_bits);
    thread::scope(|scope| {
        scope.spawn(|| {
            to.send(special.to_vec()).expect("the reader is there");
            to.send(Vec::new()).expect("the reader is there");
            for group in 0..20 {
                to.send(vec![group as f32; 100_003]).expect("the reader is there");
            }
        });
        let bits: Vec<u32> = from.receive().expect("a group").into_iter().map(f32::to_bits).collect();
        assert_eq!(bits, special.map(f32::to_bits));
        assert!(from.receive().expect("a group").is_empty());
        for group in 0..20 {
            assert!(from.receive().expect("a group") == vec![group as f32; 100_003], "group {group}");
        }
    });
}

#[test]
fn a_slow_reader_holds_the_sender_back() {
    let worlds = worlds(2);
    let (to, from) = (worlds[0].pipe_to(1, 4), worlds[1].pipe_from(0, 4));
    let sent = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for group in 0..6 {
                to.send(vec![group as f32; 1000]).expect("the reader is there");
                sent.fetch_add(1, Ordering::SeqCst);
            }
        });
        for taken in 0..6 {
            // Time enough for a sender that does not wait.
            thread::sleep(Duration::from_millis(50));
            assert!(sent.load(Ordering::SeqCst) <= taken + 1, "one group waits, not more");
            assert_eq!(from.receive().expect("a group")[0], taken as f32);
        }
    });
    assert_eq!(sent.load(Ordering::SeqCst), 6);
}

#[test]
fn two_pipes_between_two_ranks_keep_apart() {
    let worlds = worlds(2);
    let (here, there) = (worlds[0].pipe_to(1, 1), worlds[0].pipe_to(1, 2));
    here.send(vec![1.0]).expect("a reader");
    there.send(vec![2.0]).expect("a reader");
    assert_eq!(worlds[1].pipe_from(0, 2).receive().expect("a group"), [2.0]);
    assert_eq!(worlds[1].pipe_from(0, 1).receive().expect("a group"), [1.0]);
}

#[test]
fn the_last_group_is_read_after_its_sender_has_left() {
    let worlds = worlds(2);
    worlds[0].pipe_to(1, 1).send(vec![3.0; 2_000_000]).expect("a reader");
    worlds[0].leave();
    let from = worlds[1].pipe_from(0, 1);
    assert!(from.receive().expect("it was sent before the goodbye") == vec![3.0; 2_000_000]);
    assert!(worlds[1].failure().is_none());
    let error = from.receive().expect_err("there is no more").to_string();
    assert!(error.contains("rank 0 (127.0.0.1) left early"), "{error}");
}

#[test]
fn each_end_does_what_it_is_for() {
    let worlds = worlds(2);
    assert!(worlds[0].pipe_to(1, 1).receive().is_err());
    assert!(worlds[1].pipe_from(0, 1).send(Vec::new()).is_err());
}
