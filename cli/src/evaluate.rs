//! One model scored in one mode or several: its records.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use ctq_eval::nll_file::NllFile;
use ctq_eval::protocol::protocol_id;
use ctq_eval::record::{Bpw, Method, PairedRecord, Record, Status};
use ctq_eval::statistics::{ScoredToken, paired, scored_tokens, summarize};
use ctq_kernels::{Compute, NUMERICS_REVISION};
use ctq_model::inventory::Inventory;
use ctq_model::window::Window;
use ctq_runtime::{Acts, Settings};

use crate::args::EvalOptions;
use crate::device::Opened;
use crate::dry_run::DryRun;
use crate::exit::{Verdict, verdict_of};
use crate::machine;
use crate::open::{Model, warn_of_unused};
use crate::party::{Facts, Party};
use crate::question::{NamedActs, Prepared, Question, acts_of, compute_of};
use crate::report::{self, Report};
use crate::resume::ResumeState;
use crate::score::Run;

/// A record with the scores it was made from; none where there is no answer.
pub(crate) struct Evaluated {
    pub(crate) record: Record,
    pub(crate) tokens: Vec<ScoredToken>,
    /// Tokens that this run fed to the model.
    pub(crate) fed: usize,
    /// The model by its contents, where a part has to say whose it is.
    pub(crate) model_id: Option<String>,
    /// Its scores on disk, for the same command given again.
    pub(crate) kept: Option<ResumeState>,
}

impl Evaluated {
    /// A record that has no scores.
    fn without_scores(record: Record) -> Evaluated {
        Evaluated { record, tokens: Vec::new(), fed: 0, model_id: None, kept: None }
    }
}

/// All records of one path, and how it came out. `before`: records that other paths have made already.
pub(crate) fn evaluate(
    path: &Path,
    question: &Question,
    options: &EvalOptions,
    (device, party): (&Opened, &Party),
    before: usize,
    report: &Report,
) -> (Vec<Evaluated>, Verdict) {
    let name = path
        .file_name()
        .map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
    let failed = |error| failed(&name, path, question, &report::of_model(error, path), (party, report));
    let opened = Model::open(path, &options.model).and_then(|model| {
        warn_of_unused(path, model.source().inventory(), report);
        let prepared = Prepared::new(&model, question, report)?;
        let named = options.shard.is_some() || party.process().is_some();
        let model_id = named.then(|| model.content_id()).transpose()?;
        Ok((model, prepared, model_id))
    });
    // What one process cannot open, none scores; and all must have opened the same.
    let facts = match &opened {
        Ok((_, prepared, model_id)) => Ok(prepared.facts(model_id.as_deref())),
        Err(error) => Err(report::chain(error)),
    };
    let agreed = party.agree(facts);
    let (model, prepared, model_id) = match opened.and_then(|opened| agreed.map(|()| opened)) {
        Ok(opened) => opened,
        Err(error) => {
            let (record, verdict) = failed(error);
            return (vec![record], verdict);
        }
    };
    let mut records: Vec<Evaluated> = Vec::new();
    let mut verdict = Verdict::Good;
    for (index, acts) in acts_of(options.acts, model.source().inventory(), report).into_iter().enumerate() {
        if index > 0 && party.stops() {
            verdict = verdict.max(Verdict::Unfinished);
            break;
        }
        let one = One { model: &model, prepared: &prepared, question, options, device, party, acts };
        let (method, settings) = one.method(report);
        match one.record(&method, settings, report) {
            Ok(mut evaluated) => {
                evaluated.model_id.clone_from(&model_id);
                // The difference of two parts is not that of the whole.
                if options.shard.is_none()
                    && let Some(base) = records.first()
                    && let Ok(paired) = paired(&evaluated.tokens, &base.tokens)
                {
                    evaluated.record.paired =
                        Some(PairedRecord::new(base.record.acts.as_deref().unwrap_or("off"), &paired));
                }
                let (path, index) =
                    (options.nll.as_deref().filter(|_| party.leads()), before + records.len());
                if let Err(error) = write_nll(path, &evaluated.record, &evaluated.tokens, index, report) {
                    report.failure(&error);
                    verdict = verdict.max(verdict_of(&error));
                }
                records.push(evaluated);
            }
            Err(error) => {
                party.abort(&error);
                let (mut evaluated, outcome) = failed(error);
                one.describe(&mut evaluated.record);
                evaluated.record.set_method(&method);
                evaluated.model_id.clone_from(&model_id);
                records.push(evaluated);
                verdict = verdict.max(outcome);
            }
        }
    }
    (records, verdict)
}

