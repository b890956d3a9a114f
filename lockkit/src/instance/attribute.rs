//! The functions that `#[single_instance]` calls: acquiring a name at the start of a function, and
//! reporting that it is held.
//!
//! Programs need only the documented items. The rest is for the code that the attribute writes.
//! That code acquires a name with `enter`, or with `enter_or_activate` if it has `on_second`. If
//! that fails, it leaves the function: `main` by `exit`, others by returning a [`Refusal`].
//! Functions that wait for ever and return another type leave by `give_up`.

use std::io::Write;
use std::marker::PhantomData;
use std::time::Duration;

#[cfg(target_os = "linux")]
use super::activation::Activation;
#[cfg(target_os = "linux")]
use super::enter::Instance;
#[cfg(target_os = "linux")]
use super::first::FirstInstance;
#[cfg(target_os = "linux")]
use super::second::Outcome;
use crate::base::error::{Error, ErrorKind, Result, chain};
use crate::base::guard::Recovered;
use crate::base::wait::Wait;
use crate::named::{NamedGuard, NamedLock, Scope};

/// The exit code of a single-instance `main` if the name is held, unless `exit_code` is given:
/// `EX_TEMPFAIL` of [sysexits.h](https://man7.org/linux/man-pages/man3/sysexits.h.3head.html), "try
/// again later".
pub const EXIT_HELD: i32 = 75;

/// The exit code of a single-instance `main` if the name could not be tried at all: `EX_OSERR` of
/// [sysexits.h](https://man7.org/linux/man-pages/man3/sysexits.h.3head.html).
pub const EXIT_FAILED: i32 = 71;

/// The result of a function with `#[single_instance]` if the name is held: `Err` of the error, or
/// `None`.
///
/// Implement it for your own return type that can express this:
/// ```
/// use lockkit::instance::Refusal;
///
/// enum Outcome {
///     Done,
///     Skipped,
/// }
///
/// impl Refusal for Outcome {
///     fn refused(_: lockkit::Error) -> Self {
///         Self::Skipped
///     }
/// }
///
/// # #[cfg(feature = "macros")]
/// #[lockkit::single_instance("lockkit-doc-outcome")]
/// fn work() -> Outcome {
///     Outcome::Done
/// }
/// ```
// The compiler would list these impls, or their bounds, instead of the notes below, which are
// complete.
#[diagnostic::on_unimplemented(
    message = "a function with `#[single_instance]` must be able to return that the name is held",
    label = "`{Self}` cannot say that the name is held",
    note = "a `Result<_, E>` can if `E: From<lockkit::Error>`, and an `Option<_>` always can",
    note = "or wait for the name with `wait = \"forever\"`, or say what to return with `on_held = path::to::handler`"
)]
pub trait Refusal {
    /// Returns the value that reports the error.
    fn refused(error: Error) -> Self;
}

#[diagnostic::do_not_recommend]
impl<T, E: From<Error>> Refusal for std::result::Result<T, E> {
    fn refused(error: Error) -> Self {
        Err(error.into())
    }
}

#[diagnostic::do_not_recommend]
impl<T> Refusal for Option<T> {
    fn refused(_: Error) -> Self {
        None
    }
}

/// The return type `R` of a function that waits for ever, found by inference. Such a function may
/// return any type: it passes the error on if `R` is a [`Refusal`], and gives up otherwise.
///
/// `value` is never called: its `return` only makes the compiler infer `R`. Then `refuse` is the
/// method here if `R` is a `Refusal`, because methods of a type take precedence over those of a
/// trait. Otherwise it is that of [`OrGiveUp`].
#[doc(hidden)]
#[derive(Debug, Default)]
pub struct Returns<R>(PhantomData<fn() -> R>);

impl<R> Returns<R> {
    pub const fn new() -> Self {
        Self(PhantomData)
    }

    pub fn value(&self) -> R {
        unreachable!("it only names a type")
    }
}

impl<R: Refusal> Returns<R> {
    pub fn refuse(&self, error: Error) -> R {
        R::refused(error)
    }
}

#[doc(hidden)]
pub trait OrGiveUp {
    fn refuse(&self, error: Error) -> !;
}

