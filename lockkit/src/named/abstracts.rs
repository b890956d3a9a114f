//! Which abstract sockets there are, as [proc_net(5)] lists them in `unix`: who holds what, for people.
//!
//! [proc_net(5)]: https://man7.org/linux/man-pages/man5/proc_pid_net.5.html

use crate::error::{Error, Result};

const LIST: &str = "/proc/net/unix";

/// A socket with an abstract name.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Abstract {
    pub(super) name: String,
    /// Whether it is the far end of a connection that nobody has accepted yet; else it is the one that has the name.
    pub(super) queued: bool,
}

/// All of this network namespace.
pub(super) fn all() -> Result<Vec<Abstract>> {
    // Others' names may be any bytes.
    let list = std::fs::read(LIST).map_err(|error| Error::io("read", LIST, error))?;
    Ok(String::from_utf8_lossy(&list).lines().filter_map(parse).collect())
}

/// Reads `0000000000000000: 00000002 00000000 00010000 0005 01 12345 @name`.
fn parse(line: &str) -> Option<Abstract> {
    /// `SS_CONNECTING`, which the kernel says of a connection that waits to be accepted.
    const CONNECTING: &str = "02";
    let mut words = line.split_ascii_whitespace();
    let state = words.nth(5)?;
    let name = words.nth(1)?.strip_prefix('@')?.to_owned();
    Some(Abstract { name, queued: state == CONNECTING })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_the_holder_from_who_waits() {
        let line = |state| format!("0000000000000000: 00000002 00000000 00010000 0005 {state} 12345 @lockkit/u0/a");
        assert_eq!(parse(&line("01")), Some(Abstract { name: "lockkit/u0/a".into(), queued: false }));
        assert!(parse(&line("02")).unwrap().queued);
        assert_eq!(parse("0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/x"), None);
        assert_eq!(parse("Num       RefCount Protocol Flags    Type St Inode Path"), None);
    }
}
