//! The rule for all lock names.
//!
//! A name is part of a kernel object's name on one system and of a file name on another, appears in
//! logs, and is typed into shells. So it is an ASCII letter followed by ASCII letters, digits, `-`,
//! `_` and `.`, and has 1 to [`MAX_LEN`] bytes. The check is `const`, so that `#[single_instance]`
//! does it at compile time.

use crate::base::error::{Error, ErrorKind, Result};

/// The longest name, in bytes: the longest prefix and a name together still fit into a Unix socket
/// address.
pub(crate) const MAX_LEN: usize = 80;

/// Returns the rule that `name` violates, in words, or `Ok` for a valid name.
pub(crate) const fn check(name: &str) -> std::result::Result<(), &'static str> {
    let bytes = name.as_bytes();
    if bytes.is_empty() {
        return Err("a lock name must not be empty");
    }
    if bytes.len() > MAX_LEN {
        return Err("a lock name has at most 80 bytes");
    }
    if !bytes[0].is_ascii_alphabetic() {
        return Err("a lock name starts with an ASCII letter");
    }
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => at += 1,
            0 => return Err("a lock name must not contain a NUL byte"),
            b'/' | b'\\' => return Err("a lock name must not contain a slash"),
            b' ' => return Err("a lock name must not contain a space"),
            _ => return Err("a lock name consists of ASCII letters, digits, '-', '_' and '.'"),
        }
    }
    Ok(())
}

/// Returns `name`, or [`ErrorKind::InvalidName`] with the rule that it violates.
pub(crate) fn checked(name: &str) -> Result<&str> {
    match check(name) {
        Ok(()) => Ok(name),
        Err(rule) => Err(Error::from(ErrorKind::InvalidName {
            name: name.chars().take(MAX_LEN).collect(),
            rule,
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_name_is_accepted() {
        for name in [
            "a",
            "test-42",
            "com.example.app",
            "A_b-c.d9",
            &"x".repeat(MAX_LEN),
        ] {
            assert_eq!(checked(name).unwrap(), name);
        }
    }

    #[test]
    fn invalid_name_is_refused_with_its_rule() {
        for (name, rule) in [
            ("", "empty"),
            (&*"x".repeat(MAX_LEN + 1), "at most 80 bytes"),
            ("42", "starts with an ASCII letter"),
            ("1st", "starts with an ASCII letter"),
            ("-a", "starts with an ASCII letter"),
            ("a\0b", "NUL"),
            ("a/b", "slash"),
            ("a b", "space"),
            ("naïve", "ASCII letters, digits"),
        ] {
            let error = checked(name).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::InvalidName { .. }),
                "{error:?}"
            );
            assert!(error.to_string().contains(rule), "{name:?}: {error}");
        }
    }
}
