#![forbid(unsafe_code)]
#![deny(warnings)]

use std::process::ExitCode;

#[lockkit::single_instance("lockkit-ui-main-exit-code", exit_code = 0)]
fn main() -> ExitCode {
    ExitCode::SUCCESS
}
