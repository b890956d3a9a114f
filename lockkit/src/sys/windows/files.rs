//! Files on Windows, by the names of the standard library's Unix extensions.
//!
//! - *The identity* of a file: the volume's serial number and the file's id, which no other file
//!   has while it is open.
//! - *Permissions* are inherited from the directory, so modes are not set.
//! - *Deleting* a file that other processes have open removes its name at once on NTFS since
//!   Windows 10 1709. Elsewhere the name stays until the last process closes the file. In between a
//!   call gets `STATUS_DELETE_PENDING`. This module reports that as a missing file when it opens,
//!   and as an existing file when it creates. The callers then try again, as they do when another
//!   process came first.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::os::windows::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::path::{Path, PathBuf};
use std::ptr;

use windows_sys::Win32::Foundation::{
    ERROR_ACCESS_DENIED, ERROR_FILENAME_EXCED_RANGE, ERROR_INVALID_NAME, ERROR_INVALID_PARAMETER,
    INVALID_HANDLE_VALUE, STATUS_DELETE_PENDING,
};
use windows_sys::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, CREATE_NEW, CreateFileW, FILE_ATTRIBUTE_NORMAL,
    FILE_FLAG_BACKUP_SEMANTICS, FILE_FLAG_OPEN_REPARSE_POINT, FILE_GENERIC_READ,
    FILE_GENERIC_WRITE, FILE_ID_INFO, FILE_READ_ATTRIBUTES, FILE_REMOTE_PROTOCOL_INFO,
    FILE_SHARE_DELETE, FILE_SHARE_READ, FILE_SHARE_WRITE, FileIdInfo, FileRemoteProtocolInfo,
    GetFileInformationByHandle, GetFileInformationByHandleEx,
};

use super::security::Descriptor;

/// For `custom_flags`: does not follow a symbolic link.
pub(crate) const NOFOLLOW: i32 = FILE_FLAG_OPEN_REPARSE_POINT as i32;
/// Opening waits for no other process on Windows.
pub(crate) const NONBLOCK: i32 = 0;
/// Opening acquires no terminal on Windows.
pub(crate) const NOCTTY: i32 = 0;

#[link(name = "ntdll")]
unsafe extern "system" {
    /// Returns the status of this thread's last system call, which is more precise than the Windows
    /// error made of it.
    safe fn RtlGetLastNtStatus() -> i32;
}

/// Reading and writing at offsets. It moves the file's position, which no code here uses.
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

impl DirBuilderExt for fs::DirBuilder {
    fn mode(&mut self, _: u32) -> &mut Self {
        self
    }
}

/// The metadata of a file.
#[derive(Debug)]
pub(crate) struct Metadata {
    metadata: fs::Metadata,
    volume: u64,
    id: u64,
    links: u64,
}

impl Deref for Metadata {
    type Target = fs::Metadata;

    fn deref(&self) -> &fs::Metadata {
        &self.metadata
    }
}

/// The numbers of a file, as on Unix.
pub(crate) trait MetadataExt {
    fn dev(&self) -> u64;
    fn ino(&self) -> u64;
    fn nlink(&self) -> u64;
    /// Always root: on Windows the directory decides which user owns a file and may write to it.
    fn uid(&self) -> u32;
}

impl MetadataExt for Metadata {
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

/// Opens an existing file.
pub(crate) fn open(options: &OpenOptions, path: &Path) -> io::Result<File> {
    options
        .open(path)
        .map_err(|error| unless_pending(error, io::ErrorKind::NotFound))
}

/// Creates a file; `options` must request that.
pub(crate) fn create(options: &OpenOptions, path: &Path) -> io::Result<File> {
    options
        .open(path)
        .map_err(|error| unless_pending(error, io::ErrorKind::AlreadyExists))
}

/// Creates a file with the access that `access` gives, or with what the directory gives. All others
/// may open, write and delete it meanwhile.
///
/// # Errors
/// `ERROR_FILE_EXISTS` if the path leads to a file.
pub(crate) fn create_new(path: &Path, access: Option<&Descriptor>) -> io::Result<File> {
    let attributes = access.map(Descriptor::attributes);
    let wide = super::wide(&path.to_string_lossy());
    // SAFETY: the path ends with a zero, and the attributes' descriptor lives until the end of this
    // call.
    let handle = unsafe {
        CreateFileW(
            wide.as_ptr(),
            FILE_GENERIC_READ | FILE_GENERIC_WRITE,
            FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
            attributes.as_ref().map_or(ptr::null(), ptr::from_ref),
            CREATE_NEW,
            FILE_ATTRIBUTE_NORMAL,
            ptr::null_mut(),
        )
    };
    match handle == INVALID_HANDLE_VALUE {
        true => Err(io::Error::last_os_error()),
        // SAFETY: the call has just made the handle, and it has no other owner.
        false => Ok(File::from(unsafe { OwnedHandle::from_raw_handle(handle) })),
    }
}

/// Returns the error of the call that has just failed, or `instead` if the call met a file that is
/// being deleted.
fn unless_pending(error: io::Error, instead: io::ErrorKind) -> io::Error {
    let status = RtlGetLastNtStatus();
    match error.raw_os_error() == Some(ERROR_ACCESS_DENIED as i32)
        && status == STATUS_DELETE_PENDING
    {
        true => instead.into(),
        false => error,
    }
}

/// Returns the metadata of the open file.
pub(crate) fn metadata_of(file: &File) -> io::Result<Metadata> {
    let metadata = file.metadata()?;
    let handle = file.as_raw_handle();
    let mut found = MaybeUninit::<BY_HANDLE_FILE_INFORMATION>::uninit();
    // SAFETY: the handle is open as long as `file` is, and the call fills in its argument, or
    // fails.
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
        // NTFS has ids of 64 bits, ReFS of all 128.
        Some(id) => {
            let whole = u128::from_le_bytes(id.FileId.Identifier);
            (
                id.VolumeSerialNumber,
                whole as u64 ^ ((whole >> 64) as u64).rotate_left(32),
            )
        }
        // File systems older than this query.
        None => {
            let id = u64::from(found.nFileIndexHigh) << 32 | u64::from(found.nFileIndexLow);
            (found.dwVolumeSerialNumber.into(), id)
        }
    };
    Ok(Metadata {
        metadata,
        volume,
        id,
        links: found.nNumberOfLinks.into(),
    })
}

