//! Single-instance programs, whose further starts send their arguments to the running instance.
//!
//! [`Instance::enter`] makes a process the first instance of a name, or a second one. A second instance hands its
//! arguments, working directory, chosen variables and any bytes over to the first, and gets an answer.
//! [`FirstInstance`] describes what the first instance can do with them, [`SecondInstance`] what a second one sends.
//!
//! A [`NamedLock`] of that name decides which process is the first; a second socket only carries messages. So two
//! processes are never both the first. A first instance that hangs stays the first, and delays the others by no more
//! than their limit. When it ends, however it ends, one of the instances that wait for its answer becomes the first. No
//! activation is lost: it is answered, or its sender gets an error, or its sender becomes the first.
//!
//! Only processes of the same effective user meet, in one network namespace. In a user namespace that does not map all
//! users, the overflow uid of the unmapped users does not identify a user. Linux only.
//!
//! [`single_instance`](crate::single_instance) with `on_second` does all of this around `main`. This module contains
//! what the attribute calls, too; programs need only the documented items.
//!
//! `endpoint` is where the instances meet, `protocol` is their messages, and `server` is how the first instance listens
//! to many connections at once without being delayed by any.

#[cfg(target_os = "linux")]
mod activation;
mod attribute;
#[cfg(target_os = "linux")]
mod endpoint;
#[cfg(target_os = "linux")]
mod first;
#[cfg(target_os = "linux")]
mod protocol;
#[cfg(target_os = "linux")]
mod second;
#[cfg(target_os = "linux")]
mod server;

#[cfg(target_os = "linux")]
pub use activation::Activation;
pub use attribute::*;
#[cfg(all(target_os = "linux", feature = "tokio"))]
pub use first::ActivationStream;
#[cfg(target_os = "linux")]
pub use first::{Activations, FirstInstance};
#[cfg(target_os = "linux")]
pub use protocol::MOST_BYTES;
#[cfg(target_os = "linux")]
pub use second::{Outcome, SecondInstance};

#[cfg(target_os = "linux")]
use self::endpoint::Endpoint;
#[cfg(target_os = "linux")]
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
#[cfg(target_os = "linux")]
#[derive(Debug)]
pub enum Instance {
    /// No other instance runs.
    First(FirstInstance),
    /// Another instance runs.
    Second(SecondInstance),
}

#[cfg(target_os = "linux")]
impl Instance {
    /// Makes this process the first instance of `name` if there is none, without waiting for a live first instance.
    ///
    /// The name is that of a [`NamedLock`] for this user, which the first instance holds: do not acquire another lock
    /// of that name in addition.
    ///
    /// # Errors
    /// - Those of [`NamedLock::new`] and [`NamedLock::acquire`] except [`Held`](crate::ErrorKind::Held), which makes
    ///   this process a second instance.
    /// - [`ForeignOwner`](crate::ErrorKind::ForeignOwner) if another user listens at the address of the first instance.
    /// - [`Io`](crate::ErrorKind::Io) if some other program listens there, or no descriptor is left.
    pub fn enter(name: &str) -> Result<Self> {
        let lock = NamedLock::new(name)?;
        let place = Endpoint::of(name)?;
        match lock.try_lock() {
            Ok(guard) => Ok(Self::First(FirstInstance::open(name, &place, guard)?)),
            Err(error) if error.is_held() => {
                let owner = error.owner().cloned();
                Ok(Self::Second(SecondInstance::new(lock, place, owner)))
            }
            Err(error) => Err(error),
        }
    }
}
