//! `ctq logits`: full-vocabulary logits of given token ids, streamed to a safetensors file.

use std::fs;
use std::io::{BufWriter, Write};
use std::num::NonZero;
use std::path::Path;

use anyhow::{Context, bail};
use ctq_kernels::collective::{Rank, team};
use ctq_kernels::{Backend, KernelError};
use ctq_runtime::{Engine, Layout, Needs, Observer, Plan, Settings, plan};
use safetensors::{Dtype, SafeTensors};

use crate::args::{ActsChoice, LogitsActs, LogitsOptions};
use crate::device::{HeadUse, Opened, Wanted};
use crate::exit::Verdict;
use crate::open::Model;
use crate::progress::{Progress, Unit};
use crate::question::{acts_of, compute_of};
use crate::report::{self, Report};
use crate::seats::{OnSeats, Seats, threads_of_seat};
use crate::{eval, interrupt};

pub(crate) fn run(options: &LogitsOptions, report: &Report) -> anyhow::Result<Verdict> {
    eval::check_writable(&options.out)?;
    let model = Model::open(&options.path, &options.model)?;
    let inventory = model.source().inventory();
    let ids = read_ids(&options.ids, inventory.spec.vocab)?;
    let choice = match options.acts {
        LogitsActs::Off => ActsChoice::Off,
        LogitsActs::Library => ActsChoice::Library,
        LogitsActs::Kernel => ActsChoice::Kernel,
    };
    let acts = acts_of(choice, inventory, report)[0].acts;
    let compute = compute_of(options.engine.compute, inventory, report);
    let settings = Settings { acts, compute };
    let ranks = options.engine.tp.unwrap_or(1);
    let device = Opened::open_several(options.engine.device, Wanted::AtMost(ranks), None, report)?;
    let resources = device.resources(None, ranks, 1, inventory, HeadUse::Whole)?;
    let lengths = vec![ids[0].len(); ids.len()];
    let needs = Needs::of(inventory).share(&(0..inventory.spec.blocks.len()), ranks);
    let plan = plan(&needs, resources.pool, resources.scratch, &lengths)?;
    let write = WriteLogits { model: &model, settings, ids: &ids, plan: &plan, path: &options.out, report };
    device.on_seats(OnRanks { write, ranks, threads: threads_of_seat(options.engine.threads, ranks) })?;
    report.note(&format!(
        "{}: logits [{}, {}, {}]",
        options.out.display(),
        ids.len(),
        ids[0].len(),
        inventory.spec.vocab
    ));
    Ok(Verdict::Good)
}

/// `input_ids` [B, S] as rows, all below `vocabulary`.
fn read_ids(path: &Path, vocabulary: usize) -> anyhow::Result<Vec<Vec<u32>>> {
    let bytes = fs::read(path).with_context(|| {
        format!("{}: cannot be read; write `input_ids` [B, S] to a safetensors file", path.display())
    })?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| {
        format!("{}: not a safetensors file; write `input_ids` [B, S] to one", path.display())
    })?;
    let Ok(tensor) = file.tensor("input_ids") else {
        bail!("{}: has no tensor `input_ids`; write one of shape [B, S], I64 or I32", path.display());
    };
    let [batch, length] = *tensor.shape() else {
        bail!("{}: `input_ids` has shape {:?}; it must be [B, S]", path.display(), tensor.shape());
    };
    if batch * length == 0 {
        bail!("{}: `input_ids` is empty; give at least one token", path.display());
    }
    let ids: Vec<i64> = match tensor.dtype() {
        Dtype::I64 => tensor
            .data()
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes")))
            .collect(),
        Dtype::I32 => {
            let id = |b: &[u8]| i32::from_le_bytes(b.try_into().expect("four bytes"));
            tensor.data().chunks_exact(4).map(|b| i64::from(id(b))).collect()
        }
        other => bail!("{}: `input_ids` is {other:?}; it must be I64 or I32", path.display()),
    };
    let id = |id: &i64| match u32::try_from(*id) {
        Ok(id) if (id as usize) < vocabulary => Ok(id),
        Ok(_) | Err(_) => bail!(
            "{}: {id} is no token id: the model has {vocabulary} tokens; use the tokenizer that belongs to it",
            path.display()
        ),
    };
    ids.chunks_exact(length).map(|row| row.iter().map(id).collect()).collect()
}

/// The logits of a model, written on a backend.
struct WriteLogits<'a> {
    model: &'a Model,
    settings: Settings,
    ids: &'a [Vec<u32>],
    plan: &'a Plan,
    path: &'a Path,
    report: &'a Report,
}

/// Logits on several ranks, the first of which writes.
struct OnRanks<'a> {
    write: WriteLogits<'a>,
    ranks: usize,
    threads: NonZero<usize>,
}