/// Returns the metadata of the file that the path leads to.
pub(crate) fn metadata(path: &Path) -> io::Result<Metadata> {
    metadata_of(&open_for_metadata(path, 0)?)
}

/// Returns the metadata of the path itself, which may be a symbolic link.
pub(crate) fn symlink_metadata(path: &Path) -> io::Result<Metadata> {
    metadata_of(&open_for_metadata(path, FILE_FLAG_OPEN_REPARSE_POINT)?)
}

fn open_for_metadata(path: &Path, flags: u32) -> io::Result<File> {
    // The flag with which directories are opened. Attributes are readable however other processes
    // have opened the file.
    let flags = flags | FILE_FLAG_BACKUP_SEMANTICS;
    open(
        OpenOptions::new()
            .access_mode(FILE_READ_ATTRIBUTES)
            .custom_flags_raw(flags),
        path,
    )
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
pub(crate) fn new_file_mode(mode: u32) -> u32 {
    mode
}

/// Does not check: access control lists decide about removal.
pub(crate) fn check_removable(_: &Path, _: &Metadata) -> io::Result<()> {
    Ok(())
}

/// Renames the file at `from` to `to`.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)
}

/// Does not check: the directory decides which user owns a file.
pub(crate) fn is_owned_by_user(_: &Metadata) -> bool {
    true
}

/// Modes are for Unix.
pub(crate) fn set_directory_mode(_: &Path, _: u32) -> io::Result<()> {
    Ok(())
}

/// Does not check: the access control list of a directory decides which users can write to it.
pub(crate) fn is_writable_by_others(_: &Metadata) -> bool {
    false
}

/// Modes are for Unix.
pub(crate) fn group_other_write_bits(_: &Metadata) -> u32 {
    0
}

/// Whether the error is due to a name that the file system cannot store.
// `ErrorKind::InvalidFilename` would say so, but is newer than lockkit's oldest supported compiler.
pub(crate) fn is_name_too_long(error: &io::Error) -> bool {
    let refused = [ERROR_FILENAME_EXCED_RANGE, ERROR_INVALID_NAME];
    error
        .raw_os_error()
        .is_some_and(|code| refused.contains(&(code as u32)))
}

/// Always false: on Windows a symbolic link can be opened without following it.
pub(crate) fn is_symlink_refused(_: &io::Error) -> bool {
    false
}

/// Whether the file is on a local file system: no remote protocol leads to it.
pub(crate) fn is_local(file: &File) -> bool {
    let mut protocol = MaybeUninit::<FILE_REMOTE_PROTOCOL_INFO>::uninit();
    let length = size_of::<FILE_REMOTE_PROTOCOL_INFO>() as u32;
    let to = protocol.as_mut_ptr().cast();
    // SAFETY: the handle is open as long as `file` is, and the call writes at most the given number
    // of bytes.
    let remote = unsafe {
        GetFileInformationByHandleEx(file.as_raw_handle(), FileRemoteProtocolInfo, to, length)
    };
    let failed = io::Error::last_os_error();
    remote == 0 && failed.raw_os_error() == Some(ERROR_INVALID_PARAMETER as i32)
}

/// Returns the path in the decoded path of a `file:` URL: in `/C:/path` the first slash is not part
/// of it.
pub(crate) fn path_of_url(path: Vec<u8>) -> Option<PathBuf> {
    let path = PathBuf::from(String::from_utf8(path).ok()?.strip_prefix('/')?);
    path.is_absolute().then_some(path)
}
