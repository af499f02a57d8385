//! Writing a file so that a reader sees either the old one or the whole new one, never a half.
//!
//! Knows nothing of what is written.

use std::io::Write;
use std::path::Path;

use crate::{Error, Result};

/// Writes `bytes` beside `path` and renames the result over it.
///
/// # Errors
/// [`Error::Write`] when the directory is missing, not writable or full; `path` is then unchanged.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let failed = |source| Error::Write { path: path.to_path_buf(), source };
    let mut file = sibling(directory).map_err(failed)?;
    // The file itself: its errors do not name the temporary path, which would tell nobody anything.
    file.as_file_mut().write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// A temporary file with the permissions that a plainly created file would get.
fn sibling(directory: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".ctq-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(directory)
}
