//! `ctq merge`: the parts that `ctq eval --shard` has written into what one run would have told.

use std::path::{Path, PathBuf};

use anyhow::bail;
use ctq_eval::part::{self, Merged, NamedPart};
use ctq_eval::record::{self, Record, Status};

use crate::args::MergeOptions;
use crate::eval::{check_writable, print};
use crate::evaluate::write_nll;
use crate::exit::{Verdict, verdict_of};
use crate::report::Report;

pub(crate) fn run(options: &MergeOptions, report: &Report) -> anyhow::Result<Verdict> {
    for output in [&options.json, &options.nll].into_iter().flatten() {
        check_writable(output)?;
        check_is_no_part(output, &options.parts)?;
    }
    let parts =
        options.parts.iter().map(|path| Ok(NamedPart { path: path.clone(), part: part::read(path)? }));
    let models = part::merge(parts.collect::<ctq_eval::Result<_>>()?)?;
    let paths = models.len();
    let mut verdict = Verdict::Good;
    let mut records = Vec::new();
    for Merged { record, tokens } in models.into_iter().flat_map(|model| model.results) {
        match record.status {
            Status::Ok => {
                let written = write_nll(options.nll.as_deref(), &record, &tokens, records.len(), report);
                if let Err(error) = written {
                    report.failure(&error);
                    verdict = verdict.max(verdict_of(&error));
                }
            }
            Status::Failed | Status::Invalid | Status::Partial => {
                verdict = verdict.max(tell(&record, report))
            }
        }
        records.push(record);
    }
    if let Some(path) = &options.json {
        record::write(path, &records)?;
    }
    print(&records, paths)?;
    Ok(verdict)
}

/// Tells why a record has no answer, and how that ends the command.
fn tell(record: &Record, report: &Report) -> Verdict {
    let reason = record.reason.clone().unwrap_or_else(|| format!("{}: no reason was recorded", record.model));
    report.failure(&anyhow::Error::msg(reason));
    match record.status {
        Status::Invalid => Verdict::Failed,
        Status::Ok | Status::Failed | Status::Partial => Verdict::Unusable,
    }
}

/// A result over one of its parts would leave nothing to merge again.
fn check_is_no_part(output: &Path, parts: &[PathBuf]) -> anyhow::Result<()> {
    let Ok(output_is) = output.canonicalize() else { return Ok(()) };
    if parts.iter().any(|part| part.canonicalize().is_ok_and(|part| part == output_is)) {
        bail!("{}: is one of the parts; give another file to write to", output.display());
    }
    Ok(())
}
