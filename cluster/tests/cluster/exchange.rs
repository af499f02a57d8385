//! Bytes that ranks exchange, in groups and by mail.

use std::time::Duration;

use ctq_cluster::World;
use ctq_kernels::collective::Peers;

use crate::{all, worlds};

/// Bytes that tell who sent them to whom.
fn bytes(from: usize, to: usize, length: usize) -> Vec<u8> {
    (0..length).map(|index| (index / 7 + 31 * from + 101 * to) as u8).collect()
}

#[test]
fn odd_sizes_among_few_ranks() {
    for ranks in 2..=4 {
        let worlds = worlds(ranks);
        let members: Vec<usize> = (0..ranks).collect();
        all(&worlds, |world| {
            let group = world.group(&members, 1);
            assert_eq!((group.rank(), group.ranks()), (world.rank(), ranks));
            for base in [0, 1, 4095, 4097, (1 << 20) - 1, 1 << 20, 3_000_001] {
                let length = |from: usize, to: usize| base + from * to;
                let parts = (0..ranks).map(|to| bytes(world.rank(), to, length(world.rank(), to))).collect();
                let received = group.exchange(parts).expect("all are there");
                for (from, received) in received.iter().enumerate() {
                    assert!(*received == bytes(from, world.rank(), length(from, world.rank())), "{base}");
                }
            }
            world.leave();
        });
    }
}

#[test]
fn large_parts_cross_without_a_deadlock() {
    let worlds = worlds(2);
    all(&worlds, |world| {
        let group = world.group(&[0, 1], 1);
        let (own, other) = (world.rank() as u8, 1 - world.rank() as u8);
        let received = group.exchange(vec![vec![own; 64 << 20]; 2]).expect("both are there");
        assert!(received[usize::from(other)].len() == 64 << 20);
        assert!(received[usize::from(other)].iter().all(|byte| *byte == other));
    });
}

#[test]
fn groups_within_a_world_keep_apart() {
    let worlds = worlds(4);
    all(&worlds, |world| {
        let rank = world.rank();
        // Two pairs with one tag, in an order of their own; and all, with another tag.
        let pair = if rank % 2 == 0 { [2, 0] } else { [1, 3] };
        let (pair_group, everyone) = (world.group(&pair, 1), world.group(&[0, 1, 2, 3], 2));
        assert_eq!(pair[pair_group.rank()], rank);
        for round in 0..200u8 {
            let said = pair_group.exchange(vec![vec![rank as u8, round]; 2]).expect("both are there");
            assert_eq!(said, pair.map(|member| vec![member as u8, round]));
            let said = everyone.exchange(vec![vec![rank as u8, !round]; 4]).expect("all are there");
            assert_eq!(said, [0, 1, 2, 3].map(|member| vec![member, !round]));
        }
    });
}

#[test]
fn a_group_of_one_has_nobody_to_wait_for() {
    let worlds = worlds(2);
    let group = worlds[1].group(&[1], 3);
    assert_eq!(group.exchange(vec![vec![7]]).expect("itself"), [vec![7]]);
}

fn mails(world: &World) -> Vec<(usize, Vec<u8>)> {
    let next = || world.inbox(Duration::from_millis(200)).expect("nobody is lost");
    std::iter::from_fn(next).collect()
}

#[test]
fn mail_comes_in_the_order_of_its_sender_and_outlives_a_goodbye() {
    let worlds = worlds(3);
    assert_eq!(worlds[0].inbox(Duration::from_millis(10)).expect("nobody is lost"), None);
    for world in &worlds {
        for number in 0..5 {
            world.mail(0, vec![number]).expect("rank 0 is there");
        }
    }
    worlds[1].leave();
    worlds[2].leave();
    let mails = mails(&worlds[0]);
    assert_eq!(mails.len(), 15);
    for rank in 0..3 {
        let of_rank: Vec<u8> =
            mails.iter().filter(|(from, _)| *from == rank).map(|(_, bytes)| bytes[0]).collect();
        assert_eq!(of_rank, [0, 1, 2, 3, 4], "rank {rank}");
    }
    assert!(worlds[0].failure().is_none());
}
