//! What `ctq eval --shard` leaves: a part file instead of a result.

use std::path::Path;

use anyhow::bail;
use ctq_eval::part::{self, PART_VERSION, Part, PartModel, PartResult, PartWindow};
use ctq_eval::shard::Shard;

use crate::args::EvalOptions;
use crate::evaluate::Evaluated;
use crate::exit::Verdict;
use crate::report::Report;

/// A part goes to a file, and holds everything: found out before any work.
pub(crate) fn check_outputs(shard: Shard, options: &EvalOptions) -> anyhow::Result<()> {
    let part = shard.part();
    if options.nll.is_some() {
        bail!(
            "--nll does not go with --shard: part {part} of {} holds each position's nll already; give --nll to `ctq merge`",
            shard.of()
        );
    }
    if options.json.is_none() {
        bail!(
            "--shard {shard} writes a part, not a result: name its file, as in `--shard {shard} --json part-{part}.json`, and join all {} parts with `ctq merge part-*.json`",
            shard.of()
        );
    }
    Ok(())
}

/// All results of one path as a part holds them.
pub(crate) fn of_model(evaluated: &[Evaluated]) -> PartModel {
    let result = |evaluated: &Evaluated| PartResult {
        record: evaluated.record.clone(),
        tokens_fed: evaluated.fed as u64,
        windows: PartWindow::of(&evaluated.tokens),
    };
    PartModel {
        model_id: evaluated.iter().find_map(|evaluated| evaluated.model_id.clone()),
        results: evaluated.iter().map(result).collect(),
    }
}

/// Writes the part, unless it is not finished: the same command then goes on, and a merge finds it missing.
pub(crate) fn write(
    path: &Path,
    shard: Shard,
    models: Vec<PartModel>,
    verdict: Verdict,
    report: &Report,
) -> anyhow::Result<()> {
    if verdict == Verdict::Unfinished {
        report.note(&format!("part {shard} is not finished, so {} is not written", path.display()));
        return Ok(());
    }
    let counts = models.iter().flat_map(|model| &model.results).map(|result| result.windows.len());
    let windows = counts.max().unwrap_or(0);
    part::write(path, &Part { part_version: PART_VERSION, shard, models })?;
    report.note(&format!(
        "part {} of {}, {windows} windows: {}; `ctq merge` joins all parts",
        shard.part(),
        shard.of(),
        path.display()
    ));
    Ok(())
}
