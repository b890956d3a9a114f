//! Locks of open files, on systems that have none.

use std::fs::File;
use std::io;

pub(crate) fn try_write_lock(_: &File) -> io::Result<bool> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn unlock(_: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn writer(_: &File) -> io::Result<Option<u32>> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn wait_for_writers(_: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
