//! `ctq eval`: text to windows to numbers, for one model or several.

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
use crate::party::Party;
use crate::question::Question;
use crate::report::{self, Report};
use crate::score::ResumeState;
use crate::{interrupt, part};

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
    let party = match options.shard {
        Some(shard) => {
            part::check_outputs(shard, options)?;
            // A shard is for machines that do not reach one another.
            Party::Alone
        }
        None if options.dry_run => Party::Alone,
        None => Party::join(&options.launch, report)?,
    };
    match score_all(options, &party, report) {
        Ok(verdict) => Ok(party.leave(verdict)),
        Err(error) => {
            party.abort(&error);
            let Some(verdict) = party.verdict_of_failure() else { return Err(error) };
            report.failure(&error);
            Ok(verdict)
        }
    }
}

/// All paths, by all processes of a party; the first of them prints and writes.
fn score_all(options: &EvalOptions, party: &Party, report: &Report) -> anyhow::Result<Verdict> {
    let question = Question::new(&options.protocol)?;
    for path in [&options.json, &options.nll].into_iter().flatten().filter(|_| party.leads()) {
        check_writable(path)?;
    }
    let wanted = match (party.process(), options.wish()) {
        (Some(process), _) => Wanted::OfProcess(process),
        (None, Wish { ranks: None, stages: None }) => Wanted::All,
        (None, Wish { ranks, stages }) => Wanted::AtMost(ranks.unwrap_or(1) * stages.unwrap_or(1)),
    };
    let device = Opened::open_several(options.engine.device, wanted, options.memory, report)?;
    if options.dry_run {
        return dry_run(options, &question, &device, report);
    }
    let mut records = Vec::new();
    let mut kept = Vec::new();
    let mut parts = Vec::new();
    let mut verdict = Verdict::Good;
    for path in &options.paths {
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
        if interrupt::requested() || party.failure().is_some() {
            break;
        }
    }
    if let Some(verdict) = party.verdict_of_failure().filter(|verdict| *verdict != Verdict::Failed) {
        // Nothing is whole: the same command goes on where that helps.
        return Ok(verdict);
    }
    // A signal between two results leaves a part without its last ones.
    if options.shard.is_some() && interrupt::requested() {
        verdict = Verdict::Unfinished;
    }
    match (options.shard, &options.json) {
        (Some(shard), Some(path)) => part::write(path, shard, parts, verdict, report)?,
        (None, Some(path)) if party.leads() => record::write(path, &records)?,
        (Some(_) | None, Some(_) | None) => {}
    }
    if options.shard.is_none() && party.leads() {
        print(&records, options.paths.len())?;
    }
    // Until the whole command has come to its end, the same command may be given again and goes on.
    if verdict != Verdict::Unfinished {
        kept.iter().for_each(ResumeState::forget);
    }
    Ok(verdict)
}

/// What would be done with every path, where and in what memory.
fn dry_run(
    options: &EvalOptions,
    question: &Question,
    device: &Opened,
    report: &Report,
) -> anyhow::Result<Verdict> {
    let mut runs = Vec::new();
    for path in &options.paths {
        let planned = plans(path, question, options, device, report);
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
