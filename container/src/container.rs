//! A finished container, opened: its manifest, its parts by mapping, and whether its files are still those that were
//! written.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use ctq_model::Inventory;
use ctq_model::inventory::Part;

use crate::journal::{self, JOURNAL};
use crate::part_file;
use crate::{
    Digest, DigestWriter, Error, LayerSource, MANIFEST, Manifest, PartFile, PartRecord, PartTiles, Result,
    SourceError,
};

/// A complete container. Nothing is mapped until a part is asked for.
#[derive(Debug)]
pub struct Container {
    root: PathBuf,
    manifest: Manifest,
}

impl Container {
    /// True where `root` holds a container, finished or not; false for checkpoints and everything else.
    pub fn is_container(root: &Path) -> bool {
        root.join(MANIFEST).is_file() || root.join(JOURNAL).is_file()
    }

    /// Opens the container: reads the manifest, checks that every part file is there with its full length.
    ///
    /// # Errors
    /// Where it is none, is not finished, has another version, or a file is missing or truncated.
    pub fn open(root: &Path) -> Result<Container> {
        if !root.is_dir() {
            let what = "there is no such directory".to_owned();
            return Err(Error::NotAContainer { path: root.to_owned(), what });
        }
        if !root.join(MANIFEST).is_file() {
            if root.join(JOURNAL).is_file() {
                let done = journal::count(&root.join(JOURNAL));
                return Err(Error::HalfWritten { path: root.to_owned(), done });
            }
            return Err(Error::NotAContainer {
                path: root.to_owned(),
                what: format!("it has no {MANIFEST}"),
            });
        }
        let manifest = Manifest::read(root)?;
        let parts = manifest.parts.iter().map(|part| (&part.file, part.bytes));
        for (file, bytes) in parts.chain(manifest.copies.iter().map(|copy| (&copy.name, copy.bytes))) {
            check_length(&root.join(file), bytes)?;
        }
        Ok(Container { root: root.to_owned(), manifest })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What it holds and what it was made from.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The record of one part.
    ///
    /// # Panics
    /// If the model has no such part.
    pub fn record(&self, part: Part) -> &PartRecord {
        let found = self.manifest.parts.iter().find(|record| record.part == part);
        found.expect("the manifest lists every part of its inventory")
    }

    /// Maps one part file, checked against the manifest.
    ///
    /// # Errors
    /// Where the file is missing, damaged or not the one that the manifest describes.
    ///
    /// # Panics
    /// If the model has no such part.
    pub fn open_part(&self, part: Part) -> Result<PartFile> {
        PartFile::open(&self.root, self.record(part), self.manifest.inventory.part(part))
    }

    /// Reads one part file whole and compares its SHA-256 with the manifest's.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where they differ.
    ///
    /// # Panics
    /// If the model has no such part.
    pub fn verify_part(&self, part: Part) -> Result<()> {
        let record = self.record(part);
        verify_file(&self.root.join(&record.file), record.sha256)
    }

    /// Reads every file whole and compares its SHA-256 with the manifest's.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for the first that differs.
    pub fn verify_hashes(&self) -> Result<()> {
        for copy in &self.manifest.copies {
            verify_file(&self.root.join(&copy.name), copy.sha256)?;
        }
        self.manifest.parts.iter().try_for_each(|record| self.verify_part(record.part))
    }
}

impl LayerSource for Container {
    fn inventory(&self) -> &Inventory {
        &self.manifest.inventory
    }

    fn part(&self, part: Part) -> Result<PartTiles, SourceError> {
        Ok(self.open_part(part)?.tiles()?)
    }

    fn prefetch(&self, part: Part) {
        // Pages that a map has asked for come though it is gone.
        let _ = part_file::map(&self.root.join(&self.record(part).file));
    }
}

fn check_length(path: &Path, bytes: u64) -> Result<()> {
    match path.metadata() {
        Ok(found) if found.len() == bytes => Ok(()),
        Ok(found) => {
            Err(Error::part(path, format!("truncated or replaced: {} bytes of {bytes}", found.len())))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(Error::part(path, "this file of the container is missing"))
        }
        Err(e) => Err(Error::io(path, e, "check the permissions")),
    }
}

fn verify_file(path: &Path, expected: Digest) -> Result<()> {
    let read = || -> io::Result<Digest> {
        let mut hash = DigestWriter::new(io::sink());
        io::copy(&mut io::BufReader::with_capacity(1 << 20, File::open(path)?), &mut hash)?;
        Ok(hash.finish().1)
    };
    let found = read().map_err(|e| Error::io(path, e, "check the permissions and the disk"))?;
    if found == expected {
        return Ok(());
    }
    Err(Error::Corrupt { path: path.to_owned(), expected, found })
}
