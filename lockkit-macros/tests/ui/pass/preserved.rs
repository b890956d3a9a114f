//! Whatever a function is made of stays, and no lint finds anything in what the attribute adds.

#![deny(warnings, missing_docs, unused, unreachable_code)]
#![deny(rust_2018_idioms, let_underscore_drop, unreachable_pub, unused_qualifications, single_use_lifetimes)]
#![forbid(unsafe_op_in_unsafe_fn)]

use lockkit::single_instance;

/// Documented.
#[single_instance("lockkit-ui-documented")]
#[must_use]
#[inline]
pub fn documented() -> Option<u8> {
    //! Inside, too.
    #![allow(unused_variables)]
    let unused = 1;
    Some(2)
}

#[single_instance("lockkit-ui-unsafe")]
#[allow(unused)]
pub(crate) unsafe extern "C" fn unsafe_extern(pointer: *const u8) -> Option<&'static u8> {
    // SAFETY: the caller's duty.
    Some(unsafe { &*pointer })
}

#[single_instance("lockkit-ui-generic")]
fn generic<'a, T, const N: usize>(all: &'a [T; N], _: &str) -> lockkit::Result<&'a T>
where
    T: Clone + 'a,
{
    Ok(&all[0])
}

#[cfg(any())]
#[single_instance("lockkit-ui-cfg")]
fn absent() -> NoSuchType {}

#[cfg_attr(all(), single_instance("lockkit-ui-cfg-attr"))]
fn conditional() -> Option<()> {
    Some(())
}

struct Job<'j>(&'j str);

impl<'j> Job<'j> {
    #[single_instance("lockkit-ui-method")]
    fn by_reference(&self) -> Option<&'j str> {
        Some(self.0)
    }

    #[single_instance("lockkit-ui-method")]
    fn by_mutable(self: &mut Self, text: &'j str) -> Option<()> {
        self.0 = text;
        Some(())
    }

    #[single_instance("lockkit-ui-method", wait = "forever")]
    fn by_value(mut self) -> Self {
        self.0 = "";
        self
    }

    #[single_instance("lockkit-ui-method", on_held = Self::held)]
    fn with_own_handler() -> u8 {
        1
    }

    fn held(_: lockkit::Error) -> u8 {
        0
    }
}

trait Run {
    #[single_instance("lockkit-ui-default")]
    fn provided(&self) -> Option<()> {
        Some(())
    }
    fn required(&self) -> Option<()>;
}

impl Run for Job<'_> {
    #[single_instance("lockkit-ui-required")]
    fn required(&self) -> Option<()> {
        Some(())
    }
}

#[single_instance("lockkit-ui-never", wait = "forever")]
#[allow(dead_code)]
fn never() -> ! {
    std::process::exit(0)
}

#[single_instance("lockkit-ui-other-error", wait = "forever")]
fn no_error_of_ours() -> Result<u8, String> {
    Ok(8)
}

#[single_instance("lockkit-ui-async", wait = "forever")]
async fn future<T: Clone>(value: &T) -> Vec<T> {
    std::future::ready(()).await;
    vec![value.clone()]
}

fn is_send<T: Send>(_: &T) -> bool {
    true
}

/// Names that the attribute must neither take nor be taken in by.
mod hostile {
    #![allow(non_camel_case_types, non_upper_case_globals, unused)]
    struct str;
    struct Result;
    struct Option;
    struct Some;
    struct None;
    struct Ok;
    struct Err;
    struct guard;
    const error: u8 = 1;
    mod core {}
    mod std {}
    mod lockkit {}
    const NAME: &::core::primitive::str = "lockkit-ui-hostile";

    #[::lockkit::single_instance(NAME, wait = "5s")]
    pub(super) fn function() -> ::core::option::Option<u8> {
        ::core::option::Option::Some(error)
    }
}

macro_rules! job {
    ($name:literal, $wait:literal, $job:ident, $result:ty, $held:path, $body:block) => {
        #[single_instance($name, wait = $wait, on_held = $held)]
        fn $job() -> $result $body
    };
    ($name:expr, $job:ident, $result:ty) => {
        #[single_instance($name, scope = "machine",)]
        fn $job() -> $result {
            None
        }
    };
}

fn zero(_: lockkit::Error) -> u8 {
    0
}

job!("lockkit-ui-macro", "1m 30s", made_by_a_macro, u8, zero, { 7 });
job!(concat!("lockkit-ui-", "concat"), named_by_a_macro, Option<u8>);

#[single_instance(env!("CARGO_PKG_NAME"))]
fn named_as_the_package() -> Option<()> {
    Some(())
}

#[single_instance("lockkit-ui-items")]
fn with_items() -> Option<u8> {
    const ONE: u8 = 1;
    use std::convert::identity;
    fn two() -> u8 {
        2
    }
    Some(identity(ONE) + two())
}

fn leave(_: lockkit::Error) -> ! {
    std::process::exit(3)
}

fn ignore(_: &lockkit::Recovered) {}

#[single_instance("lockkit-ui-main", scope = "user", wait = "250ms", on_held = leave, on_recovered = ignore)]
fn main() {
    assert_eq!(documented(), Some(2));
    assert_eq!(generic(&[1], "").ok(), Some(&1));
    assert_eq!(conditional(), Some(()));
    let mut job = Job("a");
    assert_eq!(job.by_mutable("b"), Some(()));
    assert_eq!(job.by_reference(), Some("b"));
    assert_eq!((job.provided(), job.required()), (Some(()), Some(())));
    assert_eq!(job.by_value().0, "");
    assert_eq!(Job::with_own_handler(), 1);
    assert_eq!(hostile::function(), Some(1));
    assert_eq!(made_by_a_macro(), 7);
    assert_eq!(named_by_a_macro(), None);
    assert_eq!(named_as_the_package(), Some(()));
    assert_eq!(no_error_of_ours(), Ok(8));
    assert!(is_send(&future(&1)));
    assert_eq!(with_items(), Some(3));
}
