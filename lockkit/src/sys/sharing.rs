//! The users that share a lock.

/// The users that share a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Sharing {
    /// The processes of one user, given by its effective uid. Windows has no user numbers; there it
    /// is 0.
    User(u32),
    /// All users of the machine.
    Machine,
}
