//! The kernel's lists of locks on files, and the processes that hold these locks.
//!
//! [`FileLocks`] is a snapshot of all locks of flock(2) and fcntl(2) that this process may see,
//! whatever program holds them.
//!
//! # Implementation
//! The kernel lists each lock twice:
//! - [proc_locks(5)] lists it by file system and inode, with the process that acquired the lock and
//!   its waiters. This list also has the locks of processes whose descriptors this process may not
//!   read.
//! - [proc_pid_fdinfo(5)] lists it for each descriptor through which it is held. This list names
//!   the processes that keep a lock, also an inherited one. The link of the descriptor gives the
//!   path.
//!
//! [`FileLocks::read`] reads both lists once, so a caller with many paths pays for one pass over
//! /proc. [`FileLocks::read_table`] reads the first list alone. Both open only files of /proc and
//! lock nothing, so they disturb no process. (A process that closes any descriptor of a file loses
//! its fcntl locks on that file, so a library must not open the files of its caller.)
//!
//! [proc_locks(5)]: https://man7.org/linux/man-pages/man5/proc_locks.5.html
//! [proc_pid_fdinfo(5)]: https://man7.org/linux/man-pages/man5/proc_pid_fdinfo.5.html

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{CStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, Mode, OFlags, StatxFlags, major, minor, open, openat, readlinkat, statat,
    statx,
};

use super::file_id::{self, FileId};

/// How a process locks a file. Locks of one mechanism do not exclude those of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Mechanism {
    /// flock(2), on the whole file.
    Flock,
    /// fcntl(2), on any range of bytes: `F_SETLK` (POSIX, also lockf(3)) and `F_OFD_SETLK`.
    Fcntl,
}

/// The holders and the waiters of all locks of one mechanism on one file.
///
/// ```
/// use lockkit::proc_locks::FileLocks;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-holders-of-{}", std::process::id()));
/// let _guard = lockkit::FileLock::new(&path).lock()?;
/// let flock = FileLocks::read().on(&path)?.flock.expect("a lock of flock(2)");
/// assert_eq!((flock.pids, flock.waiters), (vec![std::process::id()], 0));
/// # std::fs::remove_file(path)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockHolders {
    /// The processes that hold a lock, in ascending order. A process that a pid namespace hides is
    /// missing, and so is one that holds only an `F_OFD_SETLK` lock if its descriptors were not
    /// read.
    pub pids: Vec<u32>,
    /// The number of waiters in the kernel.
    pub waiters: u32,
}

/// The locks on one file; `None` for a mechanism without a lock. Locks of one mechanism do not
/// exclude those of the other.
///
/// ```
/// use lockkit::proc_locks::{FileLocks, LocksOnFile};
/// # fn main() -> std::io::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-locks-on-{}", std::process::id()));
/// std::fs::write(&path, "not locked")?;
/// assert_eq!(FileLocks::read_table().on(&path)?, LocksOnFile::default());
/// # std::fs::remove_file(path)
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocksOnFile {
    /// The locks of flock(2), each on the whole file.
    pub flock: Option<LockHolders>,
    /// The locks of fcntl(2), each on a range of bytes: `F_SETLK` (POSIX, also lockf(3)) and
    /// `F_OFD_SETLK`.
    pub fcntl: Option<LockHolders>,
}

/// A snapshot of the locks on files.
///
/// ```
/// use lockkit::proc_locks::FileLocks;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-file-locks-{}", std::process::id()));
/// let _guard = lockkit::FileLock::new(&path).lock()?;
/// let locks = FileLocks::read();
/// if let Some(error) = locks.table_error() {
///     eprintln!("some locks may be missing: {error}");
/// }
/// assert!(locks.on(&path)?.flock.is_some());
/// for (path, on) in locks.files() {
///     println!("{}: {on:?}", path.display());
/// }
/// # std::fs::remove_file(path)?;
/// # Ok(()) }
/// ```
#[derive(Debug, Default)]
pub struct FileLocks {
    /// The lines of /proc/locks.
    table: HashMap<ListedFile, Vec<Entry>>,
    /// The processes with a descriptor that holds a lock.
    holders: HashMap<(ListedFile, Mechanism), Vec<u32>>,
    /// The files of those descriptors: the path from the link, and the device and inode from
    /// stat(2). The path is text, because a comparison of paths goes component by component and is
    /// slow.
    files: BTreeMap<OsString, FileId>,
    /// The files of those descriptors in the kernel's lists.
    listed: HashMap<FileId, ListedFile>,
    /// The processes whose descriptors were read.
    inspected: HashSet<u32>,
    /// The files that processes with a given name have open.
    open_files: Vec<PathBuf>,
    /// The error of reading /proc/locks.
    table_error: Option<io::Error>,
    mounts: OnceCell<HashMap<u64, Device>>,
    /// The device of the file system, by the device from stat(2).
    devices: RefCell<HashMap<u64, Device>>,
}

