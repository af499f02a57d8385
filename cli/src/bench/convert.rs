//! `ctq bench --convert`: a conversion beside plain copies of the same checkpoint, from and to the same places, in turn.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use ctq_container::Overwrite;
use ctq_model::{Checkpoint, Inventory};
use serde::Serialize;

use super::{Spread, go_on};
use crate::bench::options::BenchOptions;
use crate::report::Report;
use crate::{interrupt, machine};

/// Rounds where none are named.
const ROUNDS: usize = 3;

/// Bytes that a copy reads and writes at a time.
const CHUNK: usize = 1 << 20;

/// A conversion and what it is held against.
#[derive(Debug, Serialize)]
pub(super) struct ConvertTiming {
    checkpoint: PathBuf,
    /// The conversion until the container is on the disk; reading the checkpoint's files and writing them elsewhere, as
    /// `cp` does; the same until they are on the disk.
    runs: Vec<Run>,
}

/// Something that reads and writes files.
#[derive(Debug, Serialize)]
struct Run {
    what: &'static str,
    /// Bytes of the checkpoint's safetensors files.
    read_bytes: u64,
    /// Bytes of the container's parts, or of the copies.
    written_bytes: u64,
    #[serde(flatten)]
    seconds: Spread,
    /// Bytes read and written by the median.
    bytes_per_second: f64,
    /// Those of the conversion by these.
    convert_ratio: f64,
}

/// Seconds of one round.
struct Round {
    copy: f64,
    synced_copy: f64,
    convert: f64,
    written_bytes: u64,
}

/// Converts and copies, as often as was asked for.
///
/// # Errors
/// Where the checkpoint cannot be read, there is no room for what is written, or a signal has come.
pub(super) fn measure(
    options: &BenchOptions,
    input: &Path,
    report: &Report,
) -> anyhow::Result<ConvertTiming> {
    let source = Checkpoint::open(input)?;
    let inventory = Inventory::read(&source, &[])?;
    let files = source.files();
    let read_bytes: u64 = files.iter().map(|(_, bytes)| bytes).sum();
    let work = Work { options, source: &source, inventory: &inventory };
    // Everything is in the file cache from now on, where that has room: all rounds are alike.
    for (path, _) in &files {
        copy(path, &mut std::io::sink())?;
        go_on()?;
    }
    let rounds = options.rounds.unwrap_or(ROUNDS);
    let round = |number| {
        let round = work.round()?;
        let Round { copy, synced_copy, convert, .. } = round;
        report.note(&format!(
            "round {number} of {rounds}: copy {copy:.3} s, until on the disk {synced_copy:.3} s, convert {convert:.3} s"
        ));
        go_on()?;
        Ok(round)
    };
    let rounds = (1..=rounds).map(round).collect::<anyhow::Result<Vec<Round>>>()?;
    let written_bytes = rounds.last().map_or(0, |round| round.written_bytes);
    let run = |what, written_bytes, part: fn(&Round) -> f64| {
        let seconds = Spread::of(rounds.iter().map(part).collect());
        let bytes_per_second = (read_bytes + written_bytes) as f64 / seconds.median;
        Run { what, read_bytes, written_bytes, seconds, bytes_per_second, convert_ratio: 1.0 }
    };
    let mut runs = vec![
        run("convert", written_bytes, |round| round.convert),
        run("copy", read_bytes, |round| round.copy),
        run("copy until on disk", read_bytes, |round| round.synced_copy),
    ];
    let converted = runs[0].bytes_per_second;
    runs.iter_mut().for_each(|run| run.convert_ratio = converted / run.bytes_per_second);
    Ok(ConvertTiming { checkpoint: input.to_owned(), runs })
}

struct Work<'a> {
    options: &'a BenchOptions,
    source: &'a Checkpoint,
    inventory: &'a Inventory,
}

/// Whether a copy ends where the system has it, or where the disk has it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    Written,
    OnDisk,
}

impl Work<'_> {
    /// One after the other, so that a disk that slows down slows all; what is written goes at once.
    fn round(&self) -> anyhow::Result<Round> {
        let copy = self.timed(|folder| self.copy(folder, Until::Written))?;
        let synced_copy = self.timed(|folder| self.copy(folder, Until::OnDisk))?;
        let mut written_bytes = 0;
        let convert = self.timed(|folder| {
            written_bytes = self.convert(&folder.join("container"))?;
            Ok(())
        })?;
        Ok(Round { copy, synced_copy, convert, written_bytes })
    }

    /// Seconds of something that writes to a folder, which is removed after.
    fn timed(&self, work: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<f64> {
        let parent = self.options.out.clone().unwrap_or_else(std::env::temp_dir);
        let folder = tempfile::tempdir_in(&parent).with_context(|| {
            format!("{}: no temporary folder can be made here; name another with --out", parent.display())
        })?;
        let start = Instant::now();
        work(folder.path())?;
        let seconds = start.elapsed().as_secs_f64();
        folder.close().with_context(|| format!("{}: cannot be cleaned up", parent.display()))?;
        Ok(seconds)
    }

    fn copy(&self, folder: &Path, until: Until) -> anyhow::Result<()> {
        for (index, (path, _)) in self.source.files().into_iter().enumerate() {
            let to = folder.join(index.to_string());
            let told = || format!("{}: cannot be written; name a folder with room with --out", to.display());
            let mut file = File::create(&to).with_context(told)?;
            copy(path, &mut file)?;
            if until == Until::OnDisk {
                file.sync_all().with_context(told)?;
            }
            go_on()?;
        }
        Ok(())
    }

    /// Bytes of the container's parts.
    fn convert(&self, output: &Path) -> anyhow::Result<u64> {
        let flag = interrupt::flag();
        let settings = ctq_convert::Options {
            threads: self.options.threads.unwrap_or_else(machine::threads),
            overwrite: Overwrite::Refuse,
            name: None,
            interrupt: Some(&flag),
        };
        let container = ctq_convert::convert(self.source, self.inventory, output, &settings, &|_| {});
        go_on()?;
        let container = container?;
        Ok(container.manifest().parts.iter().map(|part| part.bytes).sum())
    }
}

/// Reads and writes, through memory: a file system that can share blocks between files would copy nothing.
fn copy(from: &Path, to: &mut dyn Write) -> anyhow::Result<()> {
    let told = || format!("{}: cannot be copied; check the disk and its room", from.display());
    let mut file = File::open(from).with_context(told)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = file.read(&mut chunk).with_context(told)?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&chunk[..length]).with_context(told)?;
    }
}

/// A line for the conversion and one for each copy.
pub(super) fn table(timing: &ConvertTiming) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["", "MB read", "MB written", "s", "fastest", "slowest", "GB/s", "convert to it"]);
    for run in &timing.runs {
        table.add_row([
            run.what.to_owned(),
            format!("{:.1}", run.read_bytes as f64 / 1e6),
            format!("{:.1}", run.written_bytes as f64 / 1e6),
            format!("{:.3}", run.seconds.median),
            format!("{:.3}", run.seconds.fastest),
            format!("{:.3}", run.seconds.slowest),
            format!("{:.3}", run.bytes_per_second / 1e9),
            format!("{:.0} %", run.convert_ratio * 100.0),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{}\n{table}", timing.checkpoint.display())
}
