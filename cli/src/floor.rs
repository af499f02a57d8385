//! The least time that a run can take on this machine's cores, and what it will take about: its arithmetic over what an
//! instruction does at most. Times no run.

use ctq_kernels::cpu::peak::{self, Arithmetic, Instruction};
use ctq_runtime::{Operations, Work};
use serde::Serialize;

/// Part of the peak that a whole run reaches: what is not arithmetic, and what kernels lose.
const REACHED: f64 = 0.75;

/// Operations a second that one core does at most, by arithmetic: of a short measurement.
pub(crate) fn peaks() -> Option<Operations> {
    let peaks = peak::peaks();
    let of = |arithmetic| {
        let fastest = Instruction::fastest(arithmetic);
        let peak = peaks.iter().find(|peak| peak.instruction == fastest)?;
        Some(peak.operations_per_second)
    };
    Some(Operations {
        f32: of(Arithmetic::F32)?,
        bf16: of(Arithmetic::Bf16)?,
        integers: of(Arithmetic::Integers)?,
    })
}

/// Arithmetic of a run, and how long it takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Floor {
    /// Operations of the layers' linears.
    linears: f64,
    /// Operations of attention.
    attention: f64,
    /// Operations of the head.
    head: f64,
    /// Seconds at the peak of the instructions used, on all threads; none where no peak is known.
    floor_seconds: Option<f64>,
    /// Seconds that the run takes about.
    eta_seconds: Option<f64>,
}

impl Floor {
    /// Of work that `threads` threads share.
    pub(crate) fn of(work: &Work, threads: usize, peaks: Option<&Operations>) -> Floor {
        let floor_seconds = peaks.map(|peaks| work.all().seconds(peaks) / threads as f64);
        Floor {
            linears: work.linears.all(),
            attention: work.attention.all(),
            head: work.head.all(),
            floor_seconds,
            eta_seconds: floor_seconds.map(|seconds| seconds / REACHED),
        }
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let Floor { linears, attention, head, floor_seconds, eta_seconds } = *self;
        let tera = |operations: f64| operations / 1e12;
        let work = format!(
            "{:.3} T operations (linears {:.3}, attention {:.3}, head {:.3})",
            tera(linears + attention + head),
            tera(linears),
            tera(attention),
            tera(head)
        );
        match (floor_seconds, eta_seconds) {
            (Some(floor), Some(eta)) => format!(
                "work:     {work}\nfloor:    {} at the peak of the instructions used; about {} at {:.0} % of it",
                duration(floor),
                duration(eta),
                100.0 * REACHED
            ),
            (None, _) | (_, None) => format!("work:     {work}"),
        }
    }
}

/// Seconds for people.
fn duration(seconds: f64) -> String {
    match seconds {
        ..120.0 => format!("{seconds:.1} s"),
        ..7200.0 => format!("{:.1} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work() -> Work {
        let bf16 = |bf16| Operations { bf16, ..Operations::default() };
        let linears = Operations { integers: 4e12, ..Operations::default() };
        Work { linears, attention: bf16(0.25e12), head: bf16(0.25e12) }
    }

    #[test]
    fn a_floor_is_of_the_peak_of_each_arithmetic_and_of_all_threads() {
        let peaks = Operations { f32: 0.0, bf16: 0.5e12, integers: 1e12 };
        let floor = Floor::of(&work(), 2, Some(&peaks));
        assert_eq!((floor.floor_seconds, floor.eta_seconds), (Some(2.5), Some(2.5 / 0.75)));
        assert_eq!(
            floor.text(),
            "work:     4.500 T operations (linears 4.000, attention 0.250, head 0.250)\nfloor:    2.5 s at the peak of the instructions used; about 3.3 s at 75 % of it"
        );
    }

    #[test]
    fn without_a_peak_there_is_work_and_no_time() {
        let floor = Floor::of(&work(), 2, None);
        assert_eq!((floor.floor_seconds, floor.eta_seconds), (None, None));
        assert!(!floor.text().contains("floor"));
    }

    #[test]
    fn times_are_told_in_units_of_their_size() {
        assert_eq!([11.84, 119.0, 150.0, 9_000.0].map(duration), ["11.8 s", "119.0 s", "2.5 min", "2.5 h"]);
    }
}
