//! How a lock is named on a command line: a name, a path, or the URL of a lease.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lockkit::{Lease, LeaseBuilder, NamedLock, Scope};

use crate::failure::{Failure, code};

/// Who shares a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ScopeArgument {
    /// The processes of this user.
    #[default]
    User,
    /// All processes of the machine.
    Machine,
}

impl From<ScopeArgument> for Scope {
    fn from(scope: ScopeArgument) -> Self {
        match scope {
            ScopeArgument::User => Self::User,
            ScopeArgument::Machine => Self::Machine,
        }
    }
}

/// A lock that `status` and `wait` look at.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Name(String),
    Path(PathBuf),
}

impl Place {
    /// What has a slash in it is a path, or the URL of one; anything else is a name.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        match text.contains('/') {
            true => Ok(Self::Path(lease_path(text)?)),
            false => Ok(Self::Name(text.to_owned())),
        }
    }
}

pub(crate) fn named(name: &str, scope: ScopeArgument) -> Result<NamedLock, Failure> {
    NamedLock::builder(name)
        .scope(scope.into())
        .build()
        .map_err(|error| Failure::from(error).example("lockkit run --name nightly-backup -- CMD"))
}

/// The lease at `url`: the one place that knows which engines this build has.
pub(crate) fn lease(url: &str) -> Result<LeaseBuilder, Failure> {
    Ok(Lease::file(lease_path(url)?))
}

/// The path of a lease, or of any other lock, given as `file:///path` or as it is.
fn lease_path(url: &str) -> Result<PathBuf, Failure> {
    let Some((scheme, rest)) = url.split_once("://") else { return Ok(url.into()) };
    if !scheme.eq_ignore_ascii_case("file") {
        let message = format!(
            "this build of lockkit has no engine for {scheme}:// leases; it knows those in files, given as a path or \
             as file:///path"
        );
        return Err(
            Failure::new(code::UNAVAILABLE, message).example("lockkit run --lease file:///srv/shared/leader -- CMD")
        );
    }
    // A host is nobody (`file:///path`) or this one.
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    let decoded = path.starts_with('/').then(|| unescaped(path)).flatten();
    decoded.ok_or_else(|| {
        let message = format!("{url} is no file URL: it takes three slashes and an absolute path");
        Failure::usage(message).example("lockkit lease show file:///srv/shared/leader")
    })
}

/// `%20` and its like as the bytes that they stand for; `None` where a `%` is followed by anything else.
fn unescaped(path: &str) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?].map(|digit| char::from(digit).to_digit(16));
                let [Some(high), Some(low)] = digits else { return None };
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    Some(std::ffi::OsString::from_vec(bytes).into())
}

/// `path`, absolute.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::io(format!("find {}", path.display()), error))
}

/// A span of time as people write it: `5s`, `1m 30s`, `250ms`; a bare number is seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string()),
        Err(_) => {
            humantime::parse_duration(text).map_err(|error| format!("{error}; write it as 5s, 250ms or \"1m 30s\""))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_a_path_or_a_file_url() {
        let path = |url: &str| lease_path(url).map_err(|failure| failure.code());
        assert_eq!(path("leader"), Ok("leader".into()));
        assert_eq!(path("/srv/leader"), Ok("/srv/leader".into()));
        assert_eq!(path("file:///srv/a%20b"), Ok("/srv/a b".into()));
        assert_eq!(path("FILE://localhost/srv/leader"), Ok("/srv/leader".into()));
        for wrong in ["file://elsewhere/srv", "file://", "file:///a%2", "file:///a%zz"] {
            assert_eq!(path(wrong), Err(code::USAGE), "{wrong}");
        }
        assert_eq!(path("redis://host/leader"), Err(code::UNAVAILABLE));
    }

    #[test]
    fn spans_of_time_are_read_as_people_write_them() {
        for (text, span) in [("5", 5000), ("0.25", 250), ("5s", 5000), ("250ms", 250), ("1m 30s", 90_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(span)));
        }
        for wrong in ["", "-1", "soon", "5 parsecs", "inf"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
