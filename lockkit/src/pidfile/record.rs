//! The content of a pidfile, and the identity of its owner.
//!
//! # Content
//! lockkit writes the pid in decimal and a line end, nothing else. It reads what other programs
//! write ([`parse`]).
//!
//! # Identity
//! The extended attribute [`ATTRIBUTE`] of the file:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | the version of this layout: 1 |
//! | 1 to 4 | pid |
//! | 5 to 12 | start of the process, as [`Owner`] has it |
//! | 13 to 28 | boot |
//! | 29 to 36 | pid namespace |
//! | 37 to 44 | FNV-1a of the host |
//! | 45 to 52 | time of the file's last write (mtime), in nanoseconds since 1970 |
//! | 53 to 63 | the beginning of the program's name, 0 to 11 bytes of UTF-8 |
//!
//! Numbers are little-endian. ext4 keeps an attribute of up to 64 bytes with this name inside an
//! inode of 256 bytes. A longer attribute takes its own block, and makes an acquisition take four
//! times as long.
//!
//! The attribute is valid only for the content for which it was set: for its pid, and for its time.
//! If a program writes its own pid into the file, the attribute becomes invalid, even if the pid
//! happens to be the same.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use crate::base::owner::Owner;
use crate::sys::fnv;
use crate::sys::process;

/// At most this many bytes, and one more, are read. A longer file is no pidfile.
pub(super) const MAX_LENGTH: usize = 4096;

/// The content of a released file that could not be removed. No part of a pid looks like it.
pub(super) const BLANK: &str = "\n";

/// The name of the attribute.
pub(super) const ATTRIBUTE: &str = "user.lockkit";

/// The greatest length of the attribute.
pub(super) const MAX_IDENTITY: usize = 64;

const VERSION: u8 = 1;
const PROGRAM_OFFSET: usize = 53;

/// The parsed content of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Nothing but white space and NULs.
    Blank,
    /// Pids.
    Pids {
        /// In the order of the file, at least one.
        pids: Vec<u32>,
        /// Whether the file contains nothing but one pid, like the files of lockkit.
        is_single: bool,
        /// The host that is named after the pid, if it is not known to be this one.
        foreign_host: Option<String>,
    },
    /// Something else. The value is the rule of pidfiles that it violates.
    Other(&'static str),
}

/// Parses the content of a file. `bytes` has a byte more than [`MAX_LENGTH`] if the file has.
///
/// - White space at the beginning is skipped, line ends included.
/// - A decimal number follows, and after it white space, a NUL or the end.
/// - Further numbers of the line are pids, too, up to the first other word. Further lines count,
///   too, as long as they contain nothing but numbers. A number that cannot be a pid ends the list.
/// - If a host is named with the pid, the process is on that host ([`host_of`]).
/// - A file of four bytes that ends with a NUL is also read as a binary pid, as old UUCP programs
///   write it. Without a number it is not blank.
pub(super) fn parse(bytes: &[u8]) -> Content {
    if bytes.len() > MAX_LENGTH {
        return Content::Other("it is longer than 4096 bytes");
    }
    let Some(begin) = bytes.iter().position(|byte| !is_space(*byte)) else {
        return Content::Blank;
    };
    if bytes.iter().all(|byte| is_space(*byte) || *byte == 0) {
        return match bytes.len() == 4 && !bytes.iter().all(|byte| *byte == 0) {
            true => Content::Other("it may contain a pid in binary, as old UUCP programs write it"),
            false => Content::Blank,
        };
    }
    let text = &bytes[begin..];
    // A C string ends at its NUL, whatever follows in its buffer.
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let lines: Vec<_> = text.split(|byte| *byte == b'\n').map(words).collect();
    let numbers = |words: &[&[u8]]| {
        words
            .iter()
            .map_while(|word| pid(word).ok())
            .collect::<Vec<_>>()
    };
    let mut pids = Vec::new();
    for words in lines.iter().filter(|words| !words.is_empty()) {
        let more = numbers(words);
        let is_whole = more.len() == words.len();
        // After the first line, only lines of nothing but pids count.
        if pids.is_empty() || is_whole {
            pids.extend(more);
        }
        if !is_whole {
            break;
        }
    }
    if pids.is_empty() {
        let first = lines[0].first().copied().unwrap_or_default();
        return Content::Other(pid(first).err().unwrap_or_default());
    }
    let foreign_host = if begin == 0 {
        host_of(&lines).filter(|host| is_foreign(host))
    } else {
        None
    };
    let foreign_host = foreign_host.map(|host| String::from_utf8_lossy(host).into_owned());
    if let [one, two, three, 0] = *bytes {
        let binary = u32::from_ne_bytes([one, two, three, 0]);
        pids.extend((1..=process::MAX_PID).contains(&binary).then_some(binary));
    }
    let is_single = pids.len() == 1 && text.trim_ascii().len() == lines[0][0].len();
    Content::Pids {
        pids,
        is_single,
        foreign_host,
    }
}