impl OnSeats for OnRanks<'_> {
    type Output = anyhow::Result<()>;

    fn run<B: Backend + 'static>(self, seats: &dyn Seats<B>) -> anyhow::Result<()> {
        let ranks = seats.in_process(&Layout { ranks: self.ranks, ..Layout::ONE });
        let program = |rank: &Rank<B>| match rank.peers().rank() {
            0 => write(rank, &self.write),
            _ => self.write.help(rank),
        };
        let mut outcomes = team::run(&ranks, self.threads, program).into_iter();
        // What goes wrong elsewhere reaches the first as the loss of a rank: the cause comes before it.
        let first = outcomes.next().unwrap_or(Ok(()));
        outcomes.find(is_cause).unwrap_or(first)
    }
}

/// Whether a rank failed by itself rather than because another did.
fn is_cause(outcome: &anyhow::Result<()>) -> bool {
    let lost = |error: &anyhow::Error| {
        error.chain().any(|cause| matches!(cause.downcast_ref(), Some(KernelError::Lost { .. })))
    };
    outcome.as_ref().is_err_and(|error| !lost(error))
}

impl WriteLogits<'_> {
    /// What a rank does that does not write.
    fn help<B: Backend>(&self, backend: &B) -> anyhow::Result<()> {
        let sequences: Vec<&[u32]> = self.ids.iter().map(Vec::as_slice).collect();
        let engine =
            Engine::new(backend, self.model.source(), self.settings).with_schedule(self.plan.schedule);
        for group in &self.plan.groups {
            engine.logits(&sequences[group.clone()], &(), |_| Ok::<(), ctq_runtime::Error>(()))?;
        }
        Ok(())
    }
}

/// Writes `logits` [B, S, V] F32 to `path`, layer by layer and then rows as they come: beside it, then renamed.
fn write<B: Backend>(backend: &B, task: &WriteLogits<'_>) -> anyhow::Result<()> {
    let WriteLogits { model, settings, ids, plan, path, report } = *task;
    let spec = &model.source().inventory().spec;
    let (batch, length) = (ids.len(), ids[0].len());
    let bytes = batch * length * spec.vocab * 4;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let cannot = || {
        format!(
            "{}: cannot be written; check that its folder takes a file of {bytes} bytes, then run the same command again",
            path.display()
        )
    };
    let temporary = beside(folder).with_context(cannot)?;
    let mut file = BufWriter::new(temporary.as_file());
    let header = format!(
        r#"{{"logits":{{"dtype":"F32","shape":[{batch},{length},{}],"data_offsets":[0,{bytes}]}}}}"#,
        spec.vocab
    );
    let padded = header.len().next_multiple_of(8);
    file.write_all(&(padded as u64).to_le_bytes()).with_context(cannot)?;
    file.write_all(format!("{header:padded$}").as_bytes()).with_context(cannot)?;
    let layers = spec.blocks.len();
    let progress = Progress::new(report, &model.name, Unit::Layers, (layers * plan.groups.len()) as u64);
    let sequences: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    let engine = Engine::new(backend, model.source(), settings).with_schedule(plan.schedule);
    let mut done = 0;
    for (index, group) in plan.groups.iter().enumerate() {
        let watch = Watch { progress: &progress, before: index * layers };
        let written = engine.logits(&sequences[group.clone()], &watch, |rows| {
            if let Some(at) = rows.iter().position(|logit| !logit.is_finite()) {
                let row = done + at / spec.vocab;
                let (module, window, position) =
                    (spec.head.clone(), row / length - group.start, row % length);
                return Err(ctq_runtime::Error::NonFinite { module, window, position }.into());
            }
            done += rows.len() / spec.vocab;
            let bytes: Vec<u8> = rows.iter().flat_map(|logit| logit.to_le_bytes()).collect();
            file.write_all(&bytes).with_context(cannot)
        });
        written.map_err(|error| told(error, group.start, model))?;
    }
    progress.finish();
    file.flush().with_context(cannot)?;
    drop(file);
    temporary.persist(path).with_context(cannot)?;
    Ok(())
}

/// An error of a group of rows, the first of which is row `first` of all.
fn told(error: anyhow::Error, first: usize, model: &Model) -> anyhow::Error {
    match error.downcast::<ctq_runtime::Error>() {
        Ok(error @ ctq_runtime::Error::Interrupted) => anyhow::Error::from(error)
            .context("interrupted: nothing is written, the same command starts again"),
        Ok(ctq_runtime::Error::NonFinite { module, window, position }) => {
            let error = ctq_runtime::Error::NonFinite { module, window: first + window, position };
            report::of_model(error.into(), &model.path)
        }
        Ok(error @ ctq_runtime::Error::Kernel { .. }) => report::of_model(error.into(), &model.path),
        Ok(error) => error.into(),
        Err(error) => error,
    }
}

/// A temporary file with the permissions that a plainly created file would get.
fn beside(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".ctq-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

struct Watch<'a> {
    progress: &'a Progress<'a>,
    /// Layers of the groups before.
    before: usize,
}

impl Observer for Watch<'_> {
    fn advanced(&self, layers: usize) {
        self.progress.at((self.before + layers) as u64);
    }

    fn interrupted(&self) -> bool {
        interrupt::requested()
    }
}
