//! Where the record of a lease is kept.

use std::path::PathBuf;
use std::sync::Arc;

use super::store::lease_store::LeaseStore;

/// The location of a record.
pub(super) enum Location {
    File(PathBuf),
    /// A store, and the key in it.
    Store(Arc<dyn LeaseStore>, String),
}
