//! Which locks on files the kernel has, and which processes hold them.
//!
//! The kernel lists each lock twice: in [proc_locks(5)] by file system and inode, with the process that took the lock
//! and those that wait for it, and in [proc_pid_fdinfo(5)] for each descriptor through which the lock is held. The
//! second list names the processes that keep a lock, also an inherited one, and by its link the path. The first list
//! has the waiters, and the locks of processes whose descriptors this process may not see.
//!
//! [`FileLocks::read`] reads both lists once, so a caller with many paths pays for one pass over /proc. It opens and
//! locks nothing but files of /proc, so it disturbs no process. (A process that closes any descriptor of a file loses
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

use crate::owner::Owner;
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, StatxFlags, major, minor, open, openat, readlinkat, statat, statx};

/// How a process locks a file. Locks of one mechanism do not exclude those of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mechanism {
    /// flock(2), on the whole file.
    Flock,
    /// fcntl(2), on any range of bytes: `F_SETLK` (POSIX, also lockf(3)) and `F_OFD_SETLK`.
    Fcntl,
}

/// The locks of one mechanism on one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locked {
    /// The processes that hold them, as far as they are known.
    pub pids: Vec<u32>,
    /// How many wait in the kernel.
    pub waiters: u32,
}

/// The locks on one file; `None` for a mechanism by which it is not locked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OnFile {
    /// Those of flock(2).
    pub flock: Option<Locked>,
    /// Those of fcntl(2).
    pub fcntl: Option<Locked>,
}

/// The locks on files as they were at one moment.
#[derive(Debug, Default)]
pub struct FileLocks {
    /// The lines of /proc/locks.
    table: HashMap<FileId, Vec<Entry>>,
    /// The processes with a descriptor that holds a lock.
    holders: HashMap<(FileId, Mechanism), Vec<u32>>,
    /// The files of those descriptors: the path by the link, and the device and inode by stat(2). The path is text: a
    /// comparison of paths goes part by part and is slow.
    files: BTreeMap<OsString, Identity>,
    /// What the kernel's lists call the files of those descriptors.
    ids: HashMap<Identity, FileId>,
    /// The processes whose descriptors were read.
    seen: HashSet<u32>,
    /// The files that certain processes have open.
    open: Vec<PathBuf>,
    /// Why /proc/locks could not be read.
    unread: Option<io::Error>,
    mounts: OnceCell<HashMap<u64, Device>>,
    /// The device of the file system by that of stat(2).
    devices: RefCell<HashMap<u64, Device>>,
    owners: RefCell<HashMap<u32, Option<Owner>>>,
}

/// The major and the minor number.
type Device = (u32, u32);

/// Device and inode by stat(2).
type Identity = (u64, u64);

/// A file as the kernel's lists name it. The device is that of the file system, which stat(2) shows otherwise on Btrfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FileId {
    device: Device,
    inode: u64,
}

/// A lock as a line of the kernel's lists shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    mechanism: Mechanism,
    /// Whether it is still waited for.
    waits: bool,
    /// The process that took it; 0 for an `F_OFD_SETLK` lock and for a process that a pid namespace hides.
    pid: u32,
    file: FileId,
}

/// Reads `1: FLOCK  ADVISORY  WRITE 4242 fe:00:131 0 EOF`, with `->` behind the number where it is waited for.
fn parse(line: &str) -> Option<Entry> {
    let mut words = line.split_ascii_whitespace().skip(1).peekable();
    let waits = words.next_if_eq(&"->").is_some();
    let mechanism = match words.next()? {
        "FLOCK" => Mechanism::Flock,
        "POSIX" | "OFDLCK" => Mechanism::Fcntl,
        // A LEASE or a DELEG is the kernel's promise to tell of an open(2), not a lock.
        _ => return None,
    };
    let mut words = words.skip(2);
    let pid = words.next()?.parse().unwrap_or_default();
    let mut file = words.next()?.split(':');
    let mut number = |radix| u64::from_str_radix(file.next()?, radix).ok();
    let device = (u32::try_from(number(16)?).ok()?, u32::try_from(number(16)?).ok()?);
    Some(Entry { mechanism, waits, pid, file: FileId { device, inode: number(10)? } })
}

