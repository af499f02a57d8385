//! What people read on stderr: notes, warnings, errors, and the log file that gets all of it.
//!
//! stdout belongs to results alone.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use anyhow::Context;

use crate::args::OutputOptions;

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Quiet,
    Normal,
    Verbose,
}

/// Where prose goes.
pub(crate) struct Report {
    level: Level,
    /// Which of several processes this is; the first speaks for all.
    rank: OnceLock<usize>,
    log: Option<(PathBuf, Mutex<File>)>,
    started: Instant,
}

impl Report {
    pub(crate) fn new(options: &OutputOptions) -> anyhow::Result<Report> {
        let level = match (options.quiet, options.verbose) {
            (true, _) => Level::Quiet,
            (false, true) => Level::Verbose,
            (false, false) => Level::Normal,
        };
        let log = match &options.log {
            Some(path) => Some((path.clone(), Mutex::new(log_file(path)?))),
            None => None,
        };
        Ok(Report { level, rank: OnceLock::new(), log, started: Instant::now() })
    }

    /// From now on this is one of several processes: all but the first say only what is wrong, unless asked for more, and
    /// who they are.
    ///
    /// # Errors
    /// Where its log cannot be written.
    pub(crate) fn as_rank(&self, rank: usize) -> anyhow::Result<()> {
        let _ = self.rank.set(rank);
        if let (Some((path, log)), 1..) = (&self.log, rank) {
            let mut path = path.clone().into_os_string();
            path.push(format!(".rank{rank}"));
            *log.lock().unwrap_or_else(PoisonError::into_inner) = log_file(Path::new(&path))?;
        }
        Ok(())
    }

    /// How much is said.
    pub(crate) fn level(&self) -> Level {
        match (self.rank.get(), self.level) {
            (Some(1..), Level::Normal) => Level::Quiet,
            (_, level) => level,
        }
    }

    /// Something a user wants to know unless they asked for quiet.
    pub(crate) fn note(&self, text: &str) {
        self.say(Level::Normal, text);
    }

    /// Something only `-v` shows.
    pub(crate) fn detail(&self, text: &str) {
        self.say(Level::Verbose, text);
    }

    /// Something that may make a result other than expected: shown even when quiet. Of several processes, the first warns
    /// for all.
    pub(crate) fn warning(&self, text: &str) {
        let level = match self.rank.get() {
            Some(1..) => Level::Verbose,
            Some(0) | None => Level::Quiet,
        };
        self.say(level, &format!("warning: {text}"));
    }

    /// The reason a command ends without its result.
    pub(crate) fn failure(&self, error: &anyhow::Error) {
        self.say(Level::Quiet, &format!("error: {}", chain(error)));
    }

    #[expect(clippy::print_stderr, reason = "this is the place where prose reaches stderr")]
    fn say(&self, level: Level, text: &str) {
        if level <= self.level() {
            match self.rank.get() {
                Some(rank @ 1..) => eprintln!("[rank {rank}] {text}"),
                Some(0) | None => eprintln!("{text}"),
            }
        }
        self.log_line(text);
    }

    /// Only the log file.
    pub(crate) fn log_line(&self, text: &str) {
        if let Some((_, log)) = &self.log
            && let Ok(mut file) = log.lock()
        {
            let _ = writeln!(file, "[{:9.3}s] {text}", self.started.elapsed().as_secs_f64());
        }
    }

    /// Whether a progress bar can be drawn.
    pub(crate) fn draws_bars(&self) -> bool {
        self.level() > Level::Quiet && std::io::stderr().is_terminal()
    }
}

/// An empty file that is only added to: processes that begin with the same one do not write over one another's lines.
fn log_file(path: &Path) -> anyhow::Result<File> {
    let emptied = File::create(path);
    emptied
        .and_then(|_| OpenOptions::new().append(true).open(path))
        .with_context(|| format!("{}: cannot write the log; check that its folder is there", path.display()))
}

/// An error with its causes, each said once: many of our messages already hold their cause.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

/// The error with the path of the model before it, unless it names the path itself.
pub(crate) fn of_model(error: anyhow::Error, path: &Path) -> anyhow::Error {
    let (told, path) = (chain(&error), path.display().to_string());
    if told.starts_with(&path) { error } else { error.context(format!("{path}: {told}")) }
}

/// Prints a result to stdout, without the blanks that tables end their lines with.
///
/// # Errors
/// Where stdout cannot take it. A reader that has seen enough, as in `ctq inspect PATH | head`, is no error.
pub(crate) fn result(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    for line in text.trim_end_matches('\n').split('\n') {
        match writeln!(stdout, "{}", line.trim_end()) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.context("stdout cannot be written")?,
        }
    }
    Ok(())
}
