#![deny(warnings)]

#[lockkit::single_instance("lockkit-ui-main-result")]
fn main() -> Result<(), std::fmt::Error> {
    Err(std::fmt::Error).or(Ok(()))
}
