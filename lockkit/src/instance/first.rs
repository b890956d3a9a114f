//! The first instance: it holds the name, and receives what further starts bring.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
#[cfg(feature = "tokio")]
use std::pin::Pin;
use std::sync::Arc;
#[cfg(feature = "tokio")]
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::activation::Activation;
use super::endpoint::Endpoint;
use super::server::Reception;
use crate::error::{Error, Result};
use crate::lock::Recovered;
use crate::named::NamedGuard;
use crate::wait::{Backoff, Wait};

/// How long the socket of the first instance before may still be there, when its name is already free: while it is
/// taken apart, or another program is just being started with a copy.
const MOMENT: Duration = Duration::from_secs(5);
/// How long the thread of a handler pauses when it could not receive.
const REST: Duration = Duration::from_millis(100);

/// The first instance: no other one can be as long as this one is held. Dropping it releases.
///
/// Activations come in the order in which they have arrived whole, through whichever is most convenient:
/// - [`on_activation`](Self::on_activation) calls a handler on a thread of its own;
/// - [`activations`](Self::activations) is an iterator that waits as it is told, or not at all, as a program wants that
///   has a loop of its own;
/// - `for activation in &first` waits for ever;
/// - `activations_async` is a stream for tasks, and `next_activation_async` a future (feature `tokio`).
///
/// Several at once share them: each activation goes to one. Until one of them takes activations they wait in the
/// kernel, and their senders with them.
///
/// When it is dropped, activations that were not given out go back to their senders, of which one becomes the first
/// instance. Those that were are still to be answered. A forked child's copy holds nothing and receives nothing, and
/// programs that are started inherit neither the name nor the socket.
///
/// ```
/// use lockkit::{Instance, Wait};
/// # fn main() -> lockkit::Result<()> {
/// let Instance::First(first) = Instance::enter("lockkit-doc-first")? else { return Ok(()) };
/// if let Some(died) = first.recovered() {
///     eprintln!("the last one died: {died}");
/// }
/// first.on_activation(|activation| println!("started again with {:?}", activation.arguments()))?;
/// # Ok(()) }
/// ```
///
/// In a program that has a loop of its own:
///
/// ```
/// use lockkit::{Instance, Wait};
/// # fn main() -> lockkit::Result<()> {
/// # let Instance::First(first) = Instance::enter("lockkit-doc-first-loop")? else { return Ok(()) };
/// println!("{} runs", first.name());
/// while let Some(again) = first.next_activation(&Wait::none())? {
///     println!("and was started again with {:?}", again.arguments());
/// }
/// # Ok(()) }
/// ```
#[must_use = "dropping it lets another instance be the first"]
pub struct FirstInstance {
    name: String,
    /// Closed before the guard releases: whoever is first finds the address free.
    reception: Open,
    guard: NamedGuard,
}

