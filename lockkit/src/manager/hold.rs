//! A held lock of one manager, as its guard keeps it.

use std::fmt;

use crate::base::error::Result;

/// A held lock of one manager. It is released once.
pub(super) trait Hold: fmt::Debug + Send + Sync {
    fn release(&mut self) -> Result<()>;
}
