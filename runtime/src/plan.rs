//! How the windows of a run are cut into groups and batches, and what stays where: as memory allows. Numbers in, numbers
//! out; the scores cannot tell.
//!
//! Each group reads all weights once unless they stay, so groups are as large as memory allows where they do not; batches
//! only need to be large enough that a layer's weights are decoded for many tokens.

use std::ops::Range;

use crate::groups::groups;
use crate::needs::Needs;
use crate::schedule::{HiddenPlace, Schedule};

/// Tokens of a batch that are plenty: more make nothing faster, and take memory. Decoding the weights of a layer for so
/// many is a thirtieth of their products.
pub const PLENTY_TOKENS: usize = 8_192;

/// Tokens of a batch below which hidden states rather wait on the host, and layers rather pass through: smaller batches
/// keep a device waiting.
const ENOUGH_TOKENS: usize = 4_096;

/// Bytes that the activations of a batch may take in host memory, unless they are of one window: no larger batch is
/// faster, for weights are decoded for thousands of tokens at once, and the memory stays free for pages of files.
const HOST_ACTIVATIONS: u64 = 384 << 20;

/// Memory that a run may take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// A backend that computes in host memory: so much for hidden states and what a layer makes of them. Weights are
    /// not counted, for their pages are the file cache's.
    Shared(u64),
    /// A device with memory of its own.
    Separate {
        /// On the device, for everything.
        device: u64,
        /// On the host, for hidden states.
        host: u64,
    },
}

impl Pool {
    /// Half of it.
    pub(crate) fn half(self) -> Pool {
        match self {
            Pool::Shared(bytes) => Pool::Shared(bytes / 2),
            // It is the device that had no room.
            Pool::Separate { device, host } => Pool::Separate { device: device / 2, host },
        }
    }

    /// The same with `device` bytes where the work is done.
    pub(crate) fn with_device(self, device: u64) -> Pool {
        match self {
            Pool::Shared(_) => Pool::Shared(device),
            Pool::Separate { host, .. } => Pool::Separate { device, host },
        }
    }

    /// True where nothing is left to halve.
    pub(crate) fn is_empty(self) -> bool {
        match self {
            Pool::Shared(bytes) | Pool::Separate { device: bytes, .. } => bytes == 0,
        }
    }
}

/// What one seat may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Memory.
    pub pool: Pool,
    /// Bytes that the backend takes on its device whatever runs.
    pub scratch: u64,
}

/// How a run is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Windows that share one loading of each layer, in order.
    pub groups: Vec<Range<usize>>,
    /// Tokens that a group may have, unless it is one window.
    pub group_tokens: u64,
    /// How each group runs.
    pub schedule: Schedule,
    /// Bytes that the backend is foreseen to take at most; where it computes in host memory, without weights.
    pub device_bytes: u64,
    /// Bytes that hidden states are foreseen to take on the host beside that, snapshots included.
    pub host_bytes: u64,
}

/// A device without room for even one window at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "one window of {tokens} tokens takes {needed} bytes of device memory and {budget} may be used: give a shorter --ctx, more --memory, or --device cpu"
)]
pub struct TooSmall {
    /// Tokens of the longest window.
    pub tokens: usize,
    /// Bytes that one window needs, with all that must be there beside it.
    pub needed: u64,
    /// Bytes that there are.
    pub budget: u64,
}

/// Cuts windows of `lengths` tokens into groups and batches that `pool` has room for. `scratch`: bytes that the backend
/// takes on its device whatever runs.
///
/// # Errors
/// Where a device has no room for the longest window by itself. In host memory one window always runs.
pub fn plan(needs: &Needs, pool: Pool, scratch: u64, lengths: &[usize]) -> Result<Plan, TooSmall> {
    plan_windows(needs, pool, scratch, &Windows::new(lengths, u64::MAX))
}

/// Groups in flight for each stage: some of the time at the beginning and the end a stage has nothing to do, one part in
/// as many.
const GROUPS_IN_FLIGHT: usize = 4;

