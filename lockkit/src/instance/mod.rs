//! Programs of which one instance runs, and further starts that tell it what they were started for.
//!
//! [`Instance::enter`] makes a process the first instance of a name, or a second one that hands its arguments, working
//! directory, chosen variables and any bytes over to the first, and gets its answer. What the first instance can do with
//! them stands at [`FirstInstance`], what a second one sends at [`SecondInstance`].
//!
//! A [`NamedLock`] of that name decides who is first; a socket beside it only carries words. So two
//! are never both first, a first instance that hangs stays the first and costs the others no more than their limit, and
//! when it ends, however it ends, one of those that wait for its answer becomes the first. An activation is answered, or
//! an error for its sender, or the sender becomes the first: none is lost.
//!
//! Only processes of the same effective user meet, in one network namespace. In a user namespace that does not map all
//! users, the number of those that it does not map stands for no user. Linux only.
//!
//! [`single_instance`](crate::single_instance) with `on_second` is all of this around `main`. What it calls is here, too;
//! programs need only what is documented.
//!
//! How it works: `place` is where they meet, `wire` what they say, `reception` how the first one listens to many
//! at once and is not held up by any.

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
use crate::{error::Result, named::NamedLock};

/// A process that was started under a name of which one instance runs: the first, or another one.
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
    /// No other one runs.
    First(FirstInstance),
    /// Another one runs.
    Second(SecondInstance),
}

#[cfg(target_os = "linux")]
impl Instance {
    /// Makes this process the first instance of `name` if there is none, without waiting for one that lives.
    ///
    /// The name is that of a [`NamedLock`] for this user, which the first instance holds: take no other lock of that
    /// name beside it.
    ///
    /// # Errors
    /// Those of [`NamedLock::new`] and [`NamedLock::acquire`] but for [`Held`](crate::ErrorKind::Held), which is what
    /// makes it a second one; [`ForeignOwner`](crate::ErrorKind::ForeignOwner) when another user listens where the
    /// first instance must, and [`Io`](crate::ErrorKind::Io) when some other program does, or no descriptor is left.
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
