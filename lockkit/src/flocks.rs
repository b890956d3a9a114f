//! Which file locks the kernel has, and whose: what [`FileLock`](crate::FileLock) tells of its holders.
//!
//! The kernel lists each flock(2) lock twice: in [proc_locks(5)] by file system and inode, with the process that took
//! it and those that wait, and in [proc_pid_fdinfo(5)] for each descriptor through which it is held. The second tells
//! which processes keep a lock, also one that they inherited, and by its link the path; the first knows the waiters,
//! and processes of other users, whose descriptors are theirs to see.
//!
//! Nothing is locked or opened for this but files of /proc, so nobody is disturbed.
//!
//! [proc_locks(5)]: https://man7.org/linux/man-pages/man5/proc_locks.5.html
//! [proc_pid_fdinfo(5)]: https://man7.org/linux/man-pages/man5/proc_pid_fdinfo.5.html

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A file with a flock on it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Locked {
    /// The processes that keep it, or at least the one that took it.
    pub(crate) pids: Vec<u32>,
    /// How many wait for it.
    pub(crate) waiters: u32,
}

/// A lock as a line of the kernel's shows it.
#[derive(Debug, PartialEq, Eq)]
struct Entry<'l> {
    /// Whether it is still waited for.
    waits: bool,
    pid: u32,
    /// The file as the kernel names it: device and inode.
    file: &'l str,
}

/// Reads `1: FLOCK  ADVISORY  WRITE 4242 fe:00:131 0 EOF`, with `->` behind the number where it is waited for.
fn parse(line: &str) -> Option<Entry<'_>> {
    let mut words = line.split_ascii_whitespace().skip(1).peekable();
    let waits = words.next_if_eq(&"->").is_some();
    (words.next()? == "FLOCK").then_some(())?;
    let mut words = words.skip(2);
    // One of a process that another pid namespace hides is 0 or -1.
    let pid = words.next()?.parse().unwrap_or_default();
    Some(Entry { waits, pid, file: words.next()? })
}

/// The file with these numbers, as the kernel names it.
fn kernel_name(device: u64, inode: u64) -> String {
    format!("{:02x}:{:02x}:{inode}", rustix::fs::major(device), rustix::fs::minor(device))
}

/// The locks on the file at `path`, or `None` when there are none.
pub(crate) fn on(path: &Path) -> std::io::Result<Option<Locked>> {
    let wanted = fs::metadata(path)?;
    let table = fs::read_to_string("/proc/locks").unwrap_or_default();
    let mut file = kernel_name(wanted.dev(), wanted.ino());
    let mut locked = Locked::default();
    let mut found = false;
    for held in descriptors() {
        // Asked of the link, so that it is the right file also where the kernel numbers devices in another way.
        if fs::metadata(&held.link).is_ok_and(|seen| (seen.dev(), seen.ino()) == (wanted.dev(), wanted.ino())) {
            found = true;
            file = held.file;
            locked.pids.push(held.pid);
        }
    }
    let entries: Vec<_> = table.lines().filter_map(parse).filter(|entry| entry.file == file).collect();
    if let Some(first) = entries.iter().find(|entry| !entry.waits) {
        found = true;
        if locked.pids.is_empty() && first.pid != 0 {
            locked.pids.push(first.pid);
        }
    }
    locked.waiters = waiters(&entries);
    locked.pids.sort_unstable();
    locked.pids.dedup();
    Ok(found.then_some(locked))
}

/// How many wait behind the locks on one file. The kernel shows its table a page at a time, and what stood on one page may
/// come again on the next when the table has changed in between; so of each holder only the longest queue counts.
fn waiters(entries: &[Entry<'_>]) -> u32 {
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

/// The paths of all files that processes which this one may look at keep locked.
pub(crate) fn paths() -> Vec<PathBuf> {
    let named = |held: Held| {
        let path = fs::read_link(&held.link).ok()?;
        // A deleted file's link says so behind its path, and leads nowhere by that.
        let (there, seen) = (fs::metadata(&path).ok()?, fs::metadata(&held.link).ok()?);
        ((there.dev(), there.ino()) == (seen.dev(), seen.ino())).then_some(path)
    };
    let mut paths: Vec<_> = descriptors().filter_map(named).collect();
    paths.sort_unstable();
    paths.dedup();
    paths
}

/// A descriptor through which a lock is held.
struct Held {
    pid: u32,
    link: PathBuf,
    /// As [`Entry::file`].
    file: String,
}

fn descriptors() -> impl Iterator<Item = Held> {
    let processes =
        fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    processes.filter_map(|name| name.parse::<u32>().ok()).flat_map(|pid| {
        let open = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten();
        open.filter_map(move |entry| {
            let number = entry.ok()?.file_name().into_string().ok()?;
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
            let file = info.lines().filter_map(|line| parse(line.strip_prefix("lock:")?)).next()?.file.to_owned();
            Some(Held { pid, link: format!("/proc/{pid}/fd/{number}").into(), file })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_who_holds_and_who_waits() {
        let held = Entry { waits: false, pid: 42, file: "fe:00:131" };
        assert_eq!(parse("1: FLOCK  ADVISORY  WRITE 42 fe:00:131 0 EOF"), Some(held));
        assert!(parse("1: -> FLOCK  ADVISORY  READ 42 fe:00:131 0 EOF").unwrap().waits);
        assert_eq!(parse("2: FLOCK  ADVISORY  WRITE -1 fe:00:131 0 EOF").unwrap().pid, 0);
        assert_eq!(parse("4: OFDLCK ADVISORY  WRITE -1 00:1b:1181278 4096 4096"), None);
        assert_eq!(parse("1: FLOCK"), None);
    }

    #[test]
    fn who_is_shown_twice_counts_once() {
        let table = "1: FLOCK  ADVISORY  READ 42 fe:00:131 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 7 fe:00:131 0 EOF\n\
                     2: FLOCK  ADVISORY  READ 43 fe:00:131 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 8 fe:00:131 0 EOF\n\
                     3: FLOCK  ADVISORY  READ 42 fe:00:131 0 EOF\n3: -> FLOCK  ADVISORY  WRITE 7 fe:00:131 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 9 fe:00:131 0 EOF";
        let entries: Vec<_> = table.lines().filter_map(parse).collect();
        assert_eq!(waiters(&entries), 3);
        assert_eq!(waiters(&[]), 0);
    }
}
