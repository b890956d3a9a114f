//! What stands in a pidfile.
//!
//! ```text
//! 4242
//! lockkit 1
//! start 181264
//! boot 5e1bd5a2c4c94f0cbd2cf1c9f6dd4c8c
//! namespace 4026531836
//! host web1/0ad4f2d6a0e94a5c8e2b9d0c4a2f6b11
//! program backup
//! acquired 1795194191.048576000 (2026-11-20 17:03:11 UTC)
//! ```
//! The first line is all that other programs read. It follows the [Filesystem Hierarchy Standard], 3.15.2: a reader
//! ignores spaces around the pid, leading zeros, a missing newline and further lines. Nothing else may stand there. The
//! second line tells a record of lockkit from what another program writes, and names the format. Behind it stands who
//! the owner is ([`lines`]).
//!
//! [Filesystem Hierarchy Standard]: https://refspecs.linuxfoundation.org/FHS_3.0/fhs/ch03s15.html

use crate::lines;
use crate::owner::Owner;
use crate::sys::process;

/// As much of a file is read. What is longer is no pidfile.
pub(super) const MOST_READ: usize = 4096;

const MARK: &str = "lockkit 1";

/// What a released file says that could not be removed. No half of a pid looks like it.
pub(super) const BLANK: &str = "\n";

/// What a file was found to say.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// A line without anything: nobody's, and nobody's who is in the middle of writing.
    Blank,
    /// A record of lockkit's.
    Ours(Box<Owner>),
    /// Another program's: a pid.
    Foreign(u32),
    /// Neither; the rule that it breaks.
    Invalid(&'static str),
}

/// Reads what a file says. Give it a byte more than [`MOST_READ`] if there is one.
pub(super) fn parse(bytes: &[u8]) -> Content {
    if bytes.len() > MOST_READ {
        return Content::Invalid("it is longer than 4096 bytes");
    }
    if bytes.is_empty() {
        return Content::Invalid("it is empty");
    }
    let end = bytes.iter().position(|byte| *byte == b'\n');
    let first = bytes[..end.unwrap_or(bytes.len())].trim_ascii();
    if first.is_empty() {
        return Content::Blank;
    }
    let pid = match pid(first) {
        Ok(pid) => pid,
        Err(rule) => return Content::Invalid(rule),
    };
    let rest = String::from_utf8_lossy(&bytes[end.map_or(bytes.len(), |end| end + 1)..]);
    let mut lines = rest.lines();
    match lines.next() {
        Some(MARK) => Content::Ours(Box::new(lines::read(pid, lines))),
        _ => Content::Foreign(pid),
    }
}

fn pid(text: &[u8]) -> Result<u32, &'static str> {
    if !text.iter().all(u8::is_ascii_digit) {
        return Err("a pid consists of decimal digits");
    }
    let beyond = "no process has a pid so large";
    let pid = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or(beyond)?;
    match pid {
        0 => Err("no process has the pid 0"),
        1..=process::MOST_PID => Ok(pid),
        _ => Err(beyond),
    }
}

/// The record of `owner`.
pub(super) fn write(owner: &Owner) -> String {
    let mut text = format!("{}\n{MARK}\n", owner.pid);
    lines::write(owner, &mut text);
    text
}

/// The beginning of the first line, for people.
pub(super) fn shown(bytes: &[u8]) -> String {
    const MOST_SHOWN: usize = 40;
    let first = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let cut = String::from_utf8_lossy(&first[..first.len().min(MOST_SHOWN)]).escape_debug().to_string();
    if first.len() > MOST_SHOWN { cut + "..." } else { cut }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        let mut owner = Owner::current();
        owner.acquired = Some(SystemTime::now());
        assert_eq!(parse(write(&owner).as_bytes()), Content::Ours(Box::new(owner)));
    }

    #[test]
    fn the_first_line_is_the_pid_and_nothing_else() {
        let text = write(&Owner::current());
        assert_eq!(text.lines().next(), Some(&*std::process::id().to_string()));
        assert!(text.ends_with('\n') && text.len() < MOST_READ);
    }

    #[test]
    fn a_damaged_line_leaves_its_field_unknown_and_an_unknown_one_is_passed_over() {
        let text = "7\nlockkit 1\nstart x\nflavour sour\nboot\nnamespace 12\nacquired 1.x\n\nprogram a b\n";
        let Content::Ours(owner) = parse(text.as_bytes()) else { panic!("a record") };
        assert_eq!((owner.pid, owner.start, owner.boot, owner.namespace), (7, None, None, Some(12)));
        assert_eq!((owner.acquired, owner.program()), (None, Some("a b")));
    }

    #[test]
    fn a_program_name_cannot_forge_a_line() {
        let mut owner = Owner::current();
        owner.program = Some(format!("a\nstart 1\n{}", "b".repeat(5000)));
        let Content::Ours(read) = parse(write(&owner).as_bytes()) else { panic!("a record") };
        assert_eq!(read.start, owner.start);
        assert!(read.program().unwrap().starts_with("a?start 1?bbb"));
    }

    #[test]
    fn a_bare_pid_is_read_as_the_standard_has_it() {
        for (text, pid) in [
            ("1", 1),
            ("1\n", 1),
            ("4242\n", 4242),
            ("  4242\n", 4242),
            ("00042 \r\n", 42),
            ("42\n/var/lib/postgresql\n1700000000\n", 42),
        ] {
            assert_eq!(parse(text.as_bytes()), Content::Foreign(pid), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_pid_is_invalid_with_the_rule_it_breaks() {
        let long = "1".repeat(40);
        let [highest, beyond] = [process::MOST_PID, process::MOST_PID + 1].map(|pid| pid.to_string());
        assert_eq!(parse(highest.as_bytes()), Content::Foreign(process::MOST_PID));
        let longer = format!("1\n{}", " ".repeat(MOST_READ));
        for (text, rule) in [
            ("", "empty"),
            ("-1", "digits"),
            ("+1", "digits"),
            ("a", "digits"),
            ("0x1", "digits"),
            ("1_0", "digits"),
            ("12 x", "digits"),
            ("1 2", "digits"),
            ("\0\0\0\0\n", "digits"),
            ("\u{665}", "digits"),
            ("0", "pid 0"),
            ("000\n", "pid 0"),
            (&beyond, "so large"),
            ("4294967297\n", "so large"),
            (&long, "so large"),
            (&longer, "longer than"),
        ] {
            let Content::Invalid(broken) = parse(text.as_bytes()) else { panic!("{text:?} is valid") };
            assert!(broken.contains(rule), "{text:?}: {broken}");
        }
        assert_eq!(parse(b"\n"), Content::Blank);
        assert_eq!(parse(b" \n12\n"), Content::Blank);
    }

    #[test]
    fn what_is_shown_is_short_and_harmless() {
        assert_eq!(shown(b"12\x1b[2J x\nrest"), "12\\u{1b}[2J x");
        assert!(shown(&[0xff; 9000]).len() < 200);
    }
}