/// A reception that is closed by dropping this, however many threads still wait in it.
struct Open(Arc<Reception>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl FirstInstance {
    /// Opens the reception of whoever has just taken the name.
    pub(super) fn open(name: &str, place: &Endpoint, guard: NamedGuard) -> Result<Self> {
        let until = Instant::now() + MOMENT;
        let mut backoff = Backoff::new();
        let listener = loop {
            if let Some(listener) = place.listen()? {
                break listener;
            }
            // To know another user there, for which waiting is no help.
            drop(place.connect()?);
            if Instant::now() >= until {
                return Err(place.io("bind", Errno::ADDRINUSE));
            }
            thread::sleep(backoff.next());
        };
        let reception = Reception::open(listener, place.user()).map_err(|error| place.io("watch", error))?;
        Ok(Self { name: name.to_owned(), reception: Open(Arc::new(reception)), guard })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the first instance before died, and who that was; see [`NamedGuard::recovered`].
    pub fn recovered(&self) -> Option<&Recovered> {
        self.guard.recovered()
    }

    /// The next activation; `None` when none has come within `wait`, or it was cancelled. What its senders have given
    /// up by now is left out.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) when no descriptor is left to wait for the token of `wait` with.
    pub fn next_activation(&self, wait: &Wait) -> Result<Option<Activation>> {
        Ok(self.reception.0.next(wait)?.map(Activation::new))
    }

    /// As [`next_activation`](Self::next_activation), in a task: the loop of an `async` program. Dropping the future loses
    /// no activation, so it goes well with `select!`. Answering does not wait for small answers.
    ///
    /// ```
    /// use lockkit::{Instance, Wait};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> lockkit::Result<()> {
    /// let Instance::First(first) = Instance::enter("lockkit-doc-next-async")? else { return Ok(()) };
    /// # let forever = Wait::none();
    /// # #[cfg(any())]
    /// let forever = Wait::forever();
    /// while let Some(activation) = first.next_activation_async(&forever).await? {
    ///     activation.answer(b"welcome")?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) outside of a tokio runtime; those of
    /// [`next_activation`](Self::next_activation), and [`Io`](crate::ErrorKind::Io) when no descriptor is left to wait with.
    ///
    /// # Panics
    /// Tokio does in a runtime that was built without its drivers for I/O and time; `enable_all` brings them.
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn next_activation_async(&self, wait: &Wait) -> Result<Option<Activation>> {
        crate::blocking::check_runtime()?;
        Ok(self.reception.0.next_async(wait).await?.map(Activation::new))
    }

    /// The activations as they come. Each is waited for as `wait` says, and the iterator ends when none has come by
    /// then, or [`next_activation`](Self::next_activation) would be an error: with [`Wait::none`] it gives those that
    /// are there, and with a token it goes on until that is cancelled.
    ///
    /// ```
    /// use lockkit::{CancelToken, Instance, Wait};
    /// # fn main() -> lockkit::Result<()> {
    /// let Instance::First(first) = Instance::enter("lockkit-doc-activations")? else { return Ok(()) };
    /// let quit = CancelToken::new();
    /// # quit.cancel();
    /// for activation in first.activations(&Wait::forever().or_cancelled(&quit)) {
    ///     activation.answer(b"welcome")?;
    /// }
    /// # Ok(()) }
    /// ```
    pub fn activations(&self, wait: &Wait) -> Activations<'_> {
        Activations { first: self, wait: wait.clone() }
    }

    /// As [`activations`](Self::activations), in a task: a [`Stream`](futures_core::Stream) that ends where the iterator
    /// would. Dropping it loses no activation.
    ///
    /// ```
    /// use lockkit::{CancelToken, Instance, Wait};
    /// use tokio_stream::StreamExt;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> lockkit::Result<()> {
    /// let Instance::First(first) = Instance::enter("lockkit-doc-stream")? else { return Ok(()) };
    /// let quit = CancelToken::new();
    /// # quit.cancel();
    /// let mut activations = first.activations_async(&Wait::forever().or_cancelled(&quit));
    /// while let Some(activation) = activations.next().await {
    ///     activation.answer(b"welcome")?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    /// As [`next_activation_async`](Self::next_activation_async).
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub fn activations_async(&self, wait: &Wait) -> ActivationStream<'_> {
        ActivationStream { first: self, wait: wait.clone(), next: None }
    }

    /// Calls `handler` with each activation, one after the other, on a thread that ends when this `FirstInstance` is
    /// dropped and the handler has returned. A handler that takes long lets the next senders wait: it can hand the
    /// activation on, and it is answered when that is dropped. When it panics, the sender is told that it was not
    /// handled, and the next activation comes as before.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) when no thread can be started.
    pub fn on_activation(&self, mut handler: impl FnMut(Activation) + Send + 'static) -> Result<()> {
        let reception = self.reception.0.clone();
        let receive = move || {
            loop {
                match reception.next(&Wait::forever()) {
                    Ok(Some(arrived)) => drop(catch_unwind(AssertUnwindSafe(|| handler(Activation::new(arrived))))),
                    Ok(None) => break,
                    // What the system lacks now it may have later.
                    Err(_) => thread::sleep(REST),
                }
            }
        };
        let started = thread::Builder::new().name("lockkit-first".to_owned()).spawn(receive);
        started.map(drop).map_err(|error| Error::io("start", "a thread for activations", error))
    }

    /// Releases now and says what went wrong.
    ///
    /// # Errors
    /// As [`NamedGuard::release`]; it is released all the same.
    pub fn release(self) -> Result<()> {
        let Self { reception, guard, .. } = self;
        drop(reception);
        guard.release()
    }
}

impl<'f> IntoIterator for &'f FirstInstance {
    type Item = Activation;
    type IntoIter = Activations<'f>;

    fn into_iter(self) -> Activations<'f> {
        self.activations(&Wait::forever())
    }
}

impl fmt::Debug for FirstInstance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FirstInstance").field("name", &self.name).field("guard", &self.guard).finish_non_exhaustive()
    }
}

/// The activations of a first instance; see [`FirstInstance::activations`].
#[derive(Clone, Debug)]
#[must_use = "an iterator does nothing until it is asked"]
pub struct Activations<'f> {
    first: &'f FirstInstance,
    wait: Wait,
}

impl Iterator for Activations<'_> {
    type Item = Activation;

    fn next(&mut self) -> Option<Activation> {
        self.first.next_activation(&self.wait).unwrap_or_default()
    }
}

/// The activations of a first instance, for a task; see [`FirstInstance::activations_async`].
#[cfg(feature = "tokio")]
#[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
#[must_use = "a stream does nothing until it is polled"]
pub struct ActivationStream<'f> {
    first: &'f FirstInstance,
    wait: Wait,
    /// The wait for the one that is to come, once somebody has asked for it.
    next: Option<Next<'f>>,
}

#[cfg(feature = "tokio")]
type Next<'f> = Pin<Box<dyn Future<Output = Result<Option<Activation>>> + Send + 'f>>;

#[cfg(feature = "tokio")]
impl futures_core::Stream for ActivationStream<'_> {
    type Item = Activation;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Activation>> {
        let Self { first, wait, next } = &mut *self;
        let (first, wait) = (*first, &*wait);
        let waiting = next.get_or_insert_with(|| {
            let wait = wait.clone();
            Box::pin(async move { first.next_activation_async(&wait).await })
        });
        waiting.as_mut().poll(context).map(|received| {
            *next = None;
            received.unwrap_or_default()
        })
    }
}

#[cfg(feature = "tokio")]
impl fmt::Debug for ActivationStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActivationStream").field("first", &self.first).field("wait", &self.wait).finish_non_exhaustive()
    }
}
