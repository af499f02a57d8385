//! `ctq demo`: the main job on a bundled model. Converts, scores and verifies four checkpoints of one small Llama.
//!
//! The checkpoints travel inside the binary, so that the demo needs neither network nor repository.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use comfy_table::{CellAlignment, Table, presets};
use ctq_container::{Container, Overwrite};
use ctq_eval::record::Status;
use ctq_eval::statistics::paired;
use ctq_model::{Checkpoint, Inventory};

use crate::args::{
    ActsChoice, ComputeChoice, DemoOptions, DeviceChoice, EngineOptions, EvalOptions, LaunchOptions,
    ModelOptions, ProtocolOptions,
};
use crate::device::Opened;
use crate::evaluate::{Evaluated, evaluate};
use crate::exit::Verdict;
use crate::party::Party;
use crate::question::Question;
use crate::report::{self, Report};
use crate::resume::ResumeState;
use crate::{interrupt, machine, verify};

/// One bundled checkpoint: its name and its files.
struct Bundled {
    name: &'static str,
    files: [(&'static str, &'static [u8]); 4],
}

macro_rules! bundled {
    ($name:literal) => {
        Bundled {
            name: $name,
            files: [
                ("config.json", include_bytes!(concat!("../../golden/bundled/", $name, "/config.json"))),
                (
                    "model.safetensors",
                    include_bytes!(concat!("../../golden/bundled/", $name, "/model.safetensors")),
                ),
                (
                    "tokenizer.json",
                    include_bytes!(concat!("../../golden/bundled/", $name, "/tokenizer.json")),
                ),
                (
                    "tokenizer_config.json",
                    include_bytes!(concat!("../../golden/bundled/", $name, "/tokenizer_config.json")),
                ),
            ],
        }
    };
}

/// The dense model first: the others are set against it.
const BUNDLED: [Bundled; 4] = [bundled!("bf16"), bundled!("W4A16"), bundled!("FP8"), bundled!("NVFP4")];
const TEXT: &[u8] = include_bytes!("../../golden/bundled/text.txt");

pub(crate) fn run(options: &DemoOptions, report: &Report) -> anyhow::Result<Verdict> {
    let temporary =
        tempfile::tempdir().context("no temporary folder; set TMPDIR to one that can be written")?;
    let text = temporary.path().join("text.txt");
    fs::write(&text, TEXT)?;
    let evaluation = evaluation(text, options);
    let question = Question::new(&evaluation.protocol)?;
    let keep = options.keep.clone().unwrap_or_else(|| temporary.path().join("containers"));
    fs::create_dir_all(&keep).with_context(|| format!("{}: cannot be made", keep.display()))?;
    let mut rows: Vec<Row> = Vec::new();
    for bundled in &BUNDLED {
        report.note(&format!("{}: converting, scoring, verifying", bundled.name));
        let source = temporary.path().join(bundled.name);
        fs::create_dir_all(&source)?;
        for (name, bytes) in bundled.files {
            fs::write(source.join(name), bytes)?;
        }
        let container = keep.join(bundled.name);
        convert(&source, &container, options)?;
        let passed = verify::verify_path(&container, &source, report)?.passed;
        let (evaluated, outcome) =
            evaluate(&container, &question, &evaluation, (&Opened::cpu(), &Party::Alone), 0, report);
        if outcome == Verdict::Unfinished {
            return Ok(outcome);
        }
        evaluated.iter().filter_map(|evaluated| evaluated.kept.as_ref()).for_each(ResumeState::forget);
        rows.extend(evaluated.into_iter().map(|evaluated| Row { evaluated, passed }));
    }
    report::result(&table(&rows))?;
    if options.keep.is_some() {
        report::result(&format!("containers: {}", keep.display()))?;
    }
    let good = rows.iter().all(|row| row.passed && row.evaluated.record.status == Status::Ok);
    report::result(if good { "verdict: PASSED" } else { "verdict: FAILED" })?;
    Ok(if good { Verdict::Good } else { Verdict::Failed })
}

/// Windows of 256 every 64 tokens of the bundled text: ExLlamaV3's rule at the size of this model.
fn evaluation(text: PathBuf, options: &DemoOptions) -> EvalOptions {
    EvalOptions {
        paths: Vec::new(),
        protocol: ProtocolOptions {
            data: Some(text),
            preset: ctq_eval::protocol::DEFAULT_PRESET.to_owned(),
            ctx: Some(256),
            stride: Some(64),
            ..ProtocolOptions::default()
        },
        acts: ActsChoice::Auto,
        engine: EngineOptions {
            device: DeviceChoice::Cpu,
            compute: ComputeChoice::Auto,
            tp: None,
            threads: options.threads,
        },
        pp: None,
        memory: None,
        json: None,
        nll: None,
        shard: None,
        dry_run: false,
        save_every: 300.0,
        launch: LaunchOptions::default(),
        model: ModelOptions::default(),
    }
}

/// Converts, unless an earlier demo has left this very container there.
fn convert(source: &Path, container: &Path, options: &DemoOptions) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(source)?;
    let overwrite = match Container::open(container) {
        Ok(earlier) => {
            let same = ctq_convert::source_record(&checkpoint)?.fingerprint;
            if earlier.manifest().source.fingerprint != same {
                bail!("{}: another container is there; give another folder to --keep", container.display());
            }
            return Ok(());
        }
        // A demo that was killed: its checkpoint was a temporary one, so that it cannot go on.
        Err(ctq_container::Error::HalfWritten { .. }) => Overwrite::Replace,
        Err(_) => Overwrite::Refuse,
    };
    let inventory = Inventory::read(&checkpoint, &[])?;
    let flag = interrupt::flag();
    let settings = ctq_convert::Options {
        threads: options.threads.unwrap_or_else(machine::threads),
        overwrite,
        name: None,
        interrupt: Some(&flag),
    };
    ctq_convert::convert(&checkpoint, &inventory, container, &settings, &|_| {})?;
    Ok(())
}

struct Row {
    evaluated: Evaluated,
    passed: bool,
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["model", "acts", "bpw layer", "bpw file", "perplexity", "ratio to bf16", "verify"]);
    for row in rows {
        let record = &row.evaluated.record;
        let bpw = |pick: fn(&ctq_eval::record::Bpw) -> f64| {
            record.bpw.as_ref().map_or_else(|| "-".to_owned(), |bpw| format!("{:.4}", pick(bpw)))
        };
        let perplexity = match (record.perplexity, record.perplexity_error) {
            (Some(perplexity), Some(error)) => format!("{perplexity:.4} ± {error:.4}"),
            (Some(perplexity), None) => format!("{perplexity:.4}"),
            (None, _) => record.reason.clone().unwrap_or_default(),
        };
        table.add_row([
            record.model.clone(),
            record.acts.clone().unwrap_or_default(),
            bpw(|bpw| bpw.layer),
            bpw(|bpw| bpw.file),
            perplexity,
            ratio(row, rows),
            if row.passed { "PASSED".to_owned() } else { "FAILED".to_owned() },
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// Perplexity over that of the dense model on the same positions, with its paired error.
fn ratio(row: &Row, rows: &[Row]) -> String {
    match rows.first().map(|dense| paired(&row.evaluated.tokens, &dense.evaluated.tokens)) {
        Some(Ok(paired)) => match paired.ratio_error {
            Some(error) => format!("{:.4} ± {error:.4}", paired.ratio),
            None => format!("{:.4}", paired.ratio),
        },
        Some(Err(_)) | None => "-".to_owned(),
    }
}