/// What would be done with one path, in every mode.
pub(crate) fn plans(
    path: &Path,
    question: &Question,
    options: &EvalOptions,
    (device, processes): (&Opened, Option<usize>),
    report: &Report,
) -> anyhow::Result<Vec<DryRun>> {
    let model = Model::open(path, &options.model)?;
    let prepared = Prepared::new(&model, question, report)?;
    let plan = |acts: NamedActs| {
        let party = &Party::Alone;
        let one = One { model: &model, prepared: &prepared, question, options, device, party, acts };
        let (_, settings) = one.method(report);
        one.run(settings, "", &model.name).dry_run(acts.name, processes)
    };
    acts_of(options.acts, model.source().inventory(), report).into_iter().map(plan).collect()
}

/// Tells an error, and records it in the place of an answer.
fn failed(
    name: &str,
    path: &Path,
    question: &Question,
    error: &anyhow::Error,
    (party, report): (&Party, &Report),
) -> (Evaluated, Verdict) {
    report.failure(error);
    let verdict = party.verdict_of_failure().unwrap_or_else(|| verdict_of(error));
    let reason = report::chain(error);
    let mut record = Record::new(name, &path.display().to_string(), &question.protocol.label(), &reason);
    if verdict == Verdict::Failed {
        record.set_without_answer(Status::Invalid, &reason);
    }
    (Evaluated::without_scores(record), verdict)
}

/// One model scored in one mode.
struct One<'a> {
    model: &'a Model,
    prepared: &'a Prepared,
    question: &'a Question,
    options: &'a EvalOptions,
    device: &'a Opened,
    party: &'a Party,
    acts: NamedActs,
}

impl One<'_> {
    fn method(&self, report: &Report) -> (Method, Settings) {
        let inventory = self.model.source().inventory();
        let compute = compute_of(self.options.engine.compute, inventory, report);
        (method(self.device, inventory, self.acts, compute), Settings { acts: self.acts.acts, compute })
    }

    /// The windows that are scored here: all, or those of a shard.
    fn windows(&self) -> &[Window] {
        let windows = &self.prepared.windows;
        match self.options.shard {
            Some(shard) => windows.get(shard.range(windows.len())).unwrap_or_default(),
            None => windows,
        }
    }

    /// Everything the scores depend on. A shard goes on from its own scores, for other windows are none of its affair.
    fn key(&self, method: &Method) -> String {
        let Prepared { windows: all, vocabulary, .. } = self.prepared;
        let question = protocol_id(all, *vocabulary);
        let key = format!("{}\n{question}\n{}", self.model.identity(), method.id());
        match (self.windows(), self.windows().first()) {
            (some, Some(first)) if some.len() < all.len() => {
                format!("{key}\n{} windows from {}", some.len(), first.index)
            }
            (_, Some(_) | None) => key,
        }
    }

    /// Fills in what is known of the model, whether or not it can be scored.
    fn describe(&self, record: &mut Record) {
        let inventory = self.model.source().inventory();
        record.family = Some(inventory.spec.family.clone());
        record.scheme = Some(self.model.scheme_label());
        record.acts = Some(self.acts.name.to_owned());
        let accounting = self.model.accounting();
        record.bpw = Some(Bpw {
            layer: accounting.layer.per_weight(),
            head: accounting.head.per_weight(),
            file: accounting.file.per_weight(),
            container: accounting.container.map(|bits| bits.per_weight()),
        });
        record.vram_gb = Some(accounting.vram_gb());
        let Prepared { stream, windows, vocabulary } = self.prepared;
        record.set_question(&self.question.text, stream, &self.question.protocol, windows, *vocabulary);
    }

    fn run<'r>(&'r self, settings: Settings, key: &'r str, name: &'r str) -> Run<'r> {
        Run {
            source: self.model.source(),
            settings,
            wish: self.options.wish(),
            device: self.device,
            party: self.party,
            threads: self.options.engine.threads,
            windows: self.windows(),
            vocabulary: self.prepared.vocabulary,
            memory: self.options.memory,
            save_every: Duration::from_secs_f64(self.options.save_every),
            key,
            name,
        }
    }

    fn record(&self, method: &Method, settings: Settings, report: &Report) -> anyhow::Result<Evaluated> {
        let windows = self.windows();
        let mut record =
            Record::new(&self.model.name, &self.model.path.display().to_string(), "", "not finished");
        self.describe(&mut record);
        record.set_method(method);
        record.threads = Some(self.options.engine.threads.unwrap_or_else(machine::threads) as u64);
        if windows.is_empty() {
            record.set_partial();
            return Ok(Evaluated::without_scores(record));
        }
        let key = self.key(method);
        self.party.agree(Ok(facts_of(method)))?;
        let name = format!("{} (acts {})", self.model.name, self.acts.name);
        let run = self.run(settings, &key, &name);
        machine::reset_peak_memory();
        let started = Instant::now();
        let scored = run.score(report)?;
        let seconds = started.elapsed().as_secs_f64();
        record.threads = Some(scored.threads as u64);
        record.tp = Some(scored.layout.ranks as u64);
        record.pp = Some(scored.layout.stages as u64);
        record.replicas = Some(scored.layout.replicas as u64);
        if !self.party.leads() {
            // The first process has all scores, this one its own at most.
            return Ok(Evaluated { kept: Some(scored.kept), ..Evaluated::without_scores(record) });
        }
        let tokens = scored_tokens(windows, &scored.scores)?;
        match self.options.shard {
            Some(_) => record.set_partial(),
            None => record.set_summary(&summarize(&tokens)?),
        }
        record.seconds = Some(seconds);
        // Speed is of what this run did, not of what an earlier one left.
        record.tokens_per_second = (scored.fed > 0).then(|| scored.fed as f64 / seconds);
        record.peak_memory_bytes = machine::peak_memory();
        Ok(Evaluated { record, tokens, fed: scored.fed, model_id: None, kept: Some(scored.kept) })
    }
}

