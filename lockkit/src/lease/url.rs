//! The parts of a lease's URL, and the error for an invalid URL.

use std::path::PathBuf;

use crate::base::error::{Error, ErrorKind, Result};
use crate::sys::files;

/// Returns the error for an invalid URL, which is shown without its credentials and parameters.
pub(in crate::lease) fn invalid(url: &str, problem: impl Into<String>) -> Error {
    let (scheme, rest) = url
        .split_once("://")
        .map_or((None, url), |(scheme, rest)| (Some(scheme), rest));
    let (head, tail) = rest.split_at(rest.find(['?', '#']).unwrap_or(rest.len()));
    // If an @ comes only after a ? or #, the text before the @ may be a password, and so may a
    // quotation in the problem.
    let (rest, problem) = match tail.contains('@') {
        true => (
            "…",
            "there is an @ after a ? or #: write %40, and in a user or password %3F for the ? and %23 for the #".into(),
        ),
        false => (head.rsplit_once('@').map_or(head, |(_, rest)| rest), problem.into()),
    };
    let shown = scheme.map_or_else(|| rest.to_owned(), |scheme| format!("{scheme}://{rest}"));
    ErrorKind::InvalidUrl {
        url: shown
            .chars()
            .map(|c| if c.is_control() { '?' } else { c })
            .collect(),
        problem,
    }
    .into()
}

/// Returns the path of a `file:` URL from `rest`, the part after the scheme.
pub(in crate::lease) fn path(url: &str, rest: &str) -> Result<PathBuf> {
    // The host is empty (`file:///path`) or this machine.
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    let decoded = path
        .starts_with('/')
        .then(|| unescaped(path))
        .flatten()
        .and_then(files::path_of_url);
    decoded.ok_or_else(|| invalid(url, "a file URL has three slashes and an absolute path"))
}

/// Decodes escapes such as `%20` to bytes; `None` if a `%` is not followed by two hexadecimal
/// digits.
fn unescaped(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits =
                    [rest.next()?, rest.next()?].map(|digit| char::from(digit).to_digit(16));
                let [Some(high), Some(low)] = digits else {
                    return None;
                };
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    Some(bytes)
}

/// A URL in its parts: `scheme://authority/path?parameter=value`.
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
pub(in crate::lease) struct Parts<'u> {
    pub(in crate::lease) scheme: &'u str,
    pub(in crate::lease) authority: &'u str,
    /// With its slash, or empty.
    pub(in crate::lease) path: &'u str,
    pub(in crate::lease) query: &'u str,
}

#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
impl<'u> Parts<'u> {
    pub(in crate::lease) fn of(url: &'u str) -> Self {
        let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        Self {
            scheme,
            authority,
            path,
            query,
        }
    }

    /// Returns the parameters, still escaped.
    pub(in crate::lease) fn raw_parameters(&self) -> impl Iterator<Item = (&'u str, &'u str)> {
        let pairs = self.query.split('&').filter(|pair| !pair.is_empty());
        pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")))
    }

    /// Returns the parameters, decoded.
    pub(in crate::lease) fn parameters(&self) -> impl Iterator<Item = (&'u str, Option<String>)> {
        self.raw_parameters().map(|(key, value)| (key, text(value)))
    }
}

/// Decodes an escaped part of a URL, if it is UTF-8.
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
pub(in crate::lease) fn text(escaped: &str) -> Option<String> {
    String::from_utf8(unescaped(escaped)?).ok()
}
