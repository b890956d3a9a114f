#![deny(warnings, missing_docs, unused, unreachable_code)]
#![deny(rust_2018_idioms, let_underscore_drop, unreachable_pub, unused_qualifications, single_use_lifetimes)]
//! `on_second` beside each of the others, and among names that it must not be taken in by.

mod handlers {
    pub(super) fn opened(_: lockkit::Activation) {}
    pub(super) fn died(_: &lockkit::Recovered) {}
    pub(super) fn held(_: lockkit::Error) {}
}

mod with_a_result {
    #[lockkit::single_instance("lockkit-ui-on-second-a", on_second = super::handlers::opened, exit_code = 3)]
    pub(super) fn main() -> Result<(), String> {
        Ok(())
    }
}

mod with_all {
    use super::handlers;

    #[lockkit::single_instance(
        "lockkit-ui-on-second-b",
        scope = "user",
        wait = "forever",
        on_second = handlers::opened,
        on_held = handlers::held,
        on_recovered = handlers::died,
    )]
    pub(super) fn main() {}
}

mod hostile {
    #![allow(non_camel_case_types, unused)]
    struct Option;
    struct Some;
    struct None;
    struct Ok;
    struct Err;
    struct FirstInstance;
    mod core {}
    mod std {}
    mod lockkit {}

    #[::lockkit::single_instance("lockkit-ui-on-second-c", on_second = super::handlers::opened)]
    pub(super) fn main() {}
}

#[lockkit::single_instance("lockkit-ui-on-second", wait = "5s", on_second = handlers::opened)]
fn main() {
    with_a_result::main().expect("free");
    with_all::main();
    hostile::main();
}
