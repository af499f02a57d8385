//! Progress of long work with its ETA: a bar on a terminal, otherwise a timestamped line at most every few seconds.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::{Level, Report};

/// Without a terminal: no line sooner than this after the one before, but for the first.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// The first line comes with the first step when more than this is left: people want to know whether to wait.
const WORTH_SAYING: Duration = Duration::from_secs(5);

/// Progress over a known amount of work.
pub(crate) struct Progress<'a> {
    report: &'a Report,
    what: String,
    unit: Unit,
    bar: ProgressBar,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Work done before this run began: it says nothing about speed.
    skipped: Option<u64>,
    /// `None` before the first.
    last_line: Option<Instant>,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    Layers,
    Steps,
}

impl<'a> Progress<'a> {
    pub(crate) fn new(report: &'a Report, what: &str, unit: Unit, total: u64) -> Progress<'a> {
        let template = match unit {
            Unit::Bytes => "{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} ETA {eta}",
            Unit::Layers => "{msg} {bar:30} {pos}/{len} layers, ETA {eta}",
            Unit::Steps => "{msg} {bar:30} {pos}/{len}, ETA {eta}",
        };
        let bar = if report.draws_bars() {
            ProgressBar::new(total)
        } else {
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden())
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        let state = Mutex::new(State { skipped: None, last_line: None });
        Progress { report, what: what.to_owned(), unit, bar, started: Instant::now(), state }
    }

    /// `done` of the total is done.
    pub(crate) fn at(&self, done: u64) {
        let total = self.bar.length().unwrap_or(done);
        let Ok(mut state) = self.state.lock() else { return };
        let skipped = *state.skipped.get_or_insert(done);
        if done == skipped {
            self.bar.set_position(done);
            self.bar.reset_eta();
            return;
        }
        self.bar.set_position(done);
        let elapsed = self.started.elapsed();
        let left = elapsed.mul_f64((total - done.min(total)) as f64 / (done - skipped).max(1) as f64);
        let amount = match self.unit {
            Unit::Bytes => format!("{:.1} of {:.1} MB", done as f64 / 1e6, total as f64 / 1e6),
            Unit::Layers => format!("layer {done} of {total}"),
            Unit::Steps => format!("{done} of {total}"),
        };
        let line = format!(
            "{}: {amount}, {:.0} s so far, about {:.0} s left",
            self.what,
            elapsed.as_secs_f64(),
            left.as_secs_f64()
        );
        let due = match state.last_line {
            None => left > WORTH_SAYING,
            Some(last) => last.elapsed() >= LINE_EVERY,
        };
        if due && self.bar.is_hidden() && self.report.level() >= Level::Normal {
            state.last_line = Some(Instant::now());
            self.report.note(&line);
        } else {
            self.report.log_line(&line);
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
