//! An owner as lines of text, for records that people read with `cat`.
//!
//! Each line is a key and a value. An unknown key is ignored, and a damaged value leaves its field
//! unknown. The record itself stores the pid.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use crate::base::owner::{Owner, format_utc};

/// The longest program name that is written, in characters.
const MAX_PROGRAM_CHARS: usize = 64;

/// Returns the owner with `pid` that the lines describe.
pub(crate) fn read<'l>(pid: u32, lines: impl Iterator<Item = &'l str>) -> Owner {
    let mut owner = Owner {
        pid,
        start: None,
        boot: None,
        namespace: None,
        host: None,
        program: None,
        acquired: None,
    };
    for (key, value) in lines.filter_map(|line| line.split_once(' ')) {
        match key {
            "start" => owner.start = value.parse().ok(),
            "boot" => owner.boot = u128::from_str_radix(value, 16).ok(),
            "namespace" => owner.namespace = value.parse().ok(),
            "host" => owner.host = Some(value.to_owned()),
            "program" => owner.program = Some(value.to_owned()),
            "acquired" => owner.acquired = parse_time(value),
            _ => {}
        }
    }
    owner
}

fn parse_time(value: &str) -> Option<SystemTime> {
    let (seconds, nanos) = value.split(' ').next()?.split_once('.')?;
    let nanos = Duration::from_nanos(nanos.parse::<u32>().ok()?.into());
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds.parse().ok()?).checked_add(nanos)?)
}

/// Adds the lines of `owner` to `text`.
pub(crate) fn write(owner: &Owner, text: &mut String) {
    // Writing into a string does not fail.
    let mut line = |key: &str, value: std::fmt::Arguments<'_>| {
        writeln!(text, "{key} {value}").unwrap_or_default()
    };
    if let Some(start) = owner.start {
        line("start", format_args!("{start}"));
    }
    if let Some(boot) = owner.boot {
        line("boot", format_args!("{boot:032x}"));
    }
    if let Some(namespace) = owner.namespace {
        line("namespace", format_args!("{namespace}"));
    }
    if let Some(host) = &owner.host {
        line("host", format_args!("{host}"));
    }
    if let Some(program) = &owner.program {
        let program: String = program
            .chars()
            .take(MAX_PROGRAM_CHARS)
            .map(printable)
            .collect();
        line("program", format_args!("{program}"));
    }
    if let Some(acquired) = owner.acquired {
        let since = acquired
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        line(
            "acquired",
            format_args!(
                "{}.{:09} ({})",
                since.as_secs(),
                since.subsec_nanos(),
                format_utc(acquired)
            ),
        );
    }
}

fn printable(letter: char) -> char {
    if letter.is_control() { '?' } else { letter }
}
