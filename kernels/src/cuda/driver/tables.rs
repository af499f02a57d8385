//! Small tables that come again, such as the weight of a norm for every batch, or the positions of a batch for every
//! layer: uploaded once and kept until others have taken their room. Knows bytes, not what they mean.

use std::sync::{Arc, Mutex, PoisonError};

use crate::KernelError;

/// Bytes of the tables that are kept, and of the largest of them.
const KEPT: usize = 32 << 20;
const LARGEST: usize = 256 << 10;

/// Tables in device memory by their bytes.
#[derive(Debug)]
pub(super) struct Tables<M> {
    /// The one that was used last is the last.
    kept: Mutex<Vec<Table<M>>>,
}

#[derive(Debug)]
struct Table<M> {
    bytes: Box<[u8]>,
    memory: Arc<M>,
}

impl<M> Tables<M> {
    pub(super) fn new() -> Tables<M> {
        Tables { kept: Mutex::default() }
    }

    /// Memory that holds `bytes`, which `upload` brings there where they are not.
    pub(super) fn get(
        &self,
        bytes: &[u8],
        upload: impl FnOnce() -> Result<M, KernelError>,
    ) -> Result<Arc<M>, KernelError> {
        if let Some(memory) = self.find(bytes) {
            return Ok(memory);
        }
        let memory = Arc::new(upload()?);
        if bytes.len() <= LARGEST {
            self.keep(Table { bytes: bytes.into(), memory: Arc::clone(&memory) });
        }
        Ok(memory)
    }

    fn find(&self, bytes: &[u8]) -> Option<Arc<M>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // What was used last is most likely wanted again.
        let index = kept.iter().rposition(|table| *table.bytes == *bytes)?;
        kept[index..].rotate_left(1);
        kept.last().map(|table| Arc::clone(&table.memory))
    }

    fn keep(&self, table: Table<M>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(table);
        let mut bytes: usize = kept.iter().map(|table| table.bytes.len()).sum();
        let unused = kept.iter().take_while(|table| {
            let is_too_much = bytes > KEPT;
            bytes -= if is_too_much { table.bytes.len() } else { 0 };
            is_too_much
        });
        let unused = unused.count();
        kept.drain(..unused);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(tables: &Tables<Vec<u8>>, bytes: &[u8]) -> Arc<Vec<u8>> {
        tables.get(bytes, || Ok(bytes.to_vec())).expect("no device that could fail")
    }

    #[test]
    fn what_comes_again_is_uploaded_once() {
        let tables = Tables::new();
        let (first, other) = (get(&tables, &[1, 2]), get(&tables, &[1, 3]));
        assert_eq!((&**first, &**other), (&[1, 2][..], &[1, 3][..]));
        assert!(Arc::ptr_eq(&first, &get(&tables, &[1, 2])) && Arc::ptr_eq(&other, &get(&tables, &[1, 3])));
        let fail = || Err(KernelError::Device { device: String::new(), what: String::new() });
        assert!(tables.get(&[4], fail).is_err());
        assert_eq!(**get(&tables, &[4]), [4]);
    }

    #[test]
    fn the_one_that_was_used_longest_ago_goes_first() {
        let tables = Tables::new();
        let count = KEPT / LARGEST;
        let bytes = |number: usize| vec![number as u8; LARGEST];
        let all: Vec<_> = (0..count).map(|number| get(&tables, &bytes(number))).collect();
        assert!(Arc::ptr_eq(&all[0], &get(&tables, &bytes(0))));
        let one_more = get(&tables, &bytes(count));
        assert!(Arc::ptr_eq(&all[0], &get(&tables, &bytes(0))));
        assert!(!Arc::ptr_eq(&all[1], &get(&tables, &bytes(1))));
        assert!(Arc::ptr_eq(&one_more, &get(&tables, &bytes(count))));
        let large = vec![7; LARGEST + 1];
        assert!(!Arc::ptr_eq(&get(&tables, &large), &get(&tables, &large)), "too large to be kept");
    }
}