impl FileLocks {
    /// Reads all locks on files. Also notes which files are open in processes that are called `keeper`.
    pub fn read(keeper: &str) -> Self {
        let mut locks = Self::of_table();
        locks.seen.clear();
        let processes =
            fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        for pid in processes.filter_map(|name| name.parse::<u32>().ok()) {
            locks.read_process(pid, keeper);
        }
        locks
    }

    /// As [`read`](Self::read), of /proc/locks alone, in microseconds. The holder is then the process that took the lock,
    /// which may have passed it on to another, and no paths are known.
    pub fn of_table() -> Self {
        let mut locks = Self::default();
        // Read in one piece: what changes between two reads can show a line twice or not at all.
        match fs::read_to_string("/proc/locks") {
            Ok(table) => {
                for entry in table.lines().filter_map(parse) {
                    locks.table.entry(entry.file).or_default().push(entry);
                }
            }
            Err(error) => locks.unread = Some(error),
        }
        locks
    }

    fn read_process(&mut self, pid: u32, keeper: &str) {
        let directory = |name| open(format!("/proc/{pid}/{name}"), OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        // Names below them are found in half the time that whole paths take.
        let (Ok(links), Ok(infos)) = (directory("fd"), directory("fdinfo")) else { return };
        let Ok(descriptors) = Dir::read_from(&links) else { return };
        self.seen.insert(pid);
        let is_keeper = !keeper.is_empty()
            && fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == keeper);
        for descriptor in descriptors.flatten() {
            let number = descriptor.file_name();
            // Those of sockets, pipes and the like are no paths, and far the most in some processes.
            let path = readlinkat(&links, number, Vec::new()).ok().map(|path| OsString::from_vec(path.into_bytes()));
            let Some(path) = path.filter(|path| path.as_bytes().starts_with(b"/")) else { continue };
            let Some(entries) = read_info(&infos, number) else { continue };
            let Some(first) = entries.first() else {
                if is_keeper {
                    self.open.push(path.into());
                }
                continue;
            };
            // By the link, for the path may lead to another file in this mount namespace.
            if let Ok(found) = statat(&links, number, AtFlags::empty()) {
                let identity = (found.st_dev, found.st_ino);
                self.ids.insert(identity, first.file);
                self.files.insert(path, identity);
            }
            for entry in entries {
                let holders = self.holders.entry((entry.file, entry.mechanism)).or_default();
                if holders.last() != Some(&pid) {
                    holders.push(pid);
                }
            }
        }
    }

    /// Why the kernel's table of locks could not be read: then a file that is not locked by it may be locked all the same.
    pub fn unread(&self) -> Option<&io::Error> {
        self.unread.as_ref()
    }

    /// The locked files of the processes that this one may look at, by path. A deleted file is not among them, nor one
    /// whose path leads elsewhere in this mount namespace.
    pub fn files(&self) -> impl Iterator<Item = (&Path, OnFile)> {
        self.files.iter().filter_map(|(path, identity)| {
            let path = Path::new(path);
            let found = fs::metadata(path).ok()?;
            ((found.dev(), found.ino()) == *identity).then(|| (path, self.on_id(self.ids[identity])))
        })
    }

    /// The files without a lock that the processes called `keeper` have open.
    pub fn open(&self) -> &[PathBuf] {
        &self.open
    }

    /// The process with this pid, which is looked up once; `None` when it has ended.
    pub fn owner(&self, pid: u32) -> Option<Owner> {
        self.owners.borrow_mut().entry(pid).or_insert_with(|| Owner::of(pid)).clone()
    }