/// The major and the minor number.
type Device = (u32, u32);

/// A file in the kernel's lists. The device is the file system's; on Btrfs stat(2) returns another
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ListedFile {
    device: Device,
    inode: u64,
}

/// A lock, from a line of the kernel's lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    mechanism: Mechanism,
    /// Whether a process waits for it, instead of holding it.
    waits: bool,
    /// The process that acquired it; 0 for an `F_OFD_SETLK` lock and for a process that a pid
    /// namespace hides.
    pid: u32,
    file: ListedFile,
}

/// Parses `1: FLOCK  ADVISORY  WRITE 4242 fe:00:131 0 EOF`, with `->` after the number for a
/// waiter.
fn parse(line: &str) -> Option<Entry> {
    let mut words = line.split_ascii_whitespace().skip(1).peekable();
    let waits = words.next_if_eq(&"->").is_some();
    let mechanism = match words.next()? {
        "FLOCK" => Mechanism::Flock,
        "POSIX" | "OFDLCK" => Mechanism::Fcntl,
        // A LEASE or a DELEG is the kernel's promise to report an open(2), not a lock.
        _ => return None,
    };
    let mut words = words.skip(2);
    let pid = words.next()?.parse().unwrap_or_default();
    let mut file = words.next()?.split(':');
    let mut number = |radix| u64::from_str_radix(file.next()?, radix).ok();
    let device = (
        u32::try_from(number(16)?).ok()?,
        u32::try_from(number(16)?).ok()?,
    );
    Some(Entry {
        mechanism,
        waits,
        pid,
        file: ListedFile {
            device,
            inode: number(10)?,
        },
    })
}

impl FileLocks {
    /// Reads all locks on files: /proc/locks, and the descriptors of every process that this
    /// process may inspect. The descriptors cost milliseconds.
    pub fn read() -> Self {
        Self::read_processes(None)
    }

    /// Reads like [`read`](Self::read), and records the files that processes named `program` have
    /// open without a lock, for [`open_files`](Self::open_files). The name is the one in
    /// `/proc/PID/comm`, of at most 15 bytes.
    ///
    /// ```
    /// use lockkit::proc_locks::FileLocks;
    /// # fn main() -> std::io::Result<()> {
    /// let program = std::fs::read_to_string("/proc/self/comm")?;
    /// let executable = std::env::current_exe()?.canonicalize()?;
    /// let _open = std::fs::File::open(&executable)?;
    /// let locks = FileLocks::read_with_open_files(program.trim_end());
    /// assert!(locks.open_files().contains(&executable));
    /// # Ok(()) }
    /// ```
    pub fn read_with_open_files(program: &str) -> Self {
        Self::read_processes(Some(program))
    }

    fn read_processes(program: Option<&str>) -> Self {
        let mut locks = Self::read_table();
        locks.inspected.clear();
        let processes = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        for pid in processes.filter_map(|name| name.parse::<u32>().ok()) {
            locks.read_process(pid, program);
        }
        locks
    }

    /// Reads like [`read`](Self::read), but only /proc/locks, in microseconds. The holder is then
    /// the process that acquired the lock, which may have passed it on to another, and no paths are
    /// known.
    ///
    /// ```
    /// use lockkit::proc_locks::FileLocks;
    /// assert_eq!(FileLocks::read_table().files().count(), 0);
    /// ```
    pub fn read_table() -> Self {
        let mut locks = Self::default();
        match read_table_text() {
            Ok(table) => {
                for entry in table.lines().filter_map(parse) {
                    locks.table.entry(entry.file).or_default().push(entry);
                }
            }
            Err(error) => locks.table_error = Some(error),
        }
        locks
    }

    fn read_process(&mut self, pid: u32, program: Option<&str>) {
        let directory = |name| {
            open(
                format!("/proc/{pid}/{name}"),
                OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
        };
        // Names relative to these directories are found in half the time of whole paths.
        let (Ok(links), Ok(infos)) = (directory("fd"), directory("fdinfo")) else {
            return;
        };
        let Ok(descriptors) = Dir::read_from(&links) else {
            return;
        };
        self.inspected.insert(pid);
        let is_program = program.is_some_and(|program| {
            fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim_end() == program)
        });
        for descriptor in descriptors.flatten() {
            let number = descriptor.file_name();
            // The links of sockets, pipes and the like are not paths. Some processes have mostly
            // these.
            let path = readlinkat(&links, number, Vec::new())
                .ok()
                .map(|path| OsString::from_vec(path.into_bytes()));
            let Some(path) = path.filter(|path| path.as_bytes().starts_with(b"/")) else {
                continue;
            };
            let Some(entries) = read_info(&infos, number) else {
                continue;
            };
            let Some(first) = entries.first() else {
                if is_program {
                    self.open_files.push(path.into());
                }
                continue;
            };
            // Through the link, because the path may lead to another file in this mount namespace.
            if let Ok(found) = statat(&links, number, AtFlags::empty()) {
                let id = (found.st_dev, found.st_ino);
                self.listed.insert(id, first.file);
                self.files.insert(path, id);
            }
            for entry in entries {
                let holders = self
                    .holders
                    .entry((entry.file, entry.mechanism))
                    .or_default();
                if holders.last() != Some(&pid) {
                    holders.push(pid);
                }
            }
        }
    }

