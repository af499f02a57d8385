//! Which seat does which part of a run: replicas that each score some of the windows, stages that each run some of the
//! layers, ranks that each hold some rows of every matrix. Numbers in, numbers out; the scores cannot tell.

use std::fmt;
use std::ops::Range;

use crate::needs::Needs;
use crate::plan::Pool;

/// How seats are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Copies of the model, each for some of the windows.
    pub replicas: usize,
    /// Runs of layers of each replica, one after the other.
    pub stages: usize,
    /// Ranks of each stage, which share every linear by output rows.
    pub ranks: usize,
}

/// One place of a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Which replica.
    pub replica: usize,
    /// Which stage of it.
    pub stage: usize,
    /// Which rank of that.
    pub rank: usize,
}

/// What was asked of a layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Ranks, where they are named.
    pub ranks: Option<usize>,
    /// Stages, where they are named.
    pub stages: Option<usize>,
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "replica {}, stage {}, rank {}", self.replica, self.stage, self.rank)
    }
}

impl Layout {
    /// One seat.
    pub const ONE: Layout = Layout { replicas: 1, stages: 1, ranks: 1 };

    /// All seats.
    pub fn seats(&self) -> usize {
        self.replicas * self.stages * self.ranks
    }

    /// The seats in order: ranks of a stage are neighbours, then stages of a replica.
    pub fn seat(&self, index: usize) -> Seat {
        Seat {
            replica: index / (self.stages * self.ranks),
            stage: index / self.ranks % self.stages,
            rank: index % self.ranks,
        }
    }

    /// Where a seat stands among all.
    pub fn index(&self, seat: Seat) -> usize {
        (seat.replica * self.stages + seat.stage) * self.ranks + seat.rank
    }

    /// The seats that share a stage with this one, in order.
    pub fn stage_of(&self, seat: Seat) -> Range<usize> {
        let first = self.index(Seat { rank: 0, ..seat });
        first..first + self.ranks
    }

    /// Cuts windows of `lengths` tokens among the replicas: contiguous, about the same number of tokens each.
    pub fn windows(&self, lengths: &[usize]) -> Vec<Range<usize>> {
        even(&lengths.iter().map(|length| *length as u64).collect::<Vec<_>>(), self.replicas)
    }

    /// Cuts layers among the stages: contiguous, about the same number of bytes each, the embedding with the first and
    /// the head with the last.
    pub fn layers(&self, needs: &Needs) -> Vec<Range<usize>> {
        let mut bytes = needs.layers.clone();
        if let Some(first) = bytes.first_mut() {
            *first += needs.embedding;
        }
        if let Some(last) = bytes.last_mut() {
            *last += needs.head;
        }
        even(&bytes, self.stages)
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = |count: usize, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
        let parts = [
            (self.replicas, "replica", "windows are split"),
            (self.stages, "stage", "layers are split, pp"),
            (self.ranks, "rank", "rows are split, tp"),
        ];
        let told: Vec<String> = parts
            .iter()
            .filter(|(count, ..)| *count > 1)
            .map(|(count, one, how)| format!("{} ({how})", counted(*count, one)))
            .collect();
        if told.is_empty() { f.write_str("one rank") } else { f.write_str(&told.join(" of ")) }
    }
}

/// Cuts a row of weights into `parts` contiguous parts that are about as heavy as one another. None is empty while there
/// are enough of them.
fn even(weights: &[u64], parts: usize) -> Vec<Range<usize>> {
    let total: u64 = weights.iter().sum();
    let (mut cuts, mut sum, mut at) = (vec![0], 0_u64, 0);
    for part in 1..parts {
        let goal = total as u128 * part as u128 / parts as u128;
        let (least, most) = ((at + 1).min(weights.len()), weights.len().saturating_sub(parts - part));
        // The cut nearest to the goal.
        while at < most && (at < least || u128::from(sum) + u128::from(weights[at] / 2) < goal) {
            sum += weights[at];
            at += 1;
        }
        cuts.push(at);
    }
    cuts.push(weights.len());
    cuts.windows(2).map(|cut| cut[0]..cut[1]).collect()
}

/// How a layout came about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arranged {
    /// The layout.
    pub layout: Layout,
    /// Why, for people.
    pub why: String,
}

/// A wish that cannot be granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotArrange {
    /// More stages than layers.
    #[error("--pp {stages} asks for more stages than the model has layers: give at most --pp {layers}")]
    TooManyStages {
        /// Asked for.
        stages: usize,
        /// There are.
        layers: usize,
    },
    /// Processes that do not divide into groups of as many ranks and stages.
    #[error(
        "{seats} processes were started, which --tp {ranks} times --pp {stages} does not divide: start a multiple of {}",
        ranks * stages
    )]
    DoesNotDivide {
        /// Processes.
        seats: usize,
        /// Ranks of a stage.
        ranks: usize,
        /// Stages of a replica.
        stages: usize,
    },
}

/// Arranges `seats` devices with `pool` of memory each, all of which are to be used, for a model of these `needs` and
/// windows of up to `longest` tokens.
///
/// Where nothing is wished for: each device holds the model, and windows are split; else few devices hold it together,
/// by layers; else all share every layer, which passes through.
///
/// # Errors
/// Where the wish does not fit the number of seats or layers.
pub fn arrange(
    needs: &Needs,
    pool: Pool,
    scratch: u64,
    wish: Wish,
    seats: usize,
    longest: usize,
) -> Result<Arranged, CannotArrange> {
    let layers = needs.layers.len();
    if let Some(stages) = wish.stages.filter(|stages| *stages > layers.max(1)) {
        return Err(CannotArrange::TooManyStages { stages, layers });
    }
    if wish != Wish::default() {
        let (ranks, stages) = (wish.ranks.unwrap_or(1), wish.stages.unwrap_or(1));
        if !seats.is_multiple_of(ranks * stages) {
            return Err(CannotArrange::DoesNotDivide { seats, ranks, stages });
        }
        let layout = Layout { replicas: seats / (ranks * stages), stages, ranks };
        return Ok(Arranged { layout, why: "as asked for".to_owned() });
    }
    let holds = |stages: usize| {
        let layout = Layout { replicas: seats / stages, stages, ranks: 1 };
        let bytes = |layers: &Range<usize>| needs.share(layers, 1).all;
        let largest = layout.layers(needs).iter().map(bytes).max().unwrap_or(0);
        let has_room = match pool {
            // Weights are pages of files, which all that run on a machine share.
            Pool::Shared(_) => true,
            Pool::Separate { device, .. } => {
                let window = longest as u64 * (needs.hidden + needs.activations);
                scratch + largest + window <= device
            }
        };
        has_room.then_some(layout)
    };
    let gibibytes = needs.all as f64 / (1_u64 << 30) as f64;
    if seats == 1 {
        return Ok(Arranged { layout: Layout::ONE, why: "there is one device".to_owned() });
    }
    let stages = (1..=seats.min(layers)).filter(|stages| seats.is_multiple_of(*stages));
    if let Some(layout) = stages.filter_map(holds).next() {
        let why = if layout.stages == 1 {
            format!("each device holds the model ({gibibytes:.1} GiB packed)")
        } else {
            format!(
                "{} devices hold the model ({gibibytes:.1} GiB packed) together, fewer do not",
                layout.stages
            )
        };
        return Ok(Arranged { layout, why });
    }
    let why = format!(
        "all devices together do not hold the model ({gibibytes:.1} GiB packed): its layers pass through"
    );
    Ok(Arranged { layout: Layout { replicas: 1, stages: 1, ranks: seats }, why })
}
