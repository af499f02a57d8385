//! Regenerating one original tensor from a container. Keeps the part and the matrix it used last, because callers ask
//! for the tensors of a module one after another.

use std::sync::Arc;

use ctq_container::{Container, Origin, PartFile, TensorRecord};
use ctq_model::QuantMatrix;
use ctq_model::inventory::{Linear, Part};

use crate::codec;
use crate::part::weight_leaf;
use crate::tiles::untile;
use crate::{Error, Result};

/// What was used last. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cache {
    part: Option<(Part, Arc<PartFile>)>,
    matrix: Option<(String, Arc<QuantMatrix>)>,
}

impl Cache {
    /// The bytes of the original tensor that `record`, of `part`, describes.
    pub(crate) fn tensor(
        &mut self,
        container: &Container,
        part: Part,
        record: &TensorRecord,
    ) -> Result<Vec<u8>> {
        let file = self.part(container, part)?;
        match record.origin {
            Origin::Stored => Ok(file.stored(&record.name)?.to_vec()),
            Origin::Original => Ok(file.original(&record.name)?.to_vec()),
            Origin::Tiles | Origin::TilesWithExceptions => {
                let linears = &container.manifest().inventory.part(part).linears;
                let module = record.name.rsplit_once('.').map_or("", |(module, _)| module);
                let linear = linears.iter().find(|linear| linear.module == module);
                let wrong = |what: &str| Error::not_restored(file.path(), &record.name, what);
                let linear = linear.ok_or_else(|| wrong("no linear of the part has this tensor"))?;
                let matrix = self.matrix(&file, linear)?;
                let mut bytes = regenerate(&matrix, linear, record)
                    .ok_or_else(|| wrong("the tiles of its module do not hold it"))?;
                for exception in file.exceptions(&record.name)? {
                    let place = usize::try_from(exception.offset).ok().and_then(|at| bytes.get_mut(at));
                    *place.ok_or_else(|| wrong("an exception lies outside it"))? = exception.byte;
                }
                Ok(bytes)
            }
        }
    }

    fn part(&mut self, container: &Container, part: Part) -> Result<Arc<PartFile>> {
        if let Some((cached, file)) = &self.part
            && *cached == part
        {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(container.open_part(part)?);
        self.part = Some((part, Arc::clone(&file)));
        self.matrix = None;
        Ok(file)
    }

    fn matrix(&mut self, file: &PartFile, linear: &Linear) -> Result<Arc<QuantMatrix>> {
        if let Some((module, matrix)) = &self.matrix
            && *module == linear.module
        {
            return Ok(Arc::clone(matrix));
        }
        let matrix = Arc::new(untile(&file.matrix(&linear.module)?));
        self.matrix = Some((linear.module.clone(), Arc::clone(&matrix)));
        Ok(matrix)
    }
}

fn regenerate(matrix: &QuantMatrix, linear: &Linear, record: &TensorRecord) -> Option<Vec<u8>> {
    let leaf = weight_leaf(&record.name, linear)?;
    let bytes = codec::regenerate(matrix, linear, leaf, record.dtype)?;
    (bytes.len() as u64 == record.bytes()).then(|| bytes.into_owned())
}
