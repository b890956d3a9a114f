//! Whether a uid means one user.
//!
//! In a user namespace the kernel shows every user that the namespace does not map as one number,
//! the overflow uid ([user_namespaces(7)], "Unmapped user and group IDs"). A process with that uid
//! cannot distinguish its own user from those users by the number.
//!
//! [user_namespaces(7)]: https://man7.org/linux/man-pages/man7/user_namespaces.7.html

use std::fs;
use std::sync::OnceLock;

/// Whether the uid means one user in this process's user namespace. An unreadable map counts as no.
pub(crate) fn is_one(uid: u32) -> bool {
    uid != overflow_uid() || maps_all(&fs::read_to_string("/proc/self/uid_map").unwrap_or_default())
}

/// Reads the overflow uid once: root sets another one when the system starts, if at all.
fn overflow_uid() -> u32 {
    /// `DEFAULT_OVERFLOWUID`, for a process without /proc.
    const DEFAULT: u32 = 65_534;
    static READ: OnceLock<u32> = OnceLock::new();
    let read = || {
        fs::read_to_string("/proc/sys/kernel/overflowuid")
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    READ.get()
        .copied()
        .or_else(|| read().map(|uid| *READ.get_or_init(|| uid)))
        .unwrap_or(DEFAULT)
}

/// Whether a map contains every uid: all but the highest number, which is no uid.
fn maps_all(map: &str) -> bool {
    let count = |line: &str| line.split_ascii_whitespace().nth(2)?.parse::<u64>().ok();
    map.lines().filter_map(count).sum::<u64>() >= u64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_without_all_uids_is_incomplete() {
        assert!(maps_all("         0          0 4294967295\n"));
        assert!(maps_all("0 0 1000\n1000 1000 4294966295\n"));
        assert!(!maps_all("0 100000 65536\n"));
        assert!(!maps_all(""));
        assert!(!maps_all("0 0 4294967294\n"));
    }

    #[test]
    fn ordinary_uid_is_one_user() {
        assert!(is_one(1000));
    }
}