    /// Returns the error of reading the kernel's table of locks, /proc/locks. After an error, a
    /// file without a lock in the result may be locked all the same.
    pub fn table_error(&self) -> Option<&io::Error> {
        self.table_error.as_ref()
    }

    /// Returns the locked files of the processes that this process may inspect, by path. The result
    /// excludes deleted files, and files whose path leads elsewhere in this mount namespace. After
    /// [`read_table`](Self::read_table) it is empty.
    pub fn files(&self) -> impl Iterator<Item = (&Path, LocksOnFile)> {
        self.files.iter().filter_map(|(path, id)| {
            let path = Path::new(path);
            let found = fs::metadata(path).ok()?;
            (file_id::of(&found) == *id).then(|| (path, self.locks_on(self.listed[id])))
        })
    }

    /// Returns the files without a lock that the processes named in
    /// [`read_with_open_files`](Self::read_with_open_files) have open.
    pub fn open_files(&self) -> &[PathBuf] {
        &self.open_files
    }

    /// Returns the locks on the file at `path`, which may be a directory. Follows a symbolic link.
    ///
    /// # Errors
    /// Fails if the metadata of the file cannot be read.
    pub fn on(&self, path: &Path) -> io::Result<LocksOnFile> {
        let found = fs::metadata(path)?;
        let id = self.listed.get(&file_id::of(&found)).copied();
        Ok(self.locks_on(id.unwrap_or_else(|| self.listed_file(path, &found))))
    }

    fn locks_on(&self, file: ListedFile) -> LocksOnFile {
        LocksOnFile {
            flock: self.locks_of(Mechanism::Flock, file),
            fcntl: self.locks_of(Mechanism::Fcntl, file),
        }
    }

    fn locks_of(&self, mechanism: Mechanism, file: ListedFile) -> Option<LockHolders> {
        let entries = self.table.get(&file).map(Vec::as_slice).unwrap_or_default();
        let entries: Vec<_> = entries
            .iter()
            .filter(|entry| entry.mechanism == mechanism)
            .collect();
        let holders = self
            .holders
            .get(&(file, mechanism))
            .map(Vec::as_slice)
            .unwrap_or_default();
        if holders.is_empty() && entries.iter().all(|entry| entry.waits) {
            return None;
        }
        // If a process has no descriptor with the lock, although its descriptors were read, it
        // acquired the lock for another.
        let acquirers = entries
            .iter()
            .filter(|entry| !entry.waits && entry.pid != 0)
            .map(|entry| entry.pid);
        let mut pids: Vec<_> = holders
            .iter()
            .copied()
            .chain(acquirers.filter(|pid| !self.inspected.contains(pid)))
            .collect();
        pids.sort_unstable();
        pids.dedup();
        Some(LockHolders {
            pids,
            waiters: waiters(&entries),
        })
    }

    /// Returns the file in the kernel's lists, with the device of the file system where the path is
    /// mounted.
    fn listed_file(&self, path: &Path, found: &fs::Metadata) -> ListedFile {
        let device = *self
            .devices
            .borrow_mut()
            .entry(found.dev())
            .or_insert_with(|| {
                let mount = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok();
                let mount = mount.filter(|found| found.stx_mask & StatxFlags::MNT_ID.bits() != 0);
                let device = mount.and_then(|mount| {
                    self.mounts
                        .get_or_init(mounts)
                        .get(&mount.stx_mnt_id)
                        .copied()
                });
                device.unwrap_or_else(|| (major(found.dev()), minor(found.dev())))
            });
        ListedFile {
            device,
            inode: found.ino(),
        }
    }
}

