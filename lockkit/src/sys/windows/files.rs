//! Files on Windows, by the names of the standard library's for Unix.
//!
//! - *Which file* it is: the volume's serial number and the file's id, which no other file has while it is open.
//! - *Permissions* are inherited from the directory, so modes are not set.
//! - *Deleting* a file that others have open takes its name away at once on NTFS since Windows 10 1709. Elsewhere the
//!   name stays until the last of them closes it, and in between the file is neither there nor gone:
//!   `STATUS_DELETE_PENDING`, which is told here as a file that is not there for who opens it, and as one that is there
//!   for who makes it. The callers try again then, as they do when somebody else came first.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::os::windows::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::windows::io::AsRawHandle;
use std::path::{Path, PathBuf};

use windows_sys::Win32::Foundation::{
    ERROR_ACCESS_DENIED, ERROR_FILENAME_EXCED_RANGE, ERROR_INVALID_NAME, ERROR_INVALID_PARAMETER, STATUS_DELETE_PENDING,
};
use windows_sys::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, FILE_FLAG_BACKUP_SEMANTICS, FILE_FLAG_OPEN_REPARSE_POINT, FILE_ID_INFO,
    FILE_READ_ATTRIBUTES, FILE_REMOTE_PROTOCOL_INFO, FileIdInfo, FileRemoteProtocolInfo, GetFileInformationByHandle,
    GetFileInformationByHandleEx,
};

/// For `custom_flags`: a link is not followed.
pub(crate) const NOFOLLOW: i32 = FILE_FLAG_OPEN_REPARSE_POINT as i32;
/// Opening waits for nobody here.
pub(crate) const NONBLOCK: i32 = 0;
/// There are no terminals to come by here.
pub(crate) const NOCTTY: i32 = 0;

#[link(name = "ntdll")]
unsafe extern "system" {
    /// What the last system call of this thread came to: the Windows error that is made of it says less.
    safe fn RtlGetLastNtStatus() -> i32;
}

/// Reading and writing at offsets. It moves the file's position, which nothing here goes by.
pub(crate) trait FileExt {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
}

impl FileExt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.seek_read(buffer, offset)
    }

    fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.seek_read(buffer, offset)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => {
                    buffer = &mut buffer[more..];
                    offset += more as u64;
                }
            }
        }
        Ok(())
    }

    fn write_all_at(&self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.seek_write(bytes, offset)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                more => {
                    bytes = &bytes[more..];
                    offset += more as u64;
                }
            }
        }
        Ok(())
    }
}

/// Modes are for Unix; flags are Windows's.
pub(crate) trait OpenOptionsExt {
    fn mode(&mut self, mode: u32) -> &mut Self;
    fn custom_flags(&mut self, flags: i32) -> &mut Self;
}

impl OpenOptionsExt for OpenOptions {
    fn mode(&mut self, _: u32) -> &mut Self {
        self
    }

    fn custom_flags(&mut self, flags: i32) -> &mut Self {
        std::os::windows::fs::OpenOptionsExt::custom_flags(self, flags as u32)
    }
}

/// Modes are for Unix.
pub(crate) trait DirBuilderExt {
    fn mode(&mut self, mode: u32) -> &mut Self;
}

impl DirBuilderExt for std::fs::DirBuilder {
    fn mode(&mut self, _: u32) -> &mut Self {
        self
    }
}

/// What there is to see of a file.
#[derive(Debug)]
pub(crate) struct Seen {
    metadata: Metadata,
    volume: u64,
    id: u64,
    links: u64,
}

impl Deref for Seen {
    type Target = Metadata;

    fn deref(&self) -> &Metadata {
        &self.metadata
    }
}

/// The numbers of a file, as Unix has them.
pub(crate) trait MetadataExt {
    fn dev(&self) -> u64;
    fn ino(&self) -> u64;
    fn nlink(&self) -> u64;
    /// Always root's: whose a file is and who may write to it is its directory's to say here.
    fn uid(&self) -> u32;
}

impl MetadataExt for Seen {
    fn dev(&self) -> u64 {
        self.volume
    }

    fn ino(&self) -> u64 {
        self.id
    }

    fn nlink(&self) -> u64 {
        self.links
    }

    fn uid(&self) -> u32 {
        0
    }
}

/// Opens a file that is there.
pub(crate) fn open(options: &OpenOptions, path: &Path) -> io::Result<File> {
    options.open(path).map_err(|error| unless_pending(error, io::ErrorKind::NotFound))
}

/// Makes a file, with `options` that say so.
pub(crate) fn create(options: &OpenOptions, path: &Path) -> io::Result<File> {
    options.open(path).map_err(|error| unless_pending(error, io::ErrorKind::AlreadyExists))
}

/// The error of the call that has just failed, or `instead` where it met a file that is being deleted.
fn unless_pending(error: io::Error, instead: io::ErrorKind) -> io::Error {
    let status = RtlGetLastNtStatus();
    match error.raw_os_error() == Some(ERROR_ACCESS_DENIED as i32) && status == STATUS_DELETE_PENDING {
        true => instead.into(),
        false => error,
    }
}

