//! What the command `lockkit` needs of the library's system layer, and nobody else should use.

#[cfg(windows)]
pub use crate::sys::command::{Cage, end_at_a_closed_pipe, pass_over_interrupts};
#[cfg(unix)]
pub use crate::sys::command::{as_given, end_at_a_closed_pipe, fork, inherited, rename_process, wait_for_children};
