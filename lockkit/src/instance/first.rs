//! The first instance: it holds the name, and receives the activations of further starts.

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
use super::server::Server;
use crate::base::error::{Error, Result};
use crate::base::guard::Recovered;
use crate::base::wait::{Backoff, Wait};
use crate::named::NamedGuard;

/// The time that the socket of the previous first instance may still exist when its name is already
/// free: while it is torn down, or another program is just being started with a copy.
const BIND_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause of a handler's thread after a failure to receive.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The first instance: no other instance can be the first while this one is held. Dropping it
/// releases.
///
/// Activations arrive in the order in which they are complete, through any of these:
/// - [`on_activation`](Self::on_activation) calls a handler on its own thread;
/// - [`activations`](Self::activations) is an iterator that waits as requested, or not at all, for
///   a program with its own loop;
/// - `for activation in &first` waits for ever;
/// - `activations_async` is a stream for tasks, and `next_activation_async` a future (feature
///   `tokio`).
///
/// Several of them at once share the activations: each activation goes to one. Until one of them
/// takes activations, they wait in the kernel, together with their senders.
///
/// When the first instance is dropped, activations that were not given out go back to their
/// senders, and one sender becomes the first instance. Activations that were given out must still
/// be answered. A forked child's copy holds nothing and receives nothing. Started programs inherit
/// neither the name nor the socket.
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
/// In a program that has its own loop:
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
    /// Closed before the guard releases: the next first instance finds the address free.
    server: OpenServer,
    guard: NamedGuard,
}

/// A server that closes when this is dropped, however many threads still wait for it.
struct OpenServer(Arc<Server>);

impl Drop for OpenServer {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl FirstInstance {
    /// Opens the server of the process that has just acquired the name.
    pub(super) fn open(name: &str, endpoint: &Endpoint, guard: NamedGuard) -> Result<Self> {
        let until = Instant::now() + BIND_TIMEOUT;
        let mut backoff = Backoff::new();
        let listener = loop {
            if let Some(listener) = endpoint.listen()? {
                break listener;
            }
            // Detects another user at the address; waiting does not help against that.
            drop(endpoint.connect()?);
            if Instant::now() >= until {
                return Err(endpoint.io("bind", Errno::ADDRINUSE));
            }
            thread::sleep(backoff.next());
        };
        let server =
            Server::open(listener, endpoint.user()).map_err(|error| endpoint.io("watch", error))?;
        Ok(Self {
            name: name.to_owned(),
            server: OpenServer(Arc::new(server)),
            guard,
        })
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the previous first instance if it died; see [`NamedGuard::recovered`].
    pub fn recovered(&self) -> Option<&Recovered> {
        self.guard.recovered()
    }

    /// Returns the next activation, or `None` if none has come within `wait`, or `wait` was
    /// cancelled. Activations that their senders have given up by then are left out.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if no descriptor is left to wait for the token of `wait` with.
    pub fn next_activation(&self, wait: &Wait) -> Result<Option<Activation>> {
        Ok(self.server.0.next(wait)?.map(Activation::new))
    }

    /// Returns the next activation as [`next_activation`](Self::next_activation) does, in a task:
    /// the loop of an `async` program. Dropping the future loses no activation, so it works with
    /// `select!`. Small answers do not wait.
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
    /// [`next_activation`](Self::next_activation), and [`Io`](crate::ErrorKind::Io) if no
    /// descriptor is left to wait with.
    ///
    /// # Panics
    /// Tokio panics in a runtime that was built without its drivers for I/O and time; `enable_all`
    /// adds them.
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn next_activation_async(&self, wait: &Wait) -> Result<Option<Activation>> {
        crate::base::blocking::check_runtime()?;
        Ok(self.server.0.next_async(wait).await?.map(Activation::new))
    }

    /// Returns the activations as they arrive. Each is waited for as `wait` says. The iterator ends
    /// when none has come by then, or [`next_activation`](Self::next_activation) would return an
    /// error. With [`Wait::none`] it gives the present activations, and with a token it continues
    /// until the token is cancelled.
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
        Activations {
            first: self,
            wait: wait.clone(),
        }
    }

    /// Returns the activations as [`activations`](Self::activations) does, in a task: a
    /// [`Stream`](futures_core::Stream) that ends where the iterator would. Dropping it loses no
    /// activation.
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
        ActivationStream {
            first: self,
            wait: wait.clone(),
            next: None,
        }
    }

    /// Calls `handler` with each activation, one after the other. Its thread ends when this
    /// `FirstInstance` is dropped and the handler has returned. A slow handler makes the next
    /// senders wait. It can hand the activation on, which is answered when it is dropped. If the
    /// handler panics, the sender gets the report that it was not handled, and the next activation
    /// follows as before.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if no thread can be started.
    pub fn on_activation(
        &self,
        mut handler: impl FnMut(Activation) + Send + 'static,
    ) -> Result<()> {
        let server = self.server.0.clone();
        let receive = move || {
            loop {
                match server.next(&Wait::forever()) {
                    Ok(Some(request)) => drop(catch_unwind(AssertUnwindSafe(|| {
                        handler(Activation::new(request))
                    }))),
                    Ok(None) => break,
                    // A resource that the system lacks now may be available later.
                    Err(_) => thread::sleep(RETRY_INTERVAL),
                }
            }
        };
        let started = thread::Builder::new()
            .name("lockkit-first".to_owned())
            .spawn(receive);
        started
            .map(drop)
            .map_err(|error| Error::io("start", "a thread for activations", error))
    }

    /// Releases now and reports errors.
    ///
    /// # Errors
    /// As [`NamedGuard::release`]; it is released nevertheless.
    pub fn release(self) -> Result<()> {
        let Self { server, guard, .. } = self;
        drop(server);
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
        f.debug_struct("FirstInstance")
            .field("name", &self.name)
            .field("guard", &self.guard)
            .finish_non_exhaustive()
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
    /// The wait for the next activation, once the stream has been polled for it.
    next: Option<NextActivation<'f>>,
}

#[cfg(feature = "tokio")]
type NextActivation<'f> = Pin<Box<dyn Future<Output = Result<Option<Activation>>> + Send + 'f>>;

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
        f.debug_struct("ActivationStream")
            .field("first", &self.first)
            .field("wait", &self.wait)
            .finish_non_exhaustive()
    }
}