/// As [`plan()`] for stages that hand groups from one to the next: the groups are the same for all, and there are enough
/// for all stages to work at a time. `needs`: of each stage.
///
/// # Errors
/// As [`plan()`].
pub(crate) fn plan_stages(
    needs: &[Needs],
    pool: Pool,
    scratch: u64,
    lengths: &[usize],
) -> Result<Vec<Plan>, TooSmall> {
    let total: usize = lengths.iter().sum();
    let mut most = match needs.len() {
        0 | 1 => u64::MAX,
        stages => (total / (stages * GROUPS_IN_FLIGHT)).max(1) as u64,
    };
    loop {
        let windows = Windows::new(lengths, most);
        let plans: Vec<Plan> = needs
            .iter()
            .map(|needs| plan_windows(needs, pool, scratch, &windows))
            .collect::<Result<_, _>>()?;
        if plans.windows(2).all(|pair| pair[0].groups == pair[1].groups) {
            return Ok(plans);
        }
        // What the stage with the least room can do, all can.
        let least = plans.iter().map(|plan| plan.group_tokens).min().unwrap_or(most);
        most = if least < most { least } else { most - most.div_ceil(8) };
    }
}

fn plan_windows(needs: &Needs, pool: Pool, scratch: u64, windows: &Windows<'_>) -> Result<Plan, TooSmall> {
    match pool {
        Pool::Shared(budget) => Ok(shared(needs, budget, scratch, windows)),
        Pool::Separate { device, host } => {
            let room = Room { needs, device, host, scratch };
            room.resident(windows).map_or_else(|| room.streaming(windows), Ok)
        }
    }
}

/// Lengths of windows, looked at once.
struct Windows<'a> {
    lengths: &'a [usize],
    total: u64,
    longest: u64,
    /// Tokens that a group may have however much room there is.
    most: u64,
    /// Tokens of a batch that are plenty.
    plenty: u64,
}

/// Groups of windows.
struct Cut {
    groups: Vec<Range<usize>>,
    /// Tokens that each may have.
    tokens: u64,
    /// Tokens of the largest.
    largest: u64,
}

impl<'a> Windows<'a> {
    fn new(lengths: &'a [usize], most: u64) -> Windows<'a> {
        let longest = lengths.iter().copied().max().unwrap_or(0) as u64;
        let total = lengths.iter().sum::<usize>() as u64;
        Windows { lengths, total, longest, most, plenty: PLENTY_TOKENS as u64 }
    }

    /// Groups of at most `tokens` tokens.
    fn cut(&self, tokens: u64) -> Cut {
        let tokens = tokens.min(self.most);
        let groups = groups(self.lengths, usize::try_from(tokens).unwrap_or(usize::MAX));
        let largest = groups.iter().map(|group| self.lengths[group.clone()].iter().sum::<usize>()).max();
        Cut { groups, tokens, largest: largest.unwrap_or(0) as u64 }
    }

    /// Tokens of a batch that is worth it.
    fn enough(&self) -> u64 {
        (ENOUGH_TOKENS as u64).min(self.plenty).min(self.total).max(self.longest)
    }

    /// Tokens of a batch that may have `tokens`: no more than are plenty, no less than one window.
    fn batch(&self, tokens: u64) -> u64 {
        tokens.min(self.plenty).max(self.longest)
    }
}

fn shared(needs: &Needs, budget: u64, scratch: u64, windows: &Windows<'_>) -> Plan {
    let needs = &Needs { activations: needs.activations_on_host, ..needs.clone() };
    let plenty = windows.plenty.min(HOST_ACTIVATIONS / needs.activations.max(1));
    let windows = &Windows { plenty, ..*windows };
    let room = Room { needs, device: budget, host: 0, scratch };
    if let Some(plan) = room.on_device(0, windows) {
        return Plan { host_bytes: 0, ..plan };
    }
    // Not even a batch that is worth it.
    let left = budget.saturating_sub(scratch);
    let batch = windows.batch(left / (needs.activations + needs.hidden).max(1));
    let rest = left.saturating_sub(batch.min(windows.total) * needs.activations);
    let Cut { groups, tokens, largest } = windows.cut(rest / needs.hidden.max(1));
    Plan {
        groups,
        group_tokens: tokens,
        schedule: Schedule { batch_tokens: batch as usize, hidden: HiddenPlace::Device, resident_layers: 0 },
        device_bytes: scratch + batch.min(largest) * needs.activations + largest * needs.hidden,
        host_bytes: 0,
    }
}

/// A device and what is to run there.
struct Room<'a> {
    needs: &'a Needs,
    device: u64,
    host: u64,
    scratch: u64,
}