impl<R> OrGiveUp for Returns<R> {
    fn refuse(&self, error: Error) -> ! {
        give_up(&error)
    }
}

/// The names of the standard library that the attribute writes.
#[doc(hidden)]
pub mod standard {
    pub use core::option::Option::{None, Some};
    pub use core::primitive::str;
    pub use core::result::Result::{Err, Ok};
    pub use core::time::Duration;
}

/// Fails to compile unless `name` obeys the rule of lock names.
#[doc(hidden)]
#[track_caller]
pub const fn checked_name(name: &'static str) -> &'static str {
    match crate::base::name::check(name) {
        Ok(()) => name,
        Err(rule) => panic!("{}", rule),
    }
}

/// Acquires the name as the attribute's arguments say; a `wait` of `None` means for ever.
#[doc(hidden)]
pub fn enter(name: &'static str, scope: Scope, wait: Option<Duration>) -> Result<NamedGuard> {
    NamedLock::builder(name)
        .scope(scope)
        .build()?
        .acquire(&wait_for(wait))
}

fn wait_for(limit: Option<Duration>) -> Wait {
    match limit {
        None => Wait::forever(),
        Some(Duration::ZERO) => Wait::none(),
        Some(limit) => Wait::at_most(limit),
    }
}

/// The time that a second start of a program with `on_second` waits for the first instance to
/// answer, unless `wait` is given.
#[cfg(target_os = "linux")]
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// The variables that a desktop gives to a program that it starts, so that a window may come to the
/// front. The first instance needs them instead of the second
/// ([xdg-activation](https://wayland.app/protocols/xdg-activation-v1), and [startup
/// notification](https://specifications.freedesktop.org/startup-notification-spec/)).
#[cfg(target_os = "linux")]
pub const ACTIVATION_VARIABLES: [&str; 2] = ["XDG_ACTIVATION_TOKEN", "DESKTOP_STARTUP_ID"];

/// Acquires the name for a function with `on_second`, or hands this start over to the holder of the
/// name and ends the process. Calls `on_first` before the first activation is received.
#[cfg(target_os = "linux")]
#[doc(hidden)]
pub fn enter_or_activate(
    name: &'static str,
    wait: Option<Duration>,
    on_first: fn(&FirstInstance),
    on_second: fn(Activation),
) -> Result<FirstInstance> {
    let first = match Instance::enter(name)? {
        Instance::First(first) => first,
        Instance::Second(second) => match second
            .variables(ACTIVATION_VARIABLES)
            .activate(&wait_for(wait))?
        {
            Outcome::Answered(_) => std::process::exit(0),
            Outcome::BecameFirst(first) => first,
        },
    };
    on_first(&first);
    first.on_activation(on_second)?;
    Ok(first)
}

/// Prints on standard error why the program does not start, and exits.
#[doc(hidden)]
pub fn exit(name: &str, error: &Error, exit_held: i32) -> ! {
    if !(error.is_held() || error.is_timeout()) {
        print_error(&format!("{name} cannot start: {}", chain(error)));
        std::process::exit(EXIT_FAILED);
    }
    let suffix = match error.kind() {
        ErrorKind::NoAnswer { .. } => ", but does not answer",
        _ => "",
    };
    match error.owner() {
        Some(owner) => print_error(&format!(
            "{name} is already running{suffix}: {}",
            owner.describe()
        )),
        None => print_error(&format!("{name} is already running{suffix}")),
    }
    std::process::exit(exit_held)
}

/// Prints on standard error that the previous owner died.
#[doc(hidden)]
pub fn tell_recovered(name: &str, recovered: &Recovered) {
    print_error(&format!(
        "{name}: the last owner died without releasing it: {recovered}"
    ));
}

/// Panics, for a function that waits for ever and cannot return an error.
#[doc(hidden)]
pub fn give_up(error: &Error) -> ! {
    panic!(
        "#[single_instance] cannot acquire its name: {}",
        chain(error)
    )
}

fn print_error(line: &str) {
    // A closed standard error is no reason to fail.
    let _ = writeln!(std::io::stderr(), "{line}");
}
