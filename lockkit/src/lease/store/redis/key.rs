//! The key of a lease, which is also the name of its channel.

use crate::lease::store::lease_store::LeaseName;

const PREFIX: &str = "lockkit:{";
const SUFFIX: &str = "}";

/// Returns the key of a lease.
pub(super) fn key(name: &LeaseName) -> String {
    format!("{PREFIX}{name}{SUFFIX}")
}

/// Returns the name of the lease in the name of a channel.
pub(super) fn name_in_channel(channel: &str) -> Option<&str> {
    channel.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)
}
