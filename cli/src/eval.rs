//! `ctq eval`: text to windows to numbers, for one model or several.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use ctq_eval::protocol::describe_presets;
use ctq_eval::record::{self, Record, Status};
use ctq_runtime::Wish;

use crate::args::EvalOptions;
use crate::device::{Opened, Wanted};
use crate::evaluate::{evaluate, plans};
use crate::exit::Verdict;
use crate::part;
use crate::party::{Facts, Party};
use crate::question::Question;
use crate::report::{self, Report};
use crate::resume::ResumeState;

pub(crate) fn run(options: &EvalOptions, report: &Report) -> anyhow::Result<Verdict> {
    if options.protocol.preset == "help" {
        report::result(
            "Names, ctx/stride in tokens (xN: at most N windows, else all), and what they are:\n",
        )?;
        report::result(&describe_presets())?;
        return Ok(Verdict::Good);
    }
    if options.paths.is_empty() {
        bail!("nothing to score: name at least one checkpoint or container, as in `ctq eval CHECKPOINT`");
    }
    if options.dry_run {
        return dry_run(options, report);
    }
    let party = match options.shard {
        Some(shard) => {
            part::check_outputs(shard, options)?;
            // A shard is for machines that do not reach one another.
            if let Ok(Some(launch)) = Party::launch(&options.launch) {
                report.note(&format!("--shard: each of {} processes works by itself", launch.ranks));
            }
            Party::Alone
        }
        None => Party::join(&options.launch, report)?,
    };
    match score_all(options, &party, report) {
        Ok(verdict) => Ok(party.leave(verdict, report)),
        Err(error) => {
            party.abort(&error);
            let Some(verdict) = party.verdict_of_failure() else { return Err(error) };
            report.failure(&error);
            Ok(verdict)
        }
    }
}

/// What all processes must have been given alike, for they do one thing after the other together.
fn facts_of(options: &EvalOptions) -> Facts {
    let number = |wish: Option<usize>| wish.map_or("none".to_owned(), |number| number.to_string());
    let Wish { ranks, stages } = options.wish();
    BTreeMap::from([
        ("--tp", number(ranks)),
        ("--pp", number(stages)),
        ("--acts", format!("{:?}", options.acts).to_lowercase()),
        ("number of models", options.paths.len().to_string()),
    ])
}

/// All paths, by all processes of a party; the first of them prints and writes.
fn score_all(options: &EvalOptions, party: &Party, report: &Report) -> anyhow::Result<Verdict> {
    party.agree(Ok(facts_of(options)))?;
    let question = Question::new(&options.protocol)?;
    for path in [&options.json, &options.nll].into_iter().flatten().filter(|_| party.leads()) {
        check_writable(path)?;
    }
    let wanted = party.process().map_or_else(|| wanted(options), Wanted::OfProcess);
    let device = Opened::open_several(options.engine.device, wanted, options.memory, report)?;
    let mut records = Vec::new();
    let mut kept = Vec::new();
    let mut parts = Vec::new();
    let mut verdict = Verdict::Good;
    for (index, path) in options.paths.iter().enumerate() {
        if index > 0 && party.stops() {
            verdict = verdict.max(Verdict::Unfinished);
            break;
        }
        let (evaluated, outcome) =
            evaluate(path, &question, options, (&device, party), records.len(), report);
        if options.shard.is_some() {
            parts.push(part::of_model(&evaluated));
        }
        for evaluated in evaluated {
            records.push(evaluated.record);
            kept.extend(evaluated.kept);
        }
        verdict = verdict.max(outcome);
    }
    if let Some(Verdict::Unfinished) = party.verdict_of_failure() {
        // Nothing is whole: the same command goes on.
        return Ok(Verdict::Unfinished);
    }
    if options.shard.is_none() && party.leads() {
        print(&records, options.paths.len())?;
    }
    match (options.shard, &options.json) {
        (Some(shard), Some(path)) => part::write(path, shard, parts, verdict, report)?,
        (None, Some(path)) if party.leads() => record::write(path, &records)?,
        (Some(_) | None, Some(_) | None) => {}
    }
    // Until the whole command has come to its end, the same command may be given again and goes on.
    if verdict != Verdict::Unfinished {
        kept.iter().for_each(ResumeState::forget);
    }
    Ok(verdict)
}

/// What would be done with every path, where and in what memory. Of several processes, the first tells for all.
fn dry_run(options: &EvalOptions, report: &Report) -> anyhow::Result<Verdict> {
    let launch = Party::launch(&options.launch)?;
    if launch.as_ref().is_some_and(|launch| launch.rank > 0) {
        return Ok(Verdict::Good);
    }
    let processes = launch.map(|launch| launch.ranks);
    let question = Question::new(&options.protocol)?;
    if let Some(path) = &options.json {
        check_writable(path)?;
    }
    let device = Opened::open_several(options.engine.device, wanted(options), options.memory, report)?;
    let mut runs = Vec::new();
    for path in &options.paths {
        let planned = plans(path, &question, options, (&device, processes), report);
        for run in planned.map_err(|error| report::of_model(error, path))? {
            run.print()?;
            report::result("")?;
            runs.push(run);
        }
    }
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&runs)?;
        fs::write(path, json + "\n").with_context(|| {
            format!("{}: cannot be written; check that its folder is there", path.display())
        })?;
    }
    Ok(Verdict::Good)
}

/// The devices that one process takes by itself.
fn wanted(options: &EvalOptions) -> Wanted {
    match options.wish() {
        Wish { ranks: None, stages: None } => Wanted::All,
        Wish { ranks, stages } => Wanted::AtMost(ranks.unwrap_or(1) * stages.unwrap_or(1)),
    }
}

/// One path: a block for each mode. Several: one table. And a line of each result to paste elsewhere.
pub(crate) fn print(records: &[Record], paths: usize) -> anyhow::Result<()> {
    if paths > 1 {
        report::result(&record::table(records))?;
        report::result("")?;
    } else {
        for record in records.iter().filter(|record| record.status != Status::Failed) {
            report::result(&record::block(record))?;
            report::result("")?;
        }
    }
    for record in records.iter().filter(|record| record.status == Status::Ok) {
        report::result(&record::line(record))?;
    }
    Ok(())
}

/// A result that cannot be written after hours of work is found out before.
pub(crate) fn check_writable(path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        bail!("{}: cannot be written: {} is not a folder; make it first", path.display(), folder.display());
    }
    if path.is_dir() {
        bail!("{}: cannot be written: it is a folder; give a file", path.display());
    }
    Ok(())
}
