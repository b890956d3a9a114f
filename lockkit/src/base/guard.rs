//! Guards, and the report that a previous owner died.

use crate::base::error::Result;
use crate::base::owner::Owner;

/// A held lock. It borrows nothing, so it can be kept in a struct, held across `.await` and dropped
/// on any thread.
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
pub trait Guard: Send {
    /// Releases the lock now and returns any failure, which a drop cannot.
    ///
    /// # Errors
    /// Those of the kind of lock. The lock is released all the same.
    fn release(self) -> Result<()>;

    /// Returns a report if the previous owner died while it held the lock. The report names that
    /// owner, where it is known. The data that the lock protects may then be incomplete.
    fn recovered(&self) -> Option<&Recovered>;
}

/// The report that the previous owner of a lock died holding it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    owner: Option<Owner>,
}

impl Recovered {
    pub(crate) fn new(owner: Option<Owner>) -> Self {
        Self { owner }
    }

    /// Returns the owner that died, if its identity is still known.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }
}

/// Formats for people: `pid 4242 (backup), since 2026-11-20 17:03:11 UTC (42 s ago)`, or
/// `an unknown process`.
impl std::fmt::Display for Recovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.owner {
            Some(owner) => f.write_str(&owner.describe()),
            None => f.write_str("an unknown process"),
        }
    }
}
