//! [`Instance::enter`]: this process becomes the first instance of a name, or a second one.

use super::endpoint::Endpoint;
use super::first::FirstInstance;
use super::second::SecondInstance;
use crate::base::error::Result;
use crate::named::NamedLock;

/// A process that was started under a single-instance name: the first instance, or another one.
///
/// ```
/// use lockkit::instance::{Instance, Outcome};
/// use lockkit::Wait;
/// # fn main() -> lockkit::Result<()> {
/// let first = match Instance::enter("lockkit-doc-instance")? {
///     Instance::First(first) => first,
///     Instance::Second(second) => match second.activate(&Wait::forever())? {
///         Outcome::Answered(_) => return Ok(()),
///         Outcome::BecameFirst(first) => first,
///     },
/// };
/// first.on_activation(|again| println!("{:?} from {:?}", again.arguments(), again.directory()))?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub enum Instance {
    /// No other instance runs.
    First(FirstInstance),
    /// Another instance runs.
    Second(SecondInstance),
}

impl Instance {
    /// Makes this process the first instance of `name` if there is none, without waiting for a live
    /// first instance.
    ///
    /// The name is that of a [`NamedLock`] for this user, which the first instance holds: do not
    /// acquire another lock of that name in addition.
    ///
    /// # Errors
    /// - Those of [`NamedLock::new`] and [`NamedLock::acquire`] except
    ///   [`Held`](crate::ErrorKind::Held), which makes this process a second instance.
    /// - [`ForeignOwner`](crate::ErrorKind::ForeignOwner) if another user listens at the address of
    ///   the first instance.
    /// - [`Io`](crate::ErrorKind::Io) if some other program listens there, or no descriptor is
    ///   left.
    pub fn enter(name: &str) -> Result<Self> {
        let lock = NamedLock::new(name)?;
        let endpoint = Endpoint::of(name)?;
        match lock.try_lock() {
            Ok(guard) => Ok(Self::First(FirstInstance::open(name, &endpoint, guard)?)),
            Err(error) if error.is_held() => {
                let owner = error.owner().cloned();
                Ok(Self::Second(SecondInstance::new(lock, endpoint, owner)))
            }
            Err(error) => Err(error),
        }
    }
}
