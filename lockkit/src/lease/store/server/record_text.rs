//! Owners and claims as text in the records of the servers.

use std::time::SystemTime;

use crate::base::owner::Owner;
use crate::base::owner_text;
use crate::lease::store::lease_store::{ClaimId, Grant};

/// Returns whether the owner is this process.
#[cfg(feature = "etcd")]
pub(in crate::lease::store) fn is_this_process(owner: &Owner) -> bool {
    let identity = |owner: &Owner| (owner.pid, owner.start, owner.boot, owner.namespace);
    identity(owner) == identity(&Owner::current())
}

/// Returns this process, as text for a record.
pub(in crate::lease::store) fn format_current_owner() -> String {
    format_owner(&Owner {
        acquired: Some(SystemTime::now()),
        ..Owner::current()
    })
}

/// Returns the owner that the next grant reports instead of the holder when the grant is abandoned,
/// as text for a record.
pub(in crate::lease::store) fn format_recovered_owner(grant: &Grant) -> Option<String> {
    Some(
        grant
            .recovered()?
            .owner()
            .map(format_owner)
            .unwrap_or_default(),
    )
}

/// Returns an owner, as text for a record.
pub(in crate::lease::store) fn format_owner(owner: &Owner) -> String {
    let mut text = format!("pid {}\n", owner.pid());
    owner_text::write(owner, &mut text);
    text
}

/// Returns the owner in the text of a record, if there is one.
pub(in crate::lease::store) fn parse_owner(text: &str) -> Option<Owner> {
    let (first, rest) = text.split_once('\n')?;
    Some(owner_text::read(
        first.strip_prefix("pid ")?.parse().ok()?,
        rest.lines(),
    ))
}

/// Returns the claim of these hexadecimal digits.
pub(in crate::lease::store) fn parse_claim(text: &str) -> Option<ClaimId> {
    u128::from_str_radix(text, 16)
        .ok()
        .map(ClaimId::from_number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::owner::Liveness;

    #[test]
    fn parse_owner_of_written_text_returns_owner() {
        let owner = parse_owner(&format_current_owner()).unwrap();
        assert_eq!(owner.pid(), std::process::id());
        assert_eq!(owner.liveness(), Liveness::Alive);
        assert!(
            parse_owner("").is_none()
                && parse_owner("pid x\n").is_none()
                && parse_owner("pid 1").is_none()
        );
    }
}