/// Reads /proc/locks a page at a time, which is the most that the kernel returns at once. Between
/// two reads a change of the table can hide a line or repeat one, and `fs::read_to_string` begins
/// with reads of 32 bytes.
fn read_table_text() -> io::Result<String> {
    /// The largest page of any system.
    const PAGE: usize = 1 << 16;
    let mut file = fs::File::open("/proc/locks")?;
    let (mut bytes, mut length) = (Vec::new(), 0);
    loop {
        bytes.resize(length + PAGE, 0);
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
}

/// Returns the devices of the file systems, by the id of the mount.
fn mounts() -> HashMap<u64, Device> {
    let list = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let read = |line: &str| {
        let mut words = line.split(' ');
        let mount = words.next()?.parse().ok()?;
        let (major, minor) = words.nth(1)?.split_once(':')?;
        Some((mount, (major.parse().ok()?, minor.parse().ok()?)))
    };
    String::from_utf8_lossy(&list)
        .lines()
        .filter_map(read)
        .collect()
}

/// Returns the locks that a descriptor holds.
fn read_info(directory: &OwnedFd, number: &CStr) -> Option<Vec<Entry>> {
    // The buffer usually suffices, and one read costs half as much as reading up to the end.
    let mut bytes = [0; 1024];
    let mut file = fs::File::from(openat(directory, number, OFlags::CLOEXEC, Mode::empty()).ok()?);
    let length = file.read(&mut bytes).ok()?;
    let mut text = String::from_utf8_lossy(&bytes[..length]).into_owned();
    if length == bytes.len() {
        file.read_to_string(&mut text).ok()?;
    }
    Some(
        text.lines()
            .filter_map(|line| parse(line.strip_prefix("lock:")?))
            .collect(),
    )
}

/// Returns how many waiters the locks on one file have. The kernel outputs its table a page at a
/// time. If the table changes in between, a line of one page may be repeated on the next. So only
/// the longest queue of each holder counts.
fn waiters(entries: &[&Entry]) -> u32 {
    let mut longest: BTreeMap<u32, u32> = BTreeMap::new();
    let (mut holder, mut queue) = (0, 0);
    for entry in entries {
        match entry.waits {
            true => queue += 1,
            false => (holder, queue) = (entry.pid, 0),
        }
        let most = longest.entry(holder).or_default();
        *most = queue.max(*most);
    }
    longest.values().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: ListedFile = ListedFile {
        device: (0xfe, 0),
        inode: 131,
    };

    #[test]
    fn parse_proc_locks_line_separates_holder_and_waiter() {
        let held = Entry {
            mechanism: Mechanism::Flock,
            waits: false,
            pid: 42,
            file: FILE,
        };
        assert_eq!(
            parse("1: FLOCK  ADVISORY  WRITE 42 fe:00:131 0 EOF"),
            Some(held)
        );
        assert!(
            parse("1: -> FLOCK  ADVISORY  READ 42 fe:00:131 0 EOF")
                .unwrap()
                .waits
        );
        assert_eq!(
            parse("2: FLOCK  ADVISORY  WRITE -1 fe:00:131 0 EOF")
                .unwrap()
                .pid,
            0
        );
        let posix = Entry {
            mechanism: Mechanism::Fcntl,
            ..held
        };
        assert_eq!(
            parse("3: POSIX  ADVISORY  WRITE 42 fe:00:131 1073741826 1073742335"),
            Some(posix)
        );
        assert_eq!(
            parse("4: OFDLCK ADVISORY  READ  -1 fe:00:131 0 0"),
            Some(Entry { pid: 0, ..posix })
        );
        assert_eq!(parse("5: LEASE  ACTIVE    READ 42 fe:00:131 0 EOF"), None);
        assert_eq!(parse("1: FLOCK"), None);
        assert_eq!(parse("1: FLOCK ADVISORY WRITE 42 fe:00 0 EOF"), None);
    }

    #[test]
    fn waiters_counts_repeated_process_once() {
        let table = "1: FLOCK  ADVISORY  READ 42 fe:00:131 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 7 fe:00:131 0 EOF\n\
                     2: FLOCK  ADVISORY  READ 43 fe:00:131 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 8 fe:00:131 0 EOF\n\
                     3: FLOCK  ADVISORY  READ 42 fe:00:131 0 EOF\n3: -> FLOCK  ADVISORY  WRITE 7 fe:00:131 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 9 fe:00:131 0 EOF";
        let entries: Vec<_> = table.lines().filter_map(parse).collect();
        assert_eq!(waiters(&entries.iter().collect::<Vec<_>>()), 3);
        assert_eq!(waiters(&[]), 0);
    }

    #[test]
    fn holders_exclude_process_that_passed_its_lock_on() {
        let entry = |pid| Entry {
            mechanism: Mechanism::Flock,
            waits: false,
            pid,
            file: FILE,
        };
        let mut locks = FileLocks {
            table: HashMap::from([(FILE, vec![entry(7)])]),
            ..FileLocks::default()
        };
        assert_eq!(locks.locks_on(FILE).flock.unwrap().pids, [7]);
        locks.inspected.insert(7);
        assert!(locks.locks_on(FILE).flock.unwrap().pids.is_empty());
        locks.holders.insert((FILE, Mechanism::Flock), vec![8]);
        assert_eq!(locks.locks_on(FILE).flock.unwrap().pids, [8]);
        assert_eq!(locks.locks_on(FILE).fcntl, None);
    }
}
