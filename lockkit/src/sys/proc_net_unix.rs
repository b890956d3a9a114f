//! Lists abstract sockets and the connections that wait at them.
//!
//! The kernel answers by netlink (see [`unix_diag`]), where the number of waiters is exact. Where
//! netlink is forbidden, [proc_net(5)] lists the same sockets in `unix`, without the users and
//! without the current state of a connection.
//!
//! [proc_net(5)]: https://man7.org/linux/man-pages/man5/proc_pid_net.5.html

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::unix_diag::{self, CLOSE, ESTABLISHED, LISTEN, Socket};

/// The list that is read where netlink is forbidden.
pub(crate) const LIST: &str = "/proc/net/unix";
/// `SOCK_SEQPACKET`.
const SEQPACKET: u8 = 5;

/// The sockets of this network namespace.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// The sockets that have an abstract name, by the name.
    bound: BTreeMap<String, Queue>,
    /// The connections that may be waiters, by inode.
    connections: HashMap<u32, Connection>,
}

/// The connections that wait to be accepted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Queue {
    /// The inodes of the connections, 0 for a connection whose other end is closed.
    Known(Vec<u32>),
    /// At most this many connections.
    Counted(u32),
}

#[derive(Debug)]
struct Connection {
    uid: Option<u32>,
    /// A waiter sends its record; a process that only asks for the owner sends nothing.
    has_announced: bool,
}

impl Sockets {
    pub(crate) fn read() -> io::Result<Self> {
        match unix_diag::dump() {
            Ok(sockets) => Ok(Self::of(sockets)),
            // The names of foreign sockets may be any bytes.
            Err(_) => std::fs::read(LIST).map(|list| Self::parse(&String::from_utf8_lossy(&list))),
        }
    }

    fn of(sockets: Vec<Socket>) -> Self {
        let mut found = Self::default();
        for socket in sockets
            .into_iter()
            .filter(|socket| socket.kind == SEQPACKET)
        {
            if socket.state == ESTABLISHED {
                let connection = Connection {
                    uid: socket.uid,
                    has_announced: socket.unread > 0,
                };
                found.connections.insert(socket.inode, connection);
            } else if [LISTEN, CLOSE].contains(&socket.state) {
                let name = socket
                    .name
                    .strip_prefix(b"\0")
                    .and_then(|name| String::from_utf8(name.to_vec()).ok());
                // The kernel does not report an empty queue.
                let queue = match socket.queue {
                    None if socket.waiting > 0 => Queue::Counted(socket.waiting),
                    known => Queue::Known(known.unwrap_or_default()),
                };
                found.bound.extend(name.map(|name| (name, queue)));
            }
        }
        found
    }

    fn parse(list: &str) -> Self {
        let mut found = Self::default();
        for line in list.lines().filter_map(parse) {
            match found.bound.entry(line.name).or_insert(Queue::Counted(0)) {
                Queue::Counted(count) if line.queued => *count += 1,
                _ => {}
            }
        }
        found
    }

    /// Returns the sockets that have an abstract name.
    pub(crate) fn bound(&self) -> impl Iterator<Item = (&str, &Queue)> {
        self.bound
            .iter()
            .map(|(name, queue)| (name.as_str(), queue))
    }

    pub(crate) fn at(&self, name: &str) -> Option<&Queue> {
        self.bound.get(name)
    }

    /// Returns how many connections in the queue are waiters, of `user` if the lock belongs to one
    /// user.
    pub(crate) fn waiters(&self, queue: &Queue, user: Option<u32>) -> u32 {
        match queue {
            Queue::Counted(count) => *count,
            Queue::Known(inodes) => {
                let is_of = |uid: Option<u32>| uid.is_none() || user.is_none() || uid == user;
                let waits =
                    |connection: &&Connection| connection.has_announced && is_of(connection.uid);
                inodes
                    .iter()
                    .filter_map(|inode| self.connections.get(inode))
                    .filter(waits)
                    .count() as u32
            }
        }
    }
}

/// A socket with an abstract name.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    name: String,
    /// Whether it is the far end of a connection that is not accepted yet; otherwise it is the
    /// socket that has the name.
    queued: bool,
}

/// Reads `0000000000000000: 00000002 00000000 00010000 0005 01 12345 @name`.
fn parse(line: &str) -> Option<Line> {
    /// `SS_CONNECTING`, the state that the kernel reports for a connection that waits to be
    /// accepted.
    const CONNECTING: &str = "02";
    let mut words = line.split_ascii_whitespace().skip(4);
    let kind = u8::from_str_radix(words.next()?, 16).ok()?;
    let state = words.next()?;
    let name = words.nth(1)?.strip_prefix('@')?.to_owned();
    (kind == SEQPACKET).then(|| Line {
        name,
        queued: state == CONNECTING,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_proc_net_unix_line_separates_holder_and_waiters() {
        let line = |state| {
            format!("0000000000000000: 00000002 00000000 00010000 0005 {state} 12345 @lockkit/u0/a")
        };
        assert_eq!(
            parse(&line("01")),
            Some(Line {
                name: "lockkit/u0/a".into(),
                queued: false
            })
        );
        assert!(parse(&line("02")).unwrap().queued);
        assert_eq!(
            parse("0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/x"),
            None
        );
        assert_eq!(
            parse("0000000000000000: 00000002 00000000 00010000 0001 01 12345 @lockkit/u0/a"),
            None
        );
        assert_eq!(
            parse("Num       RefCount Protocol Flags    Type St Inode Path"),
            None
        );
        let list = [line("01"), line("02"), line("02")].join("\n");
        let sockets = Sockets::parse(&list);
        assert_eq!(
            sockets.waiters(sockets.at("lockkit/u0/a").unwrap(), Some(0)),
            2
        );
    }
}
