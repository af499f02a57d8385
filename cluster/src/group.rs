//! Some ranks of a world that share one model.

use std::sync::Arc;

use ctq_kernels::KernelError;
use ctq_kernels::collective::Peers;

use crate::mesh::{Mesh, UNFINISHED};

/// The kind of channel, in the upper half of a tag.
const CHANNEL: u32 = 1 << 16;

/// Some ranks of a world, seen from one of them. What they exchange takes as much host memory again as it has bytes.
#[derive(Debug)]
pub struct Group {
    mesh: Arc<Mesh>,
    /// Ranks of the world, in the order of the group.
    members: Vec<usize>,
    rank: usize,
    tag: u32,
}

impl Group {
    pub(crate) fn new(mesh: Arc<Mesh>, members: &[usize], tag: u16) -> Group {
        let rank = members.iter().position(|member| *member == mesh.rank());
        let rank = rank.expect("a rank makes only groups that it belongs to");
        Group { mesh, members: members.to_owned(), rank, tag: CHANNEL | u32::from(tag) }
    }
}

impl Peers for Group {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.members.len()
    }

    fn exchange(&self, mut parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, KernelError> {
        assert_eq!(parts.len(), self.members.len(), "one part a rank");
        let mut own = Some(std::mem::take(&mut parts[self.rank]));
        for (index, part) in parts.into_iter().enumerate() {
            if index != self.rank {
                self.mesh.send(self.members[index], self.tag, part)?;
            }
        }
        let receive = |(index, member): (usize, &usize)| match own.take_if(|_| index == self.rank) {
            Some(own) => Ok(own),
            None => self.mesh.receive(*member, self.tag),
        };
        self.members.iter().enumerate().map(receive).collect()
    }

    fn abort(&self, reason: &str) {
        self.mesh.abort(reason, UNFINISHED);
    }
}
