//! Ranks that are lost, give up or leave: what the others learn. Processes that are killed or stopped, and networks that
//! die, are in `processes.rs`.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ctq_cluster::{Failure, World};
use ctq_kernels::collective::{Peers, Pipe};

use crate::{all, worlds};

/// What a rank that waits for all others is told.
fn told(world: &World) -> String {
    let members: Vec<usize> = (0..world.ranks()).collect();
    let parts = vec![Vec::new(); world.ranks()];
    world.group(&members, 1).exchange(parts).expect_err("one of them is not there").to_string()
}

#[test]
fn a_rank_that_vanishes_is_named_to_all() {
    let mut worlds = worlds(4);
    drop(worlds.remove(2));
    for told in all(&worlds, told) {
        assert_eq!(
            told,
            "rank 2 (127.0.0.1) is lost: its connection closed; the same command goes on where this one was"
        );
    }
    for world in &worlds {
        let failure = world.failure().expect("one is lost");
        assert_eq!((failure.rank, failure.exit), (2, 3));
    }
}

#[test]
fn who_waits_for_somebody_else_is_told_too() {
    let mut worlds = worlds(3);
    let [pipe_from, pipe_to] = [worlds[0].pipe_from(1, 1), worlds[0].pipe_from(1, 2)];
    thread::scope(|scope| {
        let receiver = scope.spawn(|| pipe_from.receive().expect_err("nothing comes").to_string());
        let other = scope.spawn(|| pipe_to.receive().expect_err("nothing comes").to_string());
        let inbox =
            scope.spawn(|| worlds[1].inbox(Duration::from_secs(60)).expect_err("none comes").to_string());
        thread::sleep(Duration::from_millis(50));
        drop(worlds[2].clone());
        worlds[2].abort("no room", 2);
        for told in [receiver, other, inbox] {
            assert_eq!(told.join().expect("no panic"), "rank 2 (127.0.0.1) has given up: no room");
        }
    });
    drop(worlds.remove(2));
}

#[test]
fn a_rank_that_gives_up_says_why_and_how_all_end() {
    let worlds = worlds(3);
    let (sender, called) = mpsc::channel::<Failure>();
    let after = sender.clone();
    worlds[0].on_failure(move |failure| sender.send(failure.clone()).expect("somebody listens"));
    worlds[1].abort("layer 3 is INVALID", 1);
    worlds[1].abort("and something else", 2);
    let expected =
        Failure { rank: 1, what: "rank 1 (127.0.0.1) has given up: layer 3 is INVALID".to_owned(), exit: 1 };
    assert_eq!(called.recv_timeout(Duration::from_secs(10)), Ok(expected.clone()));
    worlds[0].on_failure(move |failure| after.send(failure.clone()).expect("somebody listens"));
    assert_eq!(called.recv_timeout(Duration::from_secs(10)), Ok(expected.clone()));
    for told in all(&worlds, told) {
        assert_eq!(told, expected.what);
    }
    assert!(worlds.iter().all(|world| world.failure().as_ref() == Some(&expected)));
    assert!(called.try_recv().is_err(), "each is called once");
}

#[test]
fn a_group_and_a_pipe_give_up_for_all() {
    let first = worlds(2);
    first[0].group(&[0], 1).abort("the device failed");
    assert_eq!(told(&first[1]), "rank 0 (127.0.0.1) has given up: the device failed");
    let second = worlds(2);
    second[1].pipe_from(0, 1).abort("the device failed");
    assert_eq!(told(&second[0]), "rank 1 (127.0.0.1) has given up: the device failed");
}

#[test]
fn an_abort_overtakes_what_is_being_sent() {
    let worlds = worlds(2);
    // Twenty times what sockets hold; the abort is behind all of it.
    for _ in 0..20 {
        worlds[0].mail(1, vec![0; 8 << 20]).expect("rank 1 is there");
    }
    worlds[0].abort("no room", 3);
    let failure = (0..500).find_map(|_| {
        thread::sleep(Duration::from_millis(10));
        worlds[1].failure()
    });
    assert_eq!(failure.expect("it was told").what, "rank 0 (127.0.0.1) has given up: no room");
}

#[test]
fn ranks_that_leave_when_done_are_not_lost() {
    let worlds = worlds(3);
    worlds[2].leave();
    let pair = [worlds[0].clone(), worlds[1].clone()];
    all(&pair, |world| {
        let group = world.group(&[0, 1], 1);
        for _ in 0..10 {
            group.exchange(vec![vec![1; 1000]; 2]).expect("both are there");
        }
        assert!(world.failure().is_none());
        world.leave();
    });
    assert!(worlds[2].mail(0, Vec::new()).is_err(), "it has left");
}

#[test]
fn a_rank_that_leaves_early_is_named_to_all() {
    let worlds = worlds(3);
    worlds[1].leave();
    let others = [worlds[0].clone(), worlds[2].clone()];
    for told in all(&others, told) {
        assert!(told.starts_with("rank 1 (127.0.0.1) left early"), "{told}");
    }
}

#[test]
fn a_world_that_is_dropped_fails_those_of_its_own_who_still_wait() {
    let mut worlds = worlds(2);
    let group = worlds[0].group(&[0, 1], 1);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| group.exchange(vec![Vec::new(); 2]).map(drop));
        thread::sleep(Duration::from_millis(50));
        drop(worlds.remove(0));
        assert!(waiting.join().expect("no panic").is_err());
    });
}
