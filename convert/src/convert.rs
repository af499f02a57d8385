//! The loop: part after part of a checkpoint into a container, a few at a time, stopping only between parts.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use ctq_container::{Container, Digest, LeftOutRecord, Overwrite, PartContents, SourceRecord, Writer};
use ctq_model::inventory::{Inventory, Part};
use ctq_model::{Checkpoint, TensorSource};
use rayon::prelude::*;

use crate::{Error, Result, part, plan};

/// Parts under way at a time. The file of each is hashed from its beginning to its end, and then waits for the disk:
/// several keep the threads busy, and each takes the memory of two pieces.
const PARTS_IN_FLIGHT: usize = 4;

/// Files of a checkpoint that travel along, where they exist.
const COPIES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// How to convert.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// Threads that encode. The bytes written do not depend on it.
    pub threads: usize,
    /// What to do with a container that is in the way.
    pub overwrite: Overwrite,
    /// Name of the model, for people; `None`: that of its directory.
    pub name: Option<&'a str>,
    /// Set from elsewhere to stop at the end of the parts under way.
    pub interrupt: Option<&'a AtomicBool>,
}

/// How far a conversion has come. Bytes are those of the checkpoint's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The part just finished; `None` at the start, when the parts of an earlier run are counted.
    pub finished: Option<Part>,
    /// Parts that are complete.
    pub parts_done: usize,
    /// Parts of the model.
    pub parts: usize,
    /// Bytes of the complete parts.
    pub bytes_done: u64,
    /// Bytes of all parts.
    pub bytes: u64,
}

/// Converts `source`, whose text model is `inventory`, into a container at `out`, or goes on where an earlier run was
/// killed. `observer` is called at the start and after each part, from whichever thread finished it.
///
/// # Errors
/// Where the checkpoint holds a value that is not a number, the output cannot be written, or the interrupt was set. The
/// parts that are complete by then are kept and not converted again.
pub fn convert(
    source: &Checkpoint,
    inventory: &Inventory,
    out: &Path,
    options: &Options<'_>,
    observer: &(dyn Fn(Progress) + Sync),
) -> Result<Container> {
    let plan = plan::plan(source, inventory, options.name)?;
    let record = plan.source.clone();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads.max(1)).build();
    let pool = pool.map_err(|e| Error::Threads { threads: options.threads, what: e.to_string() })?;
    let writer = Writer::create(out, plan, options.overwrite)?;
    for file in COPIES.iter().map(|name| source.root().join(name)).filter(|path| path.is_file()) {
        writer.copy_file(&file)?;
    }
    let tally = Tally::new(source, inventory, &writer.completed());
    observer(tally.progress(None));
    let job =
        Job { source, inventory, out, record: &record, writer: &writer, tally: &tally, options, observer };
    job.run(&pool)?;
    let left_out = pool.install(|| left_out(source, inventory, &record))?;
    Ok(writer.finish(left_out)?)
}

struct Job<'a> {
    source: &'a Checkpoint,
    inventory: &'a Inventory,
    out: &'a Path,
    record: &'a SourceRecord,
    writer: &'a Writer,
    tally: &'a Tally,
    options: &'a Options<'a>,
    observer: &'a (dyn Fn(Progress) + Sync),
}

impl Job<'_> {
    fn run(&self, pool: &rayon::ThreadPool) -> Result<()> {
        let done = self.writer.completed();
        let mut todo: Vec<Part> =
            self.inventory.parts().map(|(part, _)| part).filter(|part| !done.contains(part)).collect();
        if self.options.threads > 1 {
            // The longest first, so that nobody waits for it at the end.
            todo.sort_by_key(|part| std::cmp::Reverse(self.tally.bytes[part]));
        }
        let next = Mutex::new(todo.iter());
        let failures = Mutex::new(Vec::new());
        let workers = self.options.threads.clamp(1, PARTS_IN_FLIGHT).min(todo.len());
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    loop {
                        let mut next = lock(&next);
                        let stop = self.interrupted() || !lock(&failures).is_empty();
                        let Some(part) = next.next().filter(|_| !stop) else { break };
                        let contents = self.contents(pool, *part);
                        // Parts are looked through one at a time: the first and largest is not held up by the others.
                        drop(next);
                        if let Err(error) = contents.and_then(|contents| self.write(pool, *part, &contents)) {
                            lock(&failures).push((*part, error));
                        }
                    }
                });
            }
        });
        let failures = failures.into_inner().expect("no worker panics");
        if let Some((_, error)) = failures.into_iter().min_by_key(|(part, _)| *part) {
            return Err(error);
        }
        let progress = self.tally.progress(None);
        if progress.parts_done < progress.parts {
            let path = self.out.to_owned();
            return Err(Error::Interrupted { path, done: progress.parts_done, parts: progress.parts });
        }
        Ok(())
    }

    fn contents(&self, pool: &rayon::ThreadPool, part: Part) -> Result<PartContents<'_>> {
        let file_index = |name: &str| file_index(self.source, self.record, name);
        let inventory = self.inventory.part(part);
        Ok(pool.install(|| part::contents(self.source, inventory, &file_index))?)
    }

    fn write(&self, pool: &rayon::ThreadPool, part: Part, contents: &PartContents<'_>) -> Result<()> {
        self.writer.write_part(part, contents, pool)?.keep()?;
        (self.observer)(self.tally.finish(part));
        Ok(())
    }

    fn interrupted(&self) -> bool {
        self.options.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

/// Counts finished parts and their bytes.
struct Tally {
    bytes: BTreeMap<Part, u64>,
    done: Mutex<Vec<Part>>,
}

impl Tally {
    fn new(source: &Checkpoint, inventory: &Inventory, done: &[Part]) -> Tally {
        Tally { bytes: plan::source_bytes(source, inventory), done: Mutex::new(done.to_vec()) }
    }

    fn finish(&self, part: Part) -> Progress {
        lock(&self.done).push(part);
        self.progress(Some(part))
    }

    fn progress(&self, finished: Option<Part>) -> Progress {
        let done = lock(&self.done);
        Progress {
            finished,
            parts_done: done.len(),
            parts: self.bytes.len(),
            bytes_done: done.iter().map(|part| self.bytes[part]).sum(),
            bytes: self.bytes.values().sum(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("no worker panics")
}

fn file_index(source: &Checkpoint, record: &SourceRecord, tensor: &str) -> usize {
    let name = plan::file_name(source.file_of(tensor));
    record.files.iter().position(|file| file.name == name).unwrap_or(0)
}

/// Tensors that scoring text does not use, each with its hash.
fn left_out(source: &Checkpoint, inventory: &Inventory, record: &SourceRecord) -> Result<Vec<LeftOutRecord>> {
    let one = |name: &String| -> Result<Option<LeftOutRecord>> {
        let Some(tensor) = source.tensor(name)? else { return Ok(None) };
        Ok(Some(LeftOutRecord {
            name: name.clone(),
            dtype: tensor.dtype,
            sha256: Digest::of(&tensor.bytes),
            shape: tensor.shape,
            file: file_index(source, record, name),
        }))
    };
    let records: Result<Vec<Option<LeftOutRecord>>> = inventory.left_out.par_iter().map(one).collect();
    Ok(records?.into_iter().flatten().collect())
}
