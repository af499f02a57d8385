//! Writing a container so that a kill at any moment loses one part at most: each part goes to a file beside, is made
//! durable, renamed and then recorded in the journal; the manifest comes last.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ctq_model::Inventory;
use ctq_model::accounting::{Accounting, Bits};
use ctq_model::inventory::Part;
use rayon::ThreadPool;

use crate::early_file::EarlyFile;
use crate::journal::Journal;
use crate::manifest::{FORMAT, FORMAT_VERSION};
use crate::output::{self, Overwrite, PARTIAL, Target};
use crate::part_writer::write_part;
use crate::{
    Container, Digest, Error, FileRecord, LeftOutRecord, MANIFEST, Manifest, PartContents, PartRecord,
    Result, SourceRecord, part_file_name,
};

/// Everything that is known of a container before its first part is written.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Name of the model, for people.
    pub name: String,
    /// The checkpoint.
    pub source: SourceRecord,
    /// Changes with anything that must not be mixed with the parts of an earlier run: the checkpoint, and the ctq
    /// that converts it.
    pub resume_key: Digest,
    /// The text model.
    pub inventory: Inventory,
    /// Bits per weight of the checkpoint.
    pub accounting: Accounting,
    /// Expected length of each part file, for the check of free space.
    pub part_bytes: BTreeMap<Part, u64>,
}

/// A container being written. Parts may come in any order and from several threads.
#[derive(Debug)]
pub struct Writer {
    target: Target,
    plan: Plan,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    journal: Journal,
    parts: BTreeMap<Part, PartRecord>,
    copies: Vec<FileRecord>,
}

impl Writer {
    /// Begins a container in `out`, or goes on with one that an earlier run of the same plan has begun.
    ///
    /// # Errors
    /// Where `out` cannot become a container, holds one already, is being written by another process, or the file
    /// system is too full. No file of a complete container has been changed then.
    pub fn create(out: &Path, plan: Plan, overwrite: Overwrite) -> Result<Writer> {
        let target = output::prepare(out, overwrite)?;
        let mut journal = Journal::lock(&target.root)?;
        if output::is_complete(&target.root) {
            match target.replaces {
                // Another process has finished since we looked.
                None => {
                    journal.remove(&target.root)?;
                    return Err(Error::AlreadyComplete { path: target.root, origin: plan.source.path });
                }
                // A replacement that was killed just before it took its place: its parts are still good.
                Some(_) => {
                    let manifest = target.root.join(MANIFEST);
                    fs::remove_file(&manifest).map_err(|e| Error::io(&manifest, e, "remove it by hand"))?;
                }
            }
        }
        let mut parts = BTreeMap::new();
        match journal.read()? {
            Some(left) if left.resume_key == plan.resume_key => {
                for record in left.parts {
                    if is_there(&target.root, &record) {
                        parts.insert(record.part, record);
                    }
                }
            }
            Some(left) => {
                let replace =
                    overwrite == Overwrite::Replace || target.replaces.is_some() || left.parts.is_empty();
                if !replace {
                    return Err(Error::OtherConversion { path: target.root });
                }
                begin(&target.root, &mut journal, &plan)?;
            }
            None => begin(&target.root, &mut journal, &plan)?,
        }
        let progress = Mutex::new(Progress { journal, parts, copies: Vec::new() });
        let writer = Writer { target, plan, progress };
        output::check_space(
            &writer.target.root,
            writer.needed(),
            writer.done(),
            writer.plan.part_bytes.len(),
        )?;
        Ok(writer)
    }

    /// Parts that are complete, by this run or an earlier one.
    ///
    /// # Panics
    /// If a thread has panicked while writing.
    pub fn completed(&self) -> Vec<Part> {
        self.lock().parts.keys().copied().collect()
    }

    /// Copies a file of the checkpoint as it is.
    ///
    /// # Errors
    /// Where it cannot be read or written.
    ///
    /// # Panics
    /// If a thread has panicked while writing.
    pub fn copy_file(&self, from: &Path) -> Result<()> {
        let bytes = fs::read(from).map_err(|e| Error::io(from, e, "check the permissions"))?;
        let name = from.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        self.write_file(&name, |file| file.write_all(&bytes))?;
        let record = FileRecord { name, bytes: bytes.len() as u64, sha256: Digest::of(&bytes) };
        self.lock().copies.push(record);
        Ok(())
    }

