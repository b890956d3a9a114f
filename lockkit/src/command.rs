//! What the command `lockkit` needs of the library's system layer, and nobody else should use.

pub use crate::sys::command::{as_given, end_at_a_closed_pipe, fork, inherited, rename_process, wait_for_children};
