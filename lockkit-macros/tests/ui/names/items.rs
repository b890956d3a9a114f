//! No item of the user's is taken for something of the attribute's, nor the other way round.

#![allow(unused_imports, non_upper_case_globals, non_camel_case_types, dead_code, unused_macros)]

const __guard: u8 = 1;
static __error: u8 = 2;
struct __recovered;
fn __returns() {}
const __LOCKKIT_NAME: &::core::primitive::str = "lockkit-ui-hygienic";
const guard: u8 = 3;
const error: u8 = 4;
const wait: u8 = 5;
const name: &::core::primitive::str = "another";

mod core {}
mod std {}
mod alloc {}
mod lockkit {}
mod instance {}
struct Option;
struct Result;
struct Duration;
struct str;
enum Of {
    Some,
    None,
    Ok,
    Err,
}
use Of::*;
trait Refusal {
    fn refused(&self) {}
    fn value(&self) {}
    fn recovered(&self) {}
}
impl<T> Refusal for T {}
macro_rules! panic {
    () => {
        compile_error!("the user's own")
    };
}
macro_rules! unreachable {
    () => {
        compile_error!("the user's own")
    };
}

type Outcome = ::core::result::Result<u8, ::lockkit::Error>;

#[::lockkit::single_instance(__LOCKKIT_NAME)]
fn held() -> Outcome {
    ::core::result::Result::Ok(__guard + __error + guard + error + wait)
}

#[::lockkit::single_instance("lockkit-ui-hygienic", wait = "forever")]
fn waits() -> u8 {
    __guard
}

#[::lockkit::single_instance("lockkit-ui-hygienic", wait = "5s", on_held = __error::__guard, on_recovered = repair::<u8>)]
fn handled() -> u8 {
    __guard
}

mod __error {
    pub fn __guard(_: ::lockkit::Error) -> u8 {
        0
    }
}

fn repair<T>(_: &::lockkit::Recovered) {}

struct Job<const __guard: usize>;

impl<const __guard: usize> Job<__guard> {
    const __error: usize = __guard;

    #[::lockkit::single_instance("lockkit-ui-hygienic")]
    fn run<__recovered, const __error: usize>(&self, _: __recovered) -> ::core::option::Option<usize> {
        ::core::option::Option::Some(__guard + __error + Self::__error)
    }
}

#[::lockkit::single_instance("lockkit-ui-hygienic-main", on_second = again)]
fn main() {
    assert_eq!(held().ok(), ::core::option::Option::Some(15));
    assert_eq!((waits(), handled()), (1, 1));
    assert_eq!(Job::<2>.run::<_, 3>(()), ::core::option::Option::Some(7));
}

fn again(_: ::lockkit::Activation) {}
