//! System calls that no crate offers without `unsafe`. All of the command's `unsafe` is in this
//! module.

#![allow(unsafe_code)]

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub(crate) use unix::{
    as_given, end_at_a_closed_pipe, fork, inherited, pipe, rename_process, wait_for_children,
};
#[cfg(windows)]
pub(crate) use windows::{Cage, end_at_a_closed_pipe, pass_over_interrupts};