/// Returns the host of the process, if the file names one:
/// - After the pid in the only line, as git and shell scripts write it. UUCP programs write their
///   own name there, and blanks before the pid.
/// - In the third line of three or five, after the pid and the program, as QLockFile of Qt writes
///   it.
fn host_of<'t>(lines: &[Vec<&'t [u8]>]) -> Option<&'t [u8]> {
    let end = lines.iter().rposition(|words| !words.is_empty())? + 1;
    match &lines[..end] {
        [only] => match only[..] {
            [_, host] => Some(host),
            _ => None,
        },
        [first, _, third, rest @ ..] if first.len() == 1 && [0, 2].contains(&rest.len()) => {
            match third[..] {
                [host] => Some(host),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Returns whether isspace(3) counts the byte as white space.
fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0x0b
}

fn words(line: &[u8]) -> Vec<&[u8]> {
    line.split(|byte| is_space(*byte))
        .filter(|word| !word.is_empty())
        .collect()
}

fn pid(word: &[u8]) -> Result<u32, &'static str> {
    if word.is_empty() || !word.iter().all(u8::is_ascii_digit) {
        return Err("it must begin with a pid, in decimal digits");
    }
    let beyond = "no process has a pid so large";
    let pid = std::str::from_utf8(word)
        .ok()
        .and_then(|word| word.parse().ok())
        .ok_or(beyond)?;
    match pid {
        0 => Err("no process has the pid 0"),
        1..=process::MAX_PID => Ok(pid),
        _ => Err(beyond),
    }
}

/// Returns whether the word may be the name or the address of another host. A number, a date, an
/// option and a path are not.
fn is_foreign(word: &[u8]) -> bool {
    let is_name = |byte: &u8| {
        byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':') || *byte > 127
    };
    let is_letter = |byte: &u8| byte.is_ascii_alphabetic() || *byte > 127;
    let begins = word
        .first()
        .is_some_and(|first| first.is_ascii_alphanumeric() || *first > 127);
    let may_be_host = begins && word.iter().all(is_name) && word.iter().any(is_letter);
    let is_address = || std::str::from_utf8(word).is_ok_and(|word| word.parse::<IpAddr>().is_ok());
    (may_be_host || is_address()) && !word.eq_ignore_ascii_case(process::host_name().as_bytes())
}

/// Returns the content of the file of the process `pid`.
pub(super) fn content(pid: u32) -> String {
    format!("{pid}\n")
}

/// Returns the identity of `owner`, for a file that was last written at `written`. Returns `None`
/// if the owner is not known completely.
pub(super) fn identity(owner: &Owner, written: SystemTime) -> Option<Vec<u8>> {
    let mut bytes = vec![VERSION];
    bytes.extend(owner.pid.to_le_bytes());
    bytes.extend(owner.start?.to_le_bytes());
    bytes.extend(owner.boot?.to_le_bytes());
    bytes.extend(owner.namespace?.to_le_bytes());
    bytes.extend(fnv::of_bytes(owner.host.as_deref()?.as_bytes()).to_le_bytes());
    bytes.extend(nanos(written)?.to_le_bytes());
    let program = owner.program.as_deref().unwrap_or_default();
    let mut end = program.len().min(MAX_IDENTITY - PROGRAM_OFFSET);
    while !program.is_char_boundary(end) {
        end -= 1;
    }
    bytes.extend(program[..end].bytes());
    Some(bytes)
}

/// Reads an identity that is valid for a file that contains `pid` and was last written at
/// `written`.
pub(super) fn read_identity(bytes: &[u8], pid: u32, written: SystemTime) -> Option<Owner> {
    if bytes.len() > MAX_IDENTITY || *bytes.first()? != VERSION {
        return None;
    }
    let number = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let is_right = bytes.get(1..5)? == pid.to_le_bytes() && number(45)? == nanos(written)?;
    let host = match process::host() {
        Some(host) if fnv::of_bytes(host.as_bytes()) == number(37)? => host.to_owned(),
        // The name of that host is not known here.
        _ => format!("{:016x}", number(37)?),
    };
    let program = std::str::from_utf8(bytes.get(PROGRAM_OFFSET..)?).ok()?;
    let program: String = program
        .chars()
        .map(|letter| if letter.is_control() { '?' } else { letter })
        .collect();
    is_right.then_some(Owner {
        pid,
        start: number(5),
        boot: Some(u128::from_le_bytes(bytes.get(13..29)?.try_into().ok()?)),
        namespace: number(29),
        host: Some(host),
        program: (!program.is_empty()).then_some(program),
        acquired: Some(written),
    })
}