/// What the open file is.
pub(crate) fn look(file: &File) -> io::Result<Seen> {
    let metadata = file.metadata()?;
    let handle = file.as_raw_handle();
    let mut found = MaybeUninit::<BY_HANDLE_FILE_INFORMATION>::uninit();
    // SAFETY: the handle is open as long as `file` is, and the call fills in what it is given, or fails.
    let found = unsafe {
        if GetFileInformationByHandle(handle, found.as_mut_ptr()) == 0 {
            return Err(io::Error::last_os_error());
        }
        found.assume_init()
    };
    let mut id = MaybeUninit::<FILE_ID_INFO>::uninit();
    // SAFETY: as above; the length is that of the structure.
    let id = unsafe {
        let length = size_of::<FILE_ID_INFO>() as u32;
        (GetFileInformationByHandleEx(handle, FileIdInfo, id.as_mut_ptr().cast(), length) != 0)
            .then(|| id.assume_init())
    };
    let (volume, id) = match id {
        // NTFS has 64 bits of them, ReFS all 128.
        Some(id) => {
            let whole = u128::from_le_bytes(id.FileId.Identifier);
            (id.VolumeSerialNumber, whole as u64 ^ ((whole >> 64) as u64).rotate_left(32))
        }
        // File systems that are older than the question.
        None => {
            let id = u64::from(found.nFileIndexHigh) << 32 | u64::from(found.nFileIndexLow);
            (found.dwVolumeSerialNumber.into(), id)
        }
    };
    Ok(Seen { metadata, volume, id, links: found.nNumberOfLinks.into() })
}

/// What the path leads to.
pub(crate) fn look_at(path: &Path) -> io::Result<Seen> {
    look(&open_to_look(path, 0)?)
}

/// What stands at the path itself, perhaps a link.
pub(crate) fn look_at_link(path: &Path) -> io::Result<Seen> {
    look(&open_to_look(path, FILE_FLAG_OPEN_REPARSE_POINT)?)
}

fn open_to_look(path: &Path, flags: u32) -> io::Result<File> {
    // What directories are opened with. Attributes can be read whoever has the file open in whatever manner.
    let flags = flags | FILE_FLAG_BACKUP_SEMANTICS;
    open(OpenOptions::new().access_mode(FILE_READ_ATTRIBUTES).custom_flags_raw(flags), path)
}

trait CustomFlags {
    fn custom_flags_raw(&mut self, flags: u32) -> &mut Self;
}

impl CustomFlags for OpenOptions {
    fn custom_flags_raw(&mut self, flags: u32) -> &mut Self {
        std::os::windows::fs::OpenOptionsExt::custom_flags(self, flags)
    }
}

/// Modes are for Unix.
pub(crate) fn set_mode(_: &File, _: u32) -> io::Result<()> {
    Ok(())
}

/// Modes are for Unix.
pub(crate) fn mode_of(_: &File) -> io::Result<u32> {
    Ok(0o644)
}

/// Modes are for Unix.
pub(crate) fn mode_of_new(mode: u32) -> u32 {
    mode
}

/// Not checked: access control lists decide about removal.
pub(crate) fn check_removable(_: &Path, _: &Seen) -> io::Result<()> {
    Ok(())
}

/// Gives the file at `from` the name `to`.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)
}

/// Not looked at: whose a file is is for its directory to say.
pub(crate) fn is_own(_: &Seen) -> bool {
    true
}

/// Modes are for Unix.
pub(crate) fn set_directory_mode(_: &Path, _: u32) -> io::Result<()> {
    Ok(())
}

/// Not looked at: what a directory lets others do is its access control list's to say.
pub(crate) fn is_writable_by_others(_: &Seen) -> bool {
    false
}

/// Modes are for Unix.
pub(crate) fn group_other_write_bits(_: &Seen) -> u32 {
    0
}

/// Whether the error comes of a name that the file system cannot have.
// `ErrorKind::InvalidFilename` says so, but is younger than the oldest compiler that lockkit is for.
pub(crate) fn is_name_too_long(error: &io::Error) -> bool {
    let refused = [ERROR_FILENAME_EXCED_RANGE, ERROR_INVALID_NAME];
    error.raw_os_error().is_some_and(|code| refused.contains(&(code as u32)))
}

/// Opening a link without following it works here.
pub(crate) fn is_of_a_link(_: &io::Error) -> bool {
    false
}

/// Whether the file is on a file system of this machine's own: no protocol leads to it.
pub(crate) fn is_local(file: &File) -> bool {
    let mut protocol = MaybeUninit::<FILE_REMOTE_PROTOCOL_INFO>::uninit();
    let length = size_of::<FILE_REMOTE_PROTOCOL_INFO>() as u32;
    let to = protocol.as_mut_ptr().cast();
    // SAFETY: the handle is open as long as `file` is, and the call writes no more than it is told there is room for.
    let remote = unsafe { GetFileInformationByHandleEx(file.as_raw_handle(), FileRemoteProtocolInfo, to, length) };
    let failed = io::Error::last_os_error();
    remote == 0 && failed.raw_os_error() == Some(ERROR_INVALID_PARAMETER as i32)
}

/// The path that a `file:` URL names, decoded: in `/C:/path` the first slash is no part of it.
pub(crate) fn path_of_url(path: Vec<u8>) -> Option<PathBuf> {
    let path = PathBuf::from(String::from_utf8(path).ok()?.strip_prefix('/')?);
    path.is_absolute().then_some(path)
}
