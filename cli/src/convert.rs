//! `ctq convert`: a checkpoint into a container.

use std::time::Instant;

use ctq_container::Overwrite;
use ctq_model::{Checkpoint, Inventory};

use crate::args::ConvertOptions;
use crate::exit::Verdict;
use crate::open::warn_of_unused;
use crate::progress::{Progress, Unit};
use crate::report::{self, Report};
use crate::{interrupt, machine};

pub(crate) fn run(options: &ConvertOptions, report: &Report) -> anyhow::Result<Verdict> {
    let source = Checkpoint::open(&options.input)?;
    let inventory = Inventory::read(&source, &options.model.accept_config_key)?;
    warn_of_unused(&options.input, &inventory, report);
    let started = Instant::now();
    let flag = interrupt::flag();
    let settings = ctq_convert::Options {
        threads: options.threads.unwrap_or_else(machine::threads),
        overwrite: if options.force { Overwrite::Replace } else { Overwrite::Refuse },
        name: None,
        interrupt: Some(&flag),
    };
    let total: u64 = source.files().iter().map(|(_, bytes)| bytes).sum();
    let progress = Progress::new(report, "convert", Unit::Bytes, total);
    let container = ctq_convert::convert(&source, &inventory, &options.output, &settings, &|step| {
        if step.finished.is_none() && step.parts_done > 0 {
            report
                .note(&format!("going on: {} of {} parts are complete already", step.parts_done, step.parts));
        }
        if let Some(part) = step.finished {
            report.detail(&format!("{part}: done ({} of {})", step.parts_done, step.parts));
        }
        progress.at(step.bytes_done);
    })?;
    progress.finish();
    let manifest = container.manifest();
    let bytes: u64 = manifest.parts.iter().map(|part| part.bytes).sum();
    let accounting = &manifest.accounting;
    report::result(&format!(
        "{}: {} parts, {:.1} MB from {:.1} MB in {:.1} s\n  bpw layer {:.4}, head {:.4}, file {:.4}, container {:.4}; vram_gb {:.4}",
        options.output.display(),
        manifest.parts.len(),
        bytes as f64 / 1e6,
        total as f64 / 1e6,
        started.elapsed().as_secs_f64(),
        accounting.layer.per_weight(),
        accounting.head.per_weight(),
        accounting.file.per_weight(),
        accounting.container.unwrap_or_default().per_weight(),
        accounting.vram_gb()
    ))?;
    if !manifest.left_out.is_empty() {
        report.note(&format!(
            "tensors that are not part of the text model, left out: {}; their hashes are in ctq.json",
            manifest.left_out.len()
        ));
    }
    Ok(Verdict::Good)
}
