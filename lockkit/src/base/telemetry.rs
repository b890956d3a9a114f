//! The events of locks for subscribers of [tracing](https://docs.rs/tracing) (feature `tracing`).
//!
//! | level | message | fields besides `kind` and `name` |
//! |---|---|---|
//! | span, debug | `acquire`, around each acquisition | |
//! | debug | `waiting`: the lock is held | `holder` |
//! | debug | `acquired` | `waited` (seconds) |
//! | debug | `not acquired` | `waited`, `error` |
//! | warn | `recovered`: the previous owner died holding it | `recovered` |
//! | error | `lost`: a lease has ended before its release | `token`, `reason` |
//! | trace | `released` | |
//!
//! Every acquisition goes through [`acquire`] or [`acquire_async`], so the kinds of lock do not
//! depend on spans. Without a subscriber each call is one comparison with tracing's highest level;
//! without the feature it is nothing.

#[cfg(feature = "tracing")]
mod enabled {
    use std::fmt::Display;
    use std::time::Instant;

    use tracing::level_filters::LevelFilter;
    use tracing::{Span, debug, debug_span, error, trace, warn};

    use crate::base::error::Result;
    use crate::base::guard::Guard;
    use crate::base::lock_info::LockInfo;

    /// Returns whether there is a subscriber, for any level.
    #[inline]
    pub(crate) fn is_on() -> bool {
        LevelFilter::current() != LevelFilter::OFF
    }

    /// Reports an acquisition.
    #[inline]
    pub(crate) fn acquire<G: Guard>(
        lock: &dyn LockInfo,
        take: impl FnOnce() -> Result<G>,
    ) -> Result<G> {
        if is_on() {
            Acquisition::of(lock).run(take)
        } else {
            take()
        }
    }

    /// Reports an acquisition by a task.
    #[cfg(feature = "tokio")]
    pub(crate) async fn acquire_async<G: Guard>(
        lock: &dyn LockInfo,
        acquiring: impl Future<Output = Result<G>>,
    ) -> Result<G> {
        use tracing::Instrument;
        if !is_on() {
            return acquiring.await;
        }
        let acquisition = Acquisition::of(lock);
        let result = acquiring.instrument(acquisition.span.clone()).await;
        acquisition.span.in_scope(|| acquisition.report(result))
    }

    /// Wraps the work so that it runs in the span and for the subscriber of this thread, on any
    /// thread.
    #[cfg(feature = "tokio")]
    pub(crate) fn in_current_span<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
        let (span, subscriber) = (
            Span::current(),
            tracing::dispatcher::get_default(Clone::clone),
        );
        move || tracing::dispatcher::with_default(&subscriber, || span.in_scope(work))
    }

    /// Reports that the lock was found held, and that a wait begins.
    #[inline]
    pub(crate) fn waiting(lock: &dyn LockInfo) {
        /// Reading the holder has a cost.
        #[cold]
        fn emit(lock: &dyn LockInfo) {
            let (kind, name) = lock.label();
            let holder = lock.holder().map(|owner| owner.describe());
            debug!(target: "lockkit", kind, name, holder, "waiting");
        }
        if LevelFilter::current() >= LevelFilter::DEBUG {
            emit(lock);
        }
    }

    /// Reports that the lock was released.
    #[inline]
    pub(crate) fn released(lock: &dyn LockInfo) {
        #[cold]
        fn emit(lock: &dyn LockInfo) {
            let (kind, name) = lock.label();
            trace!(target: "lockkit", kind, name, "released");
        }
        if LevelFilter::current() >= LevelFilter::TRACE {
            emit(lock);
        }
    }

    /// Reports that the lease ended without an action of its holder.
    pub(crate) fn lost(lock: &dyn LockInfo, token: u64, reason: &dyn Display) {
        if is_on() {
            let (kind, name) = lock.label();
            error!(target: "lockkit", kind, name, token, %reason, "lost");
        }
    }

    struct Acquisition {
        kind: &'static str,
        name: String,
        since: Instant,
        span: Span,
    }

    impl Acquisition {
        #[cold]
        fn of(lock: &dyn LockInfo) -> Self {
            let (kind, name) = lock.label();
            let span = debug_span!(target: "lockkit", "acquire", kind, name);
            Self {
                kind,
                name,
                since: Instant::now(),
                span,
            }
        }

        #[cold]
        fn run<G: Guard>(self, take: impl FnOnce() -> Result<G>) -> Result<G> {
            self.span.in_scope(|| self.report(take()))
        }

        fn report<G: Guard>(&self, result: Result<G>) -> Result<G> {
            let Self {
                kind, name, since, ..
            } = self;
            let waited = since.elapsed().as_secs_f64();
            match &result {
                Ok(guard) => {
                    debug!(target: "lockkit", kind, name, waited, "acquired");
                    if let Some(recovered) = guard.recovered() {
                        warn!(target: "lockkit", kind, name, %recovered, "recovered");
                    }
                }
                Err(error) => debug!(target: "lockkit", kind, name, waited, %error, "not acquired"),
            }
            result
        }
    }
}

#[cfg(feature = "tracing")]
pub(crate) use enabled::*;

#[cfg(not(feature = "tracing"))]
mod disabled {
    use std::fmt::Display;

    use crate::base::error::Result;
    use crate::base::lock_info::LockInfo;

    #[inline(always)]
    pub(crate) fn is_on() -> bool {
        false
    }

    #[inline(always)]
    pub(crate) fn acquire<G>(_lock: &dyn LockInfo, take: impl FnOnce() -> Result<G>) -> Result<G> {
        take()
    }

    #[cfg(feature = "tokio")]
    pub(crate) fn acquire_async<G>(
        _lock: &dyn LockInfo,
        acquiring: impl Future<Output = Result<G>>,
    ) -> impl Future<Output = Result<G>> {
        acquiring
    }

    #[cfg(feature = "tokio")]
    pub(crate) fn in_current_span<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
        work
    }

    #[inline(always)]
    pub(crate) fn waiting(_lock: &dyn LockInfo) {}

    #[inline(always)]
    pub(crate) fn released(_lock: &dyn LockInfo) {}

    #[inline(always)]
    pub(crate) fn lost(_lock: &dyn LockInfo, _token: u64, _reason: &dyn Display) {}
}

#[cfg(not(feature = "tracing"))]
pub(crate) use disabled::*;
