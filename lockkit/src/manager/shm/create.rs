//! Creating the file of a lock table.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::slots::reserve;
use crate::base::error::{Error, ErrorKind, Result};
use crate::sys::failpoint::step;
use crate::sys::layout::{self, MAX_LOCKS, Shape};
use crate::sys::{files, tmpfile};

/// Creates a table without a name, and links it to `path` when it is complete. A process that is
/// killed in between leaves nothing.
pub(super) fn create(path: &Path, capacity: u32) -> Result<()> {
    if capacity == 0 || capacity > MAX_LOCKS {
        return Err(ErrorKind::InvalidCapacity {
            capacity,
            most: MAX_LOCKS,
        }
        .into());
    }
    let failed = |error: io::Error| Error::io("create", path, error);
    let directory = match path.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    };
    let file = tmpfile::file_in(directory, 0o600).map_err(failed)?;
    // The umask belongs to the program, so the mode is set here.
    files::set_mode(&file, 0o600).map_err(failed)?;
    step("mode of the file set");
    let shape = Shape::of(capacity);
    file.set_len(shape.size).map_err(failed)?;
    step("size of the table set");
    reserve(&file, shape.bitmaps()).map_err(|error| failed(error.into()))?;
    step("room for the bitmaps reserved");
    file.write_all_at(&layout::header(capacity), 0)
        .map_err(failed)?;
    step("table written");
    // Otherwise a crash of the system could leave the name without its content. In memory the call
    // costs nothing.
    file.sync_all().map_err(failed)?;
    step("table synced");
    tmpfile::name(&file, path).map_err(failed)?;
    step("table named");
    Ok(())
}
