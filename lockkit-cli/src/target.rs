//! How a command line names a lock: a name, a path, or the URL of a lease.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lockkit::{ErrorKind, Lease, LeaseBuilder, NamedLock, Scope};

use crate::failure::{Failure, note};

/// The processes that share a name.
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

/// A lock that `status` and `wait` read.
#[derive(Clone)]
pub(crate) enum Target {
    Name(String),
    Path(PathBuf),
    /// By URL.
    Lease(Lease),
}

impl Target {
    /// Parses a target: with `://` it is the URL of a lease, with a slash a path, and otherwise a
    /// name.
    pub(crate) fn parse(given: &OsStr) -> Result<Self, Failure> {
        check_scheme(given)?;
        if url(given).is_some() {
            return Ok(Self::Lease(lease(given, |builder| builder)?));
        }
        if given
            .as_encoded_bytes()
            .iter()
            .any(|byte| std::path::is_separator(char::from(*byte)))
        {
            return Ok(Self::Path(given.into()));
        }
        let name = given.to_str().ok_or_else(|| {
            let message = format!(
                "invalid lock name {}: it is no text in UTF-8",
                Path::new(given).display()
            );
            Failure::usage(message).example("lockkit status backup")
        })?;
        Ok(Self::Name(name.to_owned()))
    }
}

/// If a name was given and a file of that name exists, prints how to name the file.
pub(crate) fn note_file_of_name(place: &Target, quiet: bool) {
    let Target::Name(name) = place else { return };
    if !quiet && is_file_here(name) {
        note(format_args!(
            "lockkit: this is the lock named {name:?}; a file of that name is in this directory, too: ask for its lock as {}",
            as_path(name)
        ));
    }
}

fn is_file_here(name: &str) -> bool {
    std::fs::symlink_metadata(name).is_ok()
}

/// Returns a bare name as the path of a file in this directory.
fn as_path(name: &str) -> String {
    format!(".{}{name}", std::path::MAIN_SEPARATOR)
}

pub(crate) fn named(name: &str, scope: ScopeArgument) -> Result<NamedLock, Failure> {
    NamedLock::builder(name)
        .scope(scope.into())
        .build()
        .map_err(|error| Failure::from(error).example("lockkit run --name nightly-backup -- CMD"))
}

/// Builds a lock as [`named`] does, for a command that takes a name or a path: an invalid name may
/// be a file.
pub(crate) fn named_or_file(name: &str, scope: ScopeArgument) -> Result<NamedLock, Failure> {
    named(name, scope).map_err(|failure| match is_file_here(name) {
        true => failure
            .with_more(format_args!("; a file of this name is in this directory"))
            .example(format!("lockkit status {}", as_path(name))),
        false => failure.example("lockkit status nightly-backup"),
    })
}

/// Returns the lease at `given`, a path or a URL, with the options that `with` adds.
pub(crate) fn lease(
    given: &OsStr,
    with: impl FnOnce(LeaseBuilder) -> LeaseBuilder,
) -> Result<Lease, Failure> {
    check_scheme(given)?;
    let builder = match url(given) {
        Some(url) => Lease::connect(url),
        None => Lease::file(given),
    };
    with(builder).build().map_err(|error| {
        let example = match error.kind() {
            ErrorKind::InvalidUrl { .. } => "lockkit run --lease file:///srv/shared/leader -- CMD",
            ErrorKind::Unsupported { .. } => {
                "cargo install lockkit-cli --features etcd,postgres,redis"
            }
            _ => "lockkit run --lease /srv/shared/leader -- CMD",
        };
        Failure::from(error).example(example)
    })
}

/// The schemes of leases, and those that a mistaken URL may have.
const SCHEMES: [&str; 13] = [
    "file",
    "etcd",
    "etcds",
    "postgres",
    "postgresql",
    "redis",
    "rediss",
    "valkey",
    "valkeys",
    "redis+unix",
    "valkey+unix",
    "http",
    "https",
];

/// Rejects text that begins as a URL and lacks a slash: as a relative path, it would be a lock of
/// this host alone.
fn check_scheme(given: &OsStr) -> Result<(), Failure> {
    let text = given.to_string_lossy();
    let Some((scheme, rest)) = text.split_once(':') else {
        return Ok(());
    };
    if rest.starts_with("//")
        || !SCHEMES
            .iter()
            .any(|known| known.eq_ignore_ascii_case(scheme))
    {
        return Ok(());
    }
    // The rest may be a password.
    let (scheme, slashes) = (
        scheme.to_ascii_lowercase(),
        if scheme.eq_ignore_ascii_case("file") {
            "///"
        } else {
            "//"
        },
    );
    let message = format!(
        "invalid URL: it begins with {scheme}: and must begin with {scheme}:{slashes}; to name a file that is called so, begin with ./"
    );
    Err(Failure::usage(message).example(match slashes {
        "///" => "lockkit run --lease file:///srv/shared/leader -- CMD".to_owned(),
        _ => format!("lockkit run --lease {scheme}://host/leader -- CMD"),
    }))
}

/// Returns the text of a URL.
pub(crate) fn url(given: &OsStr) -> Option<&str> {
    given.to_str().filter(|text| text.contains("://"))
}

/// Makes `path` absolute.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::io(format!("find {}", path.display()), error))
}

/// Parses a span of time in the usual notation: `5s`, `1m 30s`, `250ms`; a bare number is seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string()),
        Err(_) => humantime::parse_duration(text)
            .map_err(|error| format!("{error}; write it as 5s, 250ms or \"1m 30s\"")),
    }
}

#[cfg(test)]
mod tests {
    #[cfg(unix)]
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    #[cfg(unix)]
    fn lease_parses_path_or_url() {
        let name = |given: &str| {
            let lease = lease(given.as_ref(), |builder| builder);
            lease
                .map(|lease| lease.name().to_owned())
                .map_err(|failure| failure.code())
        };
        assert_eq!(name("/srv/leader").as_deref(), Ok("/srv/leader"));
        assert_eq!(name("file:///srv/a%20b").as_deref(), Ok("/srv/a b"));
        assert_eq!(
            name("FILE://localhost/srv/leader").as_deref(),
            Ok("/srv/leader")
        );
        for wrong in [
            "file://elsewhere/srv",
            "file://",
            "file:///a%2",
            "gopher://host/leader",
        ] {
            assert_eq!(name(wrong), Err(crate::failure::code::USAGE), "{wrong}");
        }
    }

    #[test]
    fn target_parses_url_path_or_name() {
        assert!(matches!(
            Target::parse("file:///srv/leader".as_ref()),
            Ok(Target::Lease(_))
        ));
        assert!(matches!(
            Target::parse("./leader".as_ref()),
            Ok(Target::Path(_))
        ));
        assert!(matches!(
            Target::parse("leader".as_ref()),
            Ok(Target::Name(_))
        ));
        #[cfg(windows)]
        assert!(matches!(
            Target::parse("C:\\run\\leader".as_ref()),
            Ok(Target::Path(_))
        ));
        #[cfg(unix)]
        assert!(matches!(
            Target::parse(OsStr::from_bytes(b"/a\xff")),
            Ok(Target::Path(_))
        ));
        #[cfg(unix)]
        assert!(Target::parse(OsStr::from_bytes(b"a\xff")).is_err());
    }

    #[test]
    fn duration_parses_usual_notation() {
        for (text, span) in [
            ("5", 5000),
            ("0.25", 250),
            ("5s", 5000),
            ("250ms", 250),
            ("1m 30s", 90_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(span)));
        }
        for wrong in ["", "-1", "soon", "5 parsecs", "inf"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
