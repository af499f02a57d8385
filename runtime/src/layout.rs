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
    let total = weights.iter().map(|weight| u128::from(*weight)).sum::<u128>();
    let (mut cuts, mut sum, mut at) = (vec![0], 0_u128, 0);
    for part in 1..parts {
        let least = (at + 1).min(weights.len());
        let most = weights.len().saturating_sub(parts - part).max(at);
        // The cut nearest to its share of the total: half of the next weight still counts to this part.
        let is_short =
            |sum: u128, next: u64| (2 * sum + u128::from(next)) * (parts as u128) < 2 * total * part as u128;
        while at < weights.len() && (at < least || at < most && is_short(sum, weights[at])) {
            sum += u128::from(weights[at]);
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
    let packed = match needs.all as f64 / (1_u64 << 20) as f64 {
        mebibytes @ ..1024.0 => format!("{mebibytes:.1} MiB packed"),
        mebibytes => format!("{:.1} GiB packed", mebibytes / 1024.0),
    };
    if seats == 1 {
        return Ok(Arranged { layout: Layout::ONE, why: "there is one device".to_owned() });
    }
    let stages = (1..=seats.min(layers)).filter(|stages| seats.is_multiple_of(*stages));
    if let Some(layout) = stages.filter_map(holds).next() {
        let why = if layout.stages == 1 {
            format!("each device holds the model ({packed})")
        } else {
            format!("{} devices hold the model ({packed}) together, fewer do not", layout.stages)
        };
        return Ok(Arranged { layout, why });
    }
    let why = format!("all devices together do not hold the model ({packed}): its layers pass through");
    Ok(Arranged { layout: Layout { replicas: 1, stages: 1, ranks: seats }, why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::needs::example as needs;

    fn arranged(device: u64, wish: Wish, seats: usize) -> Layout {
        let pool = Pool::Separate { device, host: 0 };
        arrange(&needs(), pool, 7, wish, seats, 2).expect("a layout").layout
    }

    #[test]
    fn seats_are_counted_ranks_first() {
        let layout = Layout { replicas: 2, stages: 3, ranks: 4 };
        for index in 0..layout.seats() {
            assert_eq!(layout.index(layout.seat(index)), index);
        }
        assert_eq!(layout.seat(4), Seat { replica: 0, stage: 1, rank: 0 });
        assert_eq!(layout.seat(13), Seat { replica: 1, stage: 0, rank: 1 });
        assert_eq!(layout.stage_of(layout.seat(17)), 16..20);
    }

    #[test]
    fn parts_are_contiguous_and_about_as_heavy() {
        assert_eq!(even(&[1; 10], 3), [0..3, 3..7, 7..10]);
        assert_eq!(even(&[9, 1, 1, 1], 2), [0..1, 1..4]);
        assert_eq!(even(&[1, 1, 1, 9], 2), [0..3, 3..4]);
        assert_eq!(even(&[5, 5], 4).iter().filter(|part| !part.is_empty()).count(), 2);
        for parts in 1..9 {
            let cut = even(&[3, 1, 4, 1, 5, 9, 2, 6], parts);
            assert!(cut.iter().all(|part| !part.is_empty()), "{cut:?}");
            assert_eq!((cut[0].start, cut[parts - 1].end), (0, 8));
            assert!(cut.windows(2).all(|pair| pair[0].end == pair[1].start), "{cut:?}");
        }
        // The embedding weighs on the first stage, the head on the last.
        let heavy = Needs { embedding: 300, head: 0, ..needs() };
        assert_eq!(Layout { stages: 2, ..Layout::ONE }.layers(&heavy), [0..1, 1..4]);
    }

    /// 7 bytes of scratch and 200 for the longest window are there in any case.
    #[test]
    fn windows_are_split_before_layers_and_layers_before_rows() {
        let none = Wish::default();
        let split = |replicas, stages, ranks| Layout { replicas, stages, ranks };
        assert_eq!(arranged(907, none, 8), split(8, 1, 1));
        assert_eq!(arranged(906, none, 8), split(4, 2, 1));
        // Embedding and a layer, or a layer and the head.
        assert_eq!(arranged(457, none, 8), split(2, 4, 1));
        assert_eq!(arranged(456, none, 8), split(1, 1, 8));
        assert_eq!(arranged(10, none, 1), Layout::ONE);
    }

    #[test]
    fn what_is_asked_for_is_done() {
        let wish = |ranks, stages| Wish { ranks, stages };
        assert_eq!(arranged(10_000, wish(Some(2), None), 2), Layout { ranks: 2, ..Layout::ONE });
        let all = Layout { replicas: 2, stages: 2, ranks: 2 };
        assert_eq!(arranged(10_000, wish(Some(2), Some(2)), 8), all);
        let refused = |wish, seats| {
            arrange(&needs(), Pool::Shared(0), 0, wish, seats, 2).expect_err("refused").to_string()
        };
        assert_eq!(
            refused(wish(Some(3), None), 4),
            "4 processes were started, which --tp 3 times --pp 1 does not divide: start a multiple of 3"
        );
        assert!(refused(wish(None, Some(5)), 5).contains("at most --pp 4"));
    }

    #[test]
    fn a_layout_is_told_from_the_outside_in() {
        assert_eq!(Layout::ONE.to_string(), "one rank");
        assert_eq!(
            Layout { replicas: 2, stages: 1, ranks: 4 }.to_string(),
            "2 replicas (windows are split) of 4 ranks (rows are split, tp)"
        );
    }
}