/// What all processes of a party must have in common of how they score.
fn facts_of(method: &Method) -> Facts {
    BTreeMap::from([
        ("quantization of activations", method.acts.clone()),
        ("backend", method.backend.clone()),
        ("compute mode", method.compute.clone()),
        ("instruction set", method.isa.clone()),
        ("key-value cache", method.kv.clone()),
        ("numerics", method.numerics_revision.to_string()),
    ])
}

/// Writes the nll of every position, if there is a file to write it to. `index`: of the record in its command.
pub(crate) fn write_nll(
    path: Option<&Path>,
    record: &Record,
    tokens: &[ScoredToken],
    index: usize,
    report: &Report,
) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let acts = record.acts.as_deref().unwrap_or_default();
    let path = numbered(path, index, &record.model, acts);
    let file = NllFile {
        protocol_id: record.protocol_id.clone().unwrap_or_default(),
        method_id: record.method_id.clone().unwrap_or_default(),
        preset: record.preset.clone(),
        tokens: tokens.to_vec(),
    };
    file.write(&path).with_context(|| format!("{}: nll not written", path.display()))?;
    report.note(&format!("nll of {} (acts {acts}): {}", record.model, path.display()));
    Ok(())
}

/// How a model is scored: what the method id names.
fn method(device: &Opened, inventory: &Inventory, acts: NamedActs, compute: Compute) -> Method {
    let identity = device.identity();
    let kv = match acts.acts {
        Acts::Off => None,
        Acts::Library | Acts::Kernel => inventory.parts().find_map(|(_, part)| part.kv.as_ref()),
    };
    Method {
        acts: acts.name.to_owned(),
        backend: identity.name,
        compute: compute.to_string(),
        isa: identity.isa,
        kv: kv.map_or_else(|| "off".to_owned(), |kv| kv.activation.to_string()),
        numerics_revision: NUMERICS_REVISION,
    }
}

/// The first record gets the file that was asked for; each further one its own beside it.
fn numbered(path: &Path, index: usize, model: &str, acts: &str) -> PathBuf {
    if index == 0 {
        return path.to_owned();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
    path.with_file_name(format!("{stem}.{index}-{model}-{acts}{extension}"))
}