    /// The locks on the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn on(&self, path: &Path) -> io::Result<OnFile> {
        let found = fs::metadata(path)?;
        let id = self.ids.get(&(found.dev(), found.ino())).copied();
        Ok(self.on_id(id.unwrap_or_else(|| self.id_of(path, &found))))
    }

    fn on_id(&self, id: FileId) -> OnFile {
        OnFile { flock: self.by(Mechanism::Flock, id), fcntl: self.by(Mechanism::Fcntl, id) }
    }

    fn by(&self, mechanism: Mechanism, id: FileId) -> Option<Locked> {
        let entries = self.table.get(&id).map(Vec::as_slice).unwrap_or_default();
        let entries: Vec<_> = entries.iter().filter(|entry| entry.mechanism == mechanism).collect();
        let holders = self.holders.get(&(id, mechanism)).map(Vec::as_slice).unwrap_or_default();
        if holders.is_empty() && entries.iter().all(|entry| entry.waits) {
            return None;
        }
        // A process whose descriptors were read and that has none with the lock took it for another.
        let took = entries.iter().filter(|entry| !entry.waits && entry.pid != 0).map(|entry| entry.pid);
        let mut pids: Vec<_> = holders.iter().copied().chain(took.filter(|pid| !self.seen.contains(pid))).collect();
        pids.sort_unstable();
        pids.dedup();
        Some(Locked { pids, waiters: waiters(&entries) })
    }

    /// What the kernel's lists call a file: by the device of the file system on which the path is mounted.
    fn id_of(&self, path: &Path, found: &fs::Metadata) -> FileId {
        let device = *self.devices.borrow_mut().entry(found.dev()).or_insert_with(|| {
            let mount = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok();
            let mount = mount.filter(|found| found.stx_mask & StatxFlags::MNT_ID.bits() != 0);
            let device = mount.and_then(|mount| self.mounts.get_or_init(mounts).get(&mount.stx_mnt_id).copied());
            device.unwrap_or_else(|| (major(found.dev()), minor(found.dev())))
        });
        FileId { device, inode: found.ino() }
    }
}

/// The devices of the file systems, by the id of the mount.
fn mounts() -> HashMap<u64, Device> {
    let list = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let read = |line: &str| {
        let mut words = line.split(' ');
        let mount = words.next()?.parse().ok()?;
        let (major, minor) = words.nth(1)?.split_once(':')?;
        Some((mount, (major.parse().ok()?, minor.parse().ok()?)))
    };
    String::from_utf8_lossy(&list).lines().filter_map(read).collect()
}

/// The locks that a descriptor holds.
fn read_info(directory: &OwnedFd, number: &CStr) -> Option<Vec<Entry>> {
    // Mostly it has room for all of it, and one read costs half of what reading up to the end does.
    let mut bytes = [0; 1024];
    let mut file = fs::File::from(openat(directory, number, OFlags::CLOEXEC, Mode::empty()).ok()?);
    let length = file.read(&mut bytes).ok()?;
    let mut text = String::from_utf8_lossy(&bytes[..length]).into_owned();
    if length == bytes.len() {
        file.read_to_string(&mut text).ok()?;
    }
    Some(text.lines().filter_map(|line| parse(line.strip_prefix("lock:")?)).collect())
}

/// How many wait behind the locks on one file. The kernel shows its table a page at a time, and what stood on one page may
/// come again on the next when the table has changed in between; so of each holder only the longest queue counts.
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

    const FILE: FileId = FileId { device: (0xfe, 0), inode: 131 };

    #[test]
    fn parse_proc_locks_line_separates_holder_and_waiter() {
        let held = Entry { mechanism: Mechanism::Flock, waits: false, pid: 42, file: FILE };
        assert_eq!(parse("1: FLOCK  ADVISORY  WRITE 42 fe:00:131 0 EOF"), Some(held));
        assert!(parse("1: -> FLOCK  ADVISORY  READ 42 fe:00:131 0 EOF").unwrap().waits);
        assert_eq!(parse("2: FLOCK  ADVISORY  WRITE -1 fe:00:131 0 EOF").unwrap().pid, 0);
        let posix = Entry { mechanism: Mechanism::Fcntl, ..held };
        assert_eq!(parse("3: POSIX  ADVISORY  WRITE 42 fe:00:131 1073741826 1073742335"), Some(posix));
        assert_eq!(parse("4: OFDLCK ADVISORY  READ  -1 fe:00:131 0 0"), Some(Entry { pid: 0, ..posix }));
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
    fn process_that_passed_its_lock_on_is_no_holder() {
        let entry = |pid| Entry { mechanism: Mechanism::Flock, waits: false, pid, file: FILE };
        let mut locks = FileLocks { table: HashMap::from([(FILE, vec![entry(7)])]), ..FileLocks::default() };
        assert_eq!(locks.on_id(FILE).flock.unwrap().pids, [7]);
        locks.seen.insert(7);
        assert!(locks.on_id(FILE).flock.unwrap().pids.is_empty());
        locks.holders.insert((FILE, Mechanism::Flock), vec![8]);
        assert_eq!(locks.on_id(FILE).flock.unwrap().pids, [8]);
        assert_eq!(locks.on_id(FILE).fcntl, None);
    }
}
