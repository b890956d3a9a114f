//! Extended attributes, on systems for which lockkit uses none.

use std::fs::File;
use std::io;

pub(crate) fn get<'b>(_: &File, _: &str, _: &'b mut [u8]) -> io::Result<Option<&'b [u8]>> {
    Ok(None)
}

pub(crate) fn set(_: &File, _: &str, _: &[u8]) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