    /// Writes one part beside its place; its codes are tiled by `pool`, from outside of which this is called.
    ///
    /// # Errors
    /// Where it cannot be written; what was recorded before stays valid.
    ///
    /// # Panics
    /// If a thread has panicked while writing.
    pub fn write_part(
        &self,
        part: Part,
        contents: &PartContents<'_>,
        pool: &ThreadPool,
    ) -> Result<WrittenPart<'_>> {
        let write = |file: &mut File| {
            let mut early = EarlyFile::new(file);
            let written = write_part(&mut early, part, contents, pool)?;
            early.finish()?;
            Ok(written)
        };
        let (file, written) = self.write_beside(&part_file_name(part), write)?;
        let record = PartRecord {
            part,
            file: part_file_name(part),
            bytes: written.bytes,
            sha256: written.sha256,
            stored_bytes: written.stored_bytes,
            tensors: written.tensors,
        };
        Ok(WrittenPart { writer: self, file, record })
    }

    /// Writes the manifest, which makes the container complete, puts it in its place, and opens it.
    ///
    /// # Errors
    /// Where the manifest cannot be written, or the old container cannot be replaced.
    ///
    /// # Panics
    /// If a part has not been written, or a thread has panicked while writing.
    pub fn finish(self, left_out: Vec<LeftOutRecord>) -> Result<Container> {
        let manifest = self.manifest(left_out);
        self.write_file(MANIFEST, |file| {
            let mut file = io::BufWriter::new(file);
            serde_json::to_writer_pretty(&mut file, &manifest)?;
            file.write_all(b"\n")?;
            file.flush()
        })?;
        let journal = self.progress.into_inner().expect("no thread has panicked while writing").journal;
        let root = match self.target.replaces {
            None => self.target.root,
            Some(old) => {
                output::exchange(&self.target.root, &old)?;
                old
            }
        };
        // The lock is held until the container is in its place.
        journal.remove(&root)?;
        Container::open(&root)
    }

    fn manifest(&self, left_out: Vec<LeftOutRecord>) -> Manifest {
        let progress = self.lock();
        let parts: Vec<PartRecord> =
            self.plan.inventory.parts().map(|(part, _)| progress.parts[&part].clone()).collect();
        let mut copies = progress.copies.clone();
        copies.sort_by(|a, b| a.name.cmp(&b.name));
        let mut accounting = self.plan.accounting.clone();
        let bits = parts.iter().map(|part| part.stored_bytes * 8).sum();
        accounting.container = Some(Bits { bits, weights: accounting.file.weights });
        Manifest {
            format: FORMAT.to_owned(),
            format_version: FORMAT_VERSION,
            ctq_version: env!("CARGO_PKG_VERSION").to_owned(),
            name: self.plan.name.clone(),
            source: self.plan.source.clone(),
            accounting,
            inventory: self.plan.inventory.clone(),
            copies,
            parts,
            left_out,
        }
    }

    /// Writes a file beside, makes it durable and renames it. On failure nothing is left of it.
    fn write_file(&self, name: &str, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
        let (file, ()) = self.write_beside(name, write)?;
        self.keep_file(name, &file)
    }

    fn write_beside<T>(
        &self,
        name: &str,
        write: impl FnOnce(&mut File) -> io::Result<T>,
    ) -> Result<(File, T)> {
        let attempt = || -> io::Result<(File, T)> {
            let mut file = File::create(self.beside(name))?;
            let value = write(&mut file)?;
            Ok((file, value))
        };
        attempt().map_err(|e| self.fail(name, e))
    }

    fn keep_file(&self, name: &str, file: &File) -> Result<()> {
        let attempt = || -> io::Result<()> {
            file.sync_all()?;
            fs::rename(self.beside(name), self.target.root.join(name))?;
            output::sync(&self.target.root)
        };
        attempt().map_err(|e| self.fail(name, e))
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.target.root.join(format!("{name}{PARTIAL}"))
    }

    fn fail(&self, name: &str, source: io::Error) -> Error {
        // The room that half a file takes is what the next attempt needs.
        let _ = fs::remove_file(self.beside(name));
        self.write_error(&self.target.root.join(name), source)
    }

    fn write_error(&self, path: &Path, source: io::Error) -> Error {
        if matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) {
            return Error::io(path, source, "check the permissions of the output");
        }
        let (needed, done, parts) = (self.needed(), self.done(), self.plan.part_bytes.len());
        Error::Write { path: path.to_owned(), source, needed, done, parts }
    }

    /// Bytes of the parts that are not complete.
    fn needed(&self) -> u64 {
        let progress = self.lock();
        let missing = self.plan.part_bytes.iter().filter(|(part, _)| !progress.parts.contains_key(part));
        missing.map(|(_, bytes)| bytes).fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    fn done(&self) -> usize {
        self.lock().parts.len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().expect("no thread has panicked while writing")
    }
}

/// A part whose bytes are written, though not yet durable.
#[derive(Debug)]
#[must_use = "a part that is not kept is none"]
pub struct WrittenPart<'a> {
    writer: &'a Writer,
    file: File,
    record: PartRecord,
}

impl WrittenPart<'_> {
    /// Makes the part durable, puts it in its place and records it as complete. Waits for the disk.
    ///
    /// # Errors
    /// Where the disk fails; what was recorded before stays valid.
    ///
    /// # Panics
    /// If a thread has panicked while writing.
    pub fn keep(self) -> Result<()> {
        let WrittenPart { writer, file, record } = self;
        writer.keep_file(&record.file, &file)?;
        let mut progress = writer.lock();
        if let Err(e) = progress.journal.append(&record) {
            drop(progress);
            return Err(writer.write_error(&writer.target.root, e));
        }
        progress.parts.insert(record.part, record);
        Ok(())
    }
}

fn begin(root: &Path, journal: &mut Journal, plan: &Plan) -> Result<()> {
    let start = |journal: &mut Journal| -> io::Result<()> {
        output::clear(root)?;
        journal.begin(plan.resume_key)
    };
    start(journal).map_err(|source| {
        let needed = plan.part_bytes.values().fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
        Error::Write { path: root.to_owned(), source, needed, done: 0, parts: plan.part_bytes.len() }
    })
}

fn is_there(root: &Path, record: &PartRecord) -> bool {
    let path: PathBuf = root.join(part_file_name(record.part));
    path.metadata().is_ok_and(|metadata| metadata.len() == record.bytes)
}
