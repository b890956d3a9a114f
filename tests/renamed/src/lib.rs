//! Functions with `#[single_instance]` in a crate that has no `lockkit`.

/// What passes lockkit on under a path of its own.
pub mod reexported {
    pub use lk as locks;
}

/// By the name of the dependency.
///
/// # Errors
/// That the name is held.
#[lk::single_instance("lockkit-test-renamed", crate = "lk")]
pub fn by_name() -> lk::Result<u8> {
    Ok(1)
}

/// By a path, which need be no string.
#[lk::single_instance("lockkit-test-renamed", crate = crate::reexported::locks)]
pub fn by_path() -> Option<u8> {
    Some(2)
}

/// With every argument of the attribute.
#[lk::single_instance(
    "lockkit-test-renamed",
    crate = "::lk",
    scope = "user",
    wait = "1s",
    on_held = refused,
    on_recovered = repair
)]
pub fn with_handlers() -> u8 {
    3
}

fn refused(_: lk::Error) -> u8 {
    0
}

fn repair(_: &lk::Recovered) {}

/// One that waits for ever, and returns nothing.
#[lk::single_instance("lockkit-test-renamed", crate = "lk", wait = "forever")]
pub fn forever() {}

/// One that waits for ever, and returns something.
#[lk::single_instance("lockkit-test-renamed", crate = "lk", wait = "forever")]
pub fn something() -> u8 {
    4
}

/// A `main`.
pub mod program {
    /// Its own.
    #[lk::single_instance("lockkit-test-renamed", crate = "lk", exit_code = 3)]
    pub fn main() {}

    /// One that takes second starts.
    #[cfg(target_os = "linux")]
    pub mod second {
        /// Its own.
        #[lk::single_instance("lockkit-test-renamed-second", crate = "lk", on_second = again)]
        pub fn main() {}

        fn again(_: lk::Activation) {}
    }
}