/// Returns whether the identity had no room for the whole name of the program.
pub(super) fn is_program_cut(owner: &Owner) -> bool {
    // A character takes up to four bytes.
    owner
        .program
        .as_ref()
        .is_none_or(|program| program.len() + 4 > MAX_IDENTITY - PROGRAM_OFFSET)
}

fn nanos(moment: SystemTime) -> Option<u64> {
    u64::try_from(
        moment
            .duration_since(SystemTime::UNIX_EPOCH)
            .ok()
            .as_ref()
            .map(Duration::as_nanos)?,
    )
    .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::new(1_795_194_191, 48_576_001)
    }

    fn pids(text: &str) -> Vec<u32> {
        match parse(text.as_bytes()) {
            Content::Pids { pids, .. } => pids,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn identity_read_back_is_the_owner() {
        let mut owner = Owner::current();
        owner.program = Some("backup".to_owned());
        let bytes = identity(&owner, written()).expect("this process knows itself");
        owner.acquired = Some(written());
        assert_eq!(read_identity(&bytes, owner.pid, written()), Some(owner));
    }

    #[test]
    fn identity_of_longest_program_fits_and_is_valid_text() {
        let mut owner = Owner::current();
        for program in [
            "x".repeat(5000),
            "\u{665}".repeat(50),
            "a\nstart 1".to_owned(),
            String::new(),
        ] {
            owner.program = Some(program.clone());
            let bytes = identity(&owner, written()).unwrap();
            assert!(bytes.len() <= MAX_IDENTITY, "{}", bytes.len());
            let read = read_identity(&bytes, owner.pid, written()).unwrap();
            let shown = read.program().unwrap_or_default();
            assert!(
                !shown.contains('\n') && program.replace('\n', "?").starts_with(shown),
                "{shown}"
            );
            assert!(program.len() < 11 || is_program_cut(&read));
        }
    }

    #[test]
    fn identity_of_incomplete_owner_is_none() {
        let complete = Owner::current();
        let without: [fn(&mut Owner); 4] = [
            |owner| owner.start = None,
            |owner| owner.boot = None,
            |owner| owner.namespace = None,
            |owner| owner.host = None,
        ];
        for take in without {
            let mut owner = complete.clone();
            take(&mut owner);
            assert_eq!(identity(&owner, written()), None);
        }
    }

    #[test]
    fn identity_for_other_content_or_damaged_is_ignored() {
        let owner = Owner::current();
        let bytes = identity(&owner, written()).unwrap();
        assert_eq!(read_identity(&bytes, owner.pid + 1, written()), None);
        assert_eq!(
            read_identity(&bytes, owner.pid, written() + Duration::from_micros(1)),
            None
        );
        for end in 0..PROGRAM_OFFSET {
            assert_eq!(
                read_identity(&bytes[..end], owner.pid, written()),
                None,
                "{end} bytes"
            );
        }
        let mut other = bytes.clone();
        other[0] = 2;
        assert_eq!(read_identity(&other, owner.pid, written()), None);
        other = bytes.clone();
        other.resize(MAX_IDENTITY + 1, b'x');
        assert_eq!(read_identity(&other, owner.pid, written()), None);
        other = bytes[..PROGRAM_OFFSET].to_vec();
        other.push(0xff);
        assert_eq!(read_identity(&other, owner.pid, written()), None);
    }

    #[test]
    fn read_identity_of_other_host_differs_from_local() {
        let mut owner = Owner::current();
        owner.host = Some("elsewhere/1".to_owned());
        let bytes = identity(&owner, written()).unwrap();
        let read = read_identity(&bytes, owner.pid, written()).unwrap();
        assert_ne!(read.host(), process::host());
    }

    #[test]
    fn parse_of_one_pid_is_that_pid() {
        for (text, pid) in [
            ("1", 1),
            ("1\n", 1),
            ("4242\n\n\n", 4242),
            ("  4242\n", 4242),
            ("00042 \r\n", 42),
            ("\n\r\n \t\x0c\x0b\n42", 42),
            ("42\0\0\0\0", 42),
        ] {
            let found = parse(text.as_bytes());
            assert_eq!(
                found,
                Content::Pids {
                    pids: vec![pid],
                    is_single: true,
                    foreign_host: None
                },
                "{text:?}"
            );
        }
    }

    #[test]
    fn parse_of_text_behind_the_pid_is_the_pid() {
        for text in [
            "42\n/var/lib/postgresql\n1700000000\n",
            "42 /usr/sbin/sendmail -bd\n",
            "42\tminicom root\n",
        ] {
            let found = parse(text.as_bytes());
            assert_eq!(
                found,
                Content::Pids {
                    pids: vec![42],
                    is_single: false,
                    foreign_host: None
                },
                "{text:?}"
            );
        }
    }

    #[test]
    fn parse_of_several_pids_is_all_up_to_another_word() {
        assert_eq!(pids("1 2 3\n"), [1, 2, 3]);
        assert_eq!(pids("1\n2\n 3 \n"), [1, 2, 3]);
        assert_eq!(pids("1 2\n3\n\n4\n"), [1, 2, 3, 4]);
        assert_eq!(pids("1 2 x 3\n4\n"), [1, 2]);
        assert_eq!(pids("1\n2 3\n4 x\n5\n"), [1, 2, 3]);
        assert_eq!(pids("1\n99999999999\n2\n"), [1]);
        assert_eq!(pids("1 0 2"), [1]);
        assert_eq!(pids("1\0 2"), [1]);
    }

    #[test]
    fn parse_of_pid_and_host_tells_this_host_from_others() {
        let host = |text: &str| match parse(text.as_bytes()) {
            Content::Pids {
                pids, foreign_host, ..
            } => {
                assert_eq!(pids, [42], "{text:?}");
                foreign_host
            }
            other => panic!("{text:?}: {other:?}"),
        };
        for text in [
            "42 elsewhere",
            "42 elsewhere\n",
            "42\nkate\nelsewhere\n",
            "42\na b\nelsewhere\n0f\n1e\n",
        ] {
            assert_eq!(host(text).as_deref(), Some("elsewhere"), "{text:?}");
        }
        for name in ["elsewhere.example.org", "10.0.0.7", "fe80::1", "7up"] {
            assert_eq!(host(&format!("42 {name}")).as_deref(), Some(name));
        }
        let own = process::host_name();
        for name in [own.to_uppercase(), own] {
            assert_eq!(host(&format!("42 {name}")), None);
            assert_eq!(host(&format!("42\nkate\n{name}\n")), None);
        }
        for text in [
            "42 /elsewhere",
            "42 -x",
            "42 two words",
            "42 word\nline",
            "42\nelsewhere",
            "        42 gammu\n",
            "42 2026-01-01\n",
            "42 10:20:30\n",
            "42 12345.67",
            "42\nkate\nelsewhere\nmore\n",
            "42\n/var/lib/postgresql\n1700000000\n",
        ] {
            assert_eq!(host(text), None, "{text:?}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn parse_of_four_bytes_with_nul_is_also_binary() {
        assert_eq!(pids("90\0\0"), [90, 12345]);
        assert_eq!(pids("123\0"), [123, 0x33_3231]);
        for binary in [8224_u32, 10, 8205, 8192] {
            assert!(
                matches!(parse(&binary.to_ne_bytes()), Content::Other(rule) if rule.contains("binary")),
                "{binary}"
            );
        }
    }

    #[test]
    fn parse_of_white_space_and_nuls_is_blank() {
        for text in [
            "",
            "\n",
            " \t\r\n\n",
            "\0\0\0\0",
            "\0\n",
            "\n\0",
            "\n\n\n\0\0",
        ] {
            assert_eq!(parse(text.as_bytes()), Content::Blank, "{text:?}");
        }
    }

    #[test]
    fn parse_of_anything_else_names_the_broken_rule() {
        let long = "1".repeat(40);
        let [highest, beyond] = [process::MAX_PID, process::MAX_PID + 1].map(|pid| pid.to_string());
        assert_eq!(pids(&highest), [process::MAX_PID]);
        let longer = format!("1\n{}", " ".repeat(MAX_LENGTH));
        for (text, rule) in [
            ("-1", "digits"),
            ("+1", "digits"),
            ("a", "digits"),
            ("0x1", "digits"),
            ("1_0", "digits"),
            ("12x", "digits"),
            ("12x 13\n", "digits"),
            ("1.5\n", "digits"),
            ("\u{665}", "digits"),
            ("\u{feff}1\n", "digits"),
            ("\x001\n", "digits"),
            ("user@host.123:456", "digits"),
            ("0", "pid 0"),
            ("000\n", "pid 0"),
            (&beyond, "so large"),
            ("4294967297\n", "so large"),
            (&long, "so large"),
            (&longer, "longer than"),
        ] {
            let Content::Other(broken) = parse(text.as_bytes()) else {
                panic!("{text:?} is a pid")
            };
            assert!(broken.contains(rule), "{text:?}: {broken}");
        }
    }
}