impl Room<'_> {
    /// Room for the hidden states of a group and the activations of a batch, beside `weights`.
    fn beside(&self, weights: u64) -> u64 {
        self.device.saturating_sub(self.scratch + weights)
    }

    /// All layers stay: the weights cross once, however many groups there are, so that a group is no more than a batch.
    fn resident(&self, windows: &Windows<'_>) -> Option<Plan> {
        let most = windows.most.min(windows.plenty);
        let plan = self.on_device(self.needs.all, &Windows { most, ..*windows })?;
        let resident_layers = self.needs.layers.len();
        Some(Plan { schedule: Schedule { resident_layers, ..plan.schedule }, ..plan })
    }

    /// Layers pass through, two at a time. Hidden states wait where fewer bytes have to cross then.
    fn streaming(&self, windows: &Windows<'_>) -> Result<Plan, TooSmall> {
        let weights = self.needs.passing();
        let plans = [self.on_device(weights, windows), self.on_host(weights, windows)];
        let least = plans.into_iter().flatten().min_by_key(|plan| self.crossing(plan, windows.total));
        least.map_or_else(|| self.one_at_a_time(weights, windows), Ok)
    }

    /// Bytes that cross between host and device: all layers for each group, and hidden states that wait on the host for
    /// each layer, there and back.
    fn crossing(&self, plan: &Plan, tokens: u64) -> u64 {
        let layers: u64 = self.needs.layers.iter().sum();
        let states = match plan.schedule.hidden {
            HiddenPlace::Device => 0,
            HiddenPlace::Host => 2 * self.needs.layers.len() as u64 * tokens * self.needs.hidden_on_host,
        };
        plan.groups.len() as u64 * layers + states
    }

    /// Hidden states stay on the device, beside a batch that is worth it.
    fn on_device(&self, weights: u64, windows: &Windows<'_>) -> Option<Plan> {
        let (hidden, activations) = (self.needs.hidden, self.needs.activations);
        let room = self.beside(weights);
        let enough = windows.enough();
        if enough * (hidden + activations) > room {
            return None;
        }
        let cut = windows.cut((room - enough * activations) / hidden.max(1));
        let batch = windows.batch((room - cut.largest * hidden) / activations.max(1));
        Some(self.plan(cut, batch, HiddenPlace::Device, weights))
    }

    /// Hidden states wait on the host; the device has those of one batch.
    fn on_host(&self, weights: u64, windows: &Windows<'_>) -> Option<Plan> {
        let token = self.needs.hidden + self.needs.activations;
        let room = self.beside(weights);
        let on_host = self.host_bytes(HiddenPlace::Host, 1).max(1);
        if windows.longest * token > room || windows.longest * on_host > self.host {
            return None;
        }
        let cut = windows.cut(self.host / on_host);
        let batch = windows.batch(room / token.max(1));
        Some(self.plan(cut, batch, HiddenPlace::Host, weights))
    }

    /// Batches of one window, their hidden states on the device: the least that there can be.
    fn one_at_a_time(&self, weights: u64, windows: &Windows<'_>) -> Result<Plan, TooSmall> {
        let (hidden, activations) = (self.needs.hidden, self.needs.activations);
        let needed = self.scratch + weights + windows.longest * (hidden + activations);
        if needed > self.device {
            return Err(TooSmall { tokens: windows.longest as usize, needed, budget: self.device });
        }
        let room = self.beside(weights) - windows.longest * activations;
        let cut = windows.cut(room / hidden.max(1));
        Ok(self.plan(cut, windows.longest, HiddenPlace::Device, weights))
    }

    fn plan(&self, cut: Cut, batch: u64, hidden: HiddenPlace, weights: u64) -> Plan {
        let Cut { groups, tokens, largest } = cut;
        let batch_rows = batch.min(largest);
        let waiting = match hidden {
            HiddenPlace::Device => largest,
            HiddenPlace::Host => batch_rows,
        };
        Plan {
            groups,
            group_tokens: tokens,
            schedule: Schedule { batch_tokens: batch as usize, hidden, resident_layers: 0 },
            device_bytes: self.scratch
                + weights
                + batch_rows * self.needs.activations
                + waiting * self.needs.hidden,
            host_bytes: self.host_bytes(hidden, largest),
        }
    }

    /// Bytes that a group's hidden states take on the host, with a snapshot of them on its way to the disk.
    fn host_bytes(&self, hidden: HiddenPlace, tokens: u64) -> u64 {
        let copies = match hidden {
            HiddenPlace::Device => 2,
            HiddenPlace::Host => 3,
        };
        copies * tokens * self.needs.hidden_on_host
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::needs::example as needs;

    fn separate(device: u64, host: u64) -> Pool {
        Pool::Separate { device, host }
    }

    #[test]
    fn everything_stays_on_a_device_that_has_room_for_it() {
        let lengths = [50, 50, 20];
        let plan = plan(&needs(), separate(7 + 700 + 120 * 100, 0), 7, &lengths).expect("room");
        assert_eq!(plan.groups, std::iter::once(0..3).collect::<Vec<_>>());
        assert_eq!((plan.schedule.resident_layers, plan.schedule.hidden), (4, HiddenPlace::Device));
        assert!(plan.schedule.batch_tokens >= 120);
        assert_eq!(plan.device_bytes, 7 + 700 + 120 * 100);
    }

    #[test]
    fn layers_pass_through_two_at_a_time_where_they_do_not_all_fit() {
        let lengths = [50, 50, 20];
        let plan = plan(&needs(), separate(200 + 120 * 100, 0), 0, &lengths).expect("room");
        assert_eq!(plan.groups.len(), 1);
        assert_eq!((plan.schedule.resident_layers, plan.schedule.hidden), (0, HiddenPlace::Device));
    }

    /// Layers that weigh much against hidden states.
    fn heavy() -> Needs {
        Needs { layers: vec![10_000_000; 4], all: 40_000_300, ..needs() }
    }

    /// Room for a batch that is worth it and hidden states of as many tokens: three groups on the device, or one whose
    /// hidden states wait on the host.
    #[test]
    fn hidden_states_wait_on_the_host_where_fewer_bytes_cross() {
        let lengths = [1_000; 10];
        let with = |needs: &Needs| {
            let room = ENOUGH_TOKENS as u64 * 100;
            let device = needs.passing() + room;
            let plan = plan(needs, separate(device, 10_000 * 30), 0, &lengths).expect("room");
            assert!(plan.device_bytes <= device, "{plan:?}");
            (plan.groups.len(), plan.schedule.hidden, plan.host_bytes)
        };
        assert_eq!(with(&heavy()), (1, HiddenPlace::Host, 10_000 * 30));
        // Three times 400 bytes of layers, or once and four layers' hidden states there and back.
        let light = Needs { all: 1 << 40, ..needs() };
        assert_eq!(with(&light), (3, HiddenPlace::Device, 4_000 * 20));
    }

    #[test]
    fn hidden_states_wait_on_the_host_where_a_batch_that_is_worth_it_has_no_room_beside_them() {
        let lengths = [50; 10];
        let plan = plan(&needs(), separate(200 + 60 * 100, 500 * 30), 0, &lengths).expect("room");
        assert_eq!((plan.groups.len(), plan.schedule.hidden), (1, HiddenPlace::Host));
        assert_eq!(plan.schedule.batch_tokens, 60);
        assert_eq!((plan.device_bytes, plan.host_bytes), (200 + 60 * 100, 500 * 30));
    }

    #[test]
    fn groups_are_no_more_than_batches_where_all_weights_stay() {
        let plan = plan(&needs(), separate(u64::MAX, 0), 0, &[2_048; 73]).expect("room");
        assert_eq!(plan.schedule.resident_layers, 4);
        assert_eq!(plan.groups.len(), 19);
        let tokens = PLENTY_TOKENS as u64;
        assert_eq!(plan.device_bytes, 700 + tokens * 100);
    }

    #[test]
    fn hidden_states_wait_on_the_device_where_the_host_has_no_room() {
        let lengths = [50; 10];
        let plan = plan(&needs(), separate(200 + 60 * 100, 0), 0, &lengths).expect("room");
        assert_eq!(plan.schedule.hidden, HiddenPlace::Device);
        assert_eq!((plan.groups.len(), plan.schedule.batch_tokens), (4, 50));
        assert_eq!(plan.device_bytes, 200 + 50 * 90 + 150 * 10);
    }

    /// The groups of all stages are those of the stage with the least room, and there are enough for all to work.
    #[test]
    fn stages_have_the_same_groups() {
        let lengths = [50; 40];
        let stages = [needs().share(&(0..1), 1), needs().share(&(1..4), 1)];
        let plenty = plan_stages(&stages, separate(1 << 30, 0), 0, &lengths).expect("room");
        assert_eq!(plenty[0].groups, plenty[1].groups);
        assert!(plenty[0].groups.len() >= 2 * GROUPS_IN_FLIGHT, "{:?}", plenty[0].groups);
        assert!(plenty.iter().all(|plan| plan.schedule.resident_layers > 0));
        // Room for one window beside the weights of the second stage, for more beside those of the first.
        let least = 450 + 50 * 100;
        for device in [least, least + 700, least + 3_000] {
            let plans = plan_stages(&stages, separate(device, 0), 0, &lengths).expect("room");
            assert_eq!(plans[0].groups, plans[1].groups, "{device}");
            assert!(plans.iter().all(|plan| plan.device_bytes <= device), "{device}: {plans:?}");
        }
    }

    #[test]
    fn batches_are_plenty_and_groups_as_large_as_fits() {
        let lengths = [1_000; 100];
        // Hidden states of 60 windows beside a batch that is enough, but not one that is plenty.
        let room = 60_000 * 10 + 5_000 * 90;
        let plan = plan(&needs(), separate(200 + room, 0), 0, &lengths).expect("room");
        assert_eq!(plan.schedule.resident_layers, 4);
        let streamed =
            super::plan(&heavy(), separate(heavy().passing() + room, 0), 0, &lengths).expect("room");
        assert!(streamed.groups.len() <= 2, "{:?}", streamed.groups);
        assert!(streamed.schedule.batch_tokens >= ENOUGH_TOKENS);
        assert!(streamed.device_bytes <= heavy().passing() + room);
        let plenty = super::plan(&needs(), separate(u64::MAX, u64::MAX), 0, &lengths).expect("room");
        assert_eq!(plenty.schedule.batch_tokens, PLENTY_TOKENS);
    }

    #[test]
    fn the_longest_window_decides_where_lengths_differ() {
        let lengths = [10, 400, 10, 30];
        let needed = 200 + 400 * 100;
        let least = plan(&needs(), separate(needed, 0), 0, &lengths).expect("room");
        assert_eq!(least.schedule.batch_tokens, 400);
        assert!(least.device_bytes <= needed);
        assert_eq!(
            plan(&needs(), separate(needed - 1, 1 << 40), 0, &lengths),
            Err(TooSmall { tokens: 400, needed, budget: needed - 1 })
        );
    }

    #[test]
    fn two_neighbours_count_and_not_any_two() {
        let uneven = Needs { layers: vec![300, 10, 300, 20], ..needs() };
        assert_eq!(uneven.passing(), 320);
        let wide = Needs { embedding: 1_000, ..needs() };
        assert_eq!(wide.passing(), 1_000);
    }

    #[test]
    fn in_host_memory_groups_and_batches_follow_the_budget() {
        let lengths = [50; 10];
        let all = plan(&needs(), Pool::Shared(500 * 100), 0, &lengths).expect("room");
        assert_eq!(all.groups.len(), 1);
        let some = plan(&needs(), Pool::Shared(120 * 100), 0, &lengths).expect("room");
        assert_eq!((some.groups.len(), some.schedule.batch_tokens), (5, 120));
        // Groups come first, as on a device: a batch needs no more than is worth it.
        let budget = 12_000 * 100;
        let long = plan(&needs(), Pool::Shared(budget), 0, &[1_000; 60]).expect("room");
        assert_eq!(long.groups.len(), 1);
        assert!((ENOUGH_TOKENS..PLENTY_TOKENS).contains(&long.schedule.batch_tokens), "{long:?}");
        assert!(long.device_bytes <= budget && long.host_bytes == 0, "{long:?}");
    }

    /// Over many budgets: what is planned covers all windows and fits. With more memory never more bytes cross, but where
    /// the host has none and a batch that is worth it takes room from hidden states.
    #[test]
    fn plans_fit_and_with_more_memory_no_more_bytes_cross() {
        let lengths = [700, 3, 2_000, 2_000, 1_999, 64, 1, 900, 2_000, 2_000];
        for host in [0, 100_000, 1 << 40] {
            let mut least = u64::MAX;
            for device in (200_000..2_000_000).step_by(7_777) {
                let Ok(plan) = plan(&needs(), separate(device, host), 11, &lengths) else {
                    assert!(device < 11 + 200 + 2_000 * 100, "{device} is enough for a window");
                    continue;
                };
                assert!(plan.device_bytes <= device, "{device}: {plan:?}");
                assert!(plan.schedule.hidden == HiddenPlace::Device || plan.host_bytes <= host, "{plan:?}");
                let covered: Vec<usize> = plan.groups.iter().cloned().flatten().collect();
                assert_eq!(covered, (0..lengths.len()).collect::<Vec<_>>());
                if plan.schedule.resident_layers == 0 && host > 0 {
                    let needs = &needs();
                    let crossing = Room { needs, device, host, scratch: 11 }.crossing(&plan, 11_667);
                    assert!(crossing <= least, "{device}: {plan:?}");
                    least = crossing;
                }
            }
        }
    }

    /// 4,096 bytes a token: 384 MiB are 98,304 tokens, more than are plenty; 64 times as many bytes are of 1,536.
    #[test]
    fn in_host_memory_activations_of_a_batch_are_bounded() {
        let lengths = [1_000; 100];
        let with = |activations_on_host: u64| {
            let needs = Needs { activations_on_host, ..needs() };
            plan(&needs, Pool::Shared(1 << 40), 0, &lengths).expect("room")
        };
        assert_eq!(with(4_096).schedule.batch_tokens, PLENTY_TOKENS);
        let wide = with(64 * 4_096);
        assert_eq!((wide.groups.len(), wide.schedule.batch_tokens), (1, 1_536));
        assert_eq!(wide.device_bytes, 1_536 * 64 * 4_096 + 100_000 * 10);
        // One window always runs.
        assert_eq!(with(1 << 30).schedule.batch_tokens, 1_000);
    }

    #[test]
    fn in_host_memory_one_window_always_runs() {
        let plan = plan(&needs(), Pool::Shared(1), 0, &[50, 7]).expect("room");
        assert_eq!((plan.groups.len(), plan.schedule.batch_tokens), (2, 50));
    }
}
