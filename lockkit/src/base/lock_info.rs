//! A lock as error messages and events describe it.

use crate::base::error::{Error, ErrorKind};
use crate::base::owner::Owner;

/// A lock as error messages describe it.
pub(crate) trait LockInfo: Sync {
    /// Returns its kind and its name, for people.
    fn describe(&self) -> String;
    /// Returns its kind and its name, for programs.
    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String);
    /// Returns the current holder, where it is known.
    fn holder(&self) -> Option<Owner>;
    /// Returns the error for a caller that does not wait.
    fn held(&self) -> Error {
        ErrorKind::Held {
            lock: self.describe(),
            owner: self.holder().map(Box::new),
            source: None,
        }
        .into()
    }
}
