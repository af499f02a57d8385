//! The plans of all seats of a layout: which windows and layers are whose, and how each seat's are cut. Numbers in,
//! numbers out.

use std::ops::Range;

use ctq_model::window::Window;

use crate::layout::Layout;
use crate::needs::Needs;
use crate::plan::{Plan, Pool, Resources, TooSmall, plan_stages};

/// Plans of all seats. Ranks of a stage have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plans {
    /// Layers of each stage.
    pub layers: Vec<Range<usize>>,
    /// Each replica's.
    pub replicas: Vec<ReplicaPlan>,
}

/// Plans of one replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaPlan {
    /// Its windows among those that are left.
    pub windows: Range<usize>,
    /// The plan of each stage; their groups are the same, counted from the first of these windows.
    pub stages: Vec<Plan>,
}

impl Plans {
    /// Plans for windows that are left.
    ///
    /// # Errors
    /// Where a seat has no room for one window.
    pub fn new(
        layout: &Layout,
        needs: &Needs,
        resources: Resources,
        windows: &[Window],
    ) -> Result<Plans, TooSmall> {
        let lengths: Vec<usize> = windows.iter().map(|window| window.ids.len()).collect();
        let layers = layout.layers(needs);
        let share = |layers: &Range<usize>| {
            let share = needs.share(layers, layout.ranks);
            // Beside its own, a stage on the CPU has the states that come and those that go.
            let copies = if layout.stages > 1 && matches!(resources.pool, Pool::Shared(_)) { 3 } else { 1 };
            Needs { hidden: copies * share.hidden, ..share }
        };
        let shares: Vec<Needs> = layers.iter().map(share).collect();
        let replica = |windows: Range<usize>| {
            let lengths = &lengths[windows.clone()];
            let stages = plan_stages(&shares, resources.pool, resources.scratch, lengths)?;
            Ok(ReplicaPlan { windows, stages })
        };
        let replicas = layout.windows(&lengths).into_iter().map(replica).collect::<Result<_, _>>()?;
        Ok(Plans { layers, replicas })
    }

    /// Plans with half the memory, or less where half makes no difference; in the end with what one window needs.
    pub(crate) fn smaller(
        &self,
        layout: &Layout,
        needs: &Needs,
        resources: Resources,
        windows: &[Window],
    ) -> Option<(Pool, Plans)> {
        let with = |pool: Pool| Plans::new(layout, needs, Resources { pool, ..resources }, windows);
        let takes_less = |plans: &Plans| plans.device_bytes() < self.device_bytes();
        let mut pool = resources.pool;
        while !pool.is_empty() {
            pool = pool.half();
            match with(pool) {
                Ok(plans) if takes_less(&plans) => return Some((pool, plans)),
                Ok(_) => {}
                Err(least) => {
                    pool = pool.with_device(least.needed);
                    return with(pool).ok().filter(takes_less).map(|plans| (pool, plans));
                }
            }
        }
        None
    }

    fn all(&self) -> impl Iterator<Item = &Plan> {
        self.replicas.iter().flat_map(|replica| &replica.stages)
    }

    /// Bytes that any seat is foreseen to take at most.
    pub fn device_bytes(&self) -> u64 {
        self.all().map(|plan| plan.device_bytes).max().unwrap_or(0)
    }

    /// Bytes that hidden states of all seats are foreseen to take on the host beside that.
    pub fn host_bytes(&self) -> u64 {
        self.all().map(|plan| plan.host_bytes).sum()
    }

    /// Tokens that go through a layer at once, on the seat with the fewest.
    pub fn batch_tokens(&self) -> usize {
        self.all().map(|plan| plan.schedule.batch_tokens).min().unwrap_or(0)
    }

    /// Groups of all replicas.
    pub fn groups(&self) -> usize {
        self.replicas.iter().filter_map(|replica| replica.stages.first()).map(|plan| plan.groups.len()).sum()
    }

    /// Steps of all replicas and stages: layers of all groups, and the head once a group.
    pub fn steps(&self) -> usize {
        let layers = self.layers.last().map_or(0, |layers| layers.end);
        self.groups() * (layers + 1)
    }
}
