//! Everything that differs from system to system, and everything `unsafe`.
//!
//! One small module per mechanism, each a safe interface over what the kernel offers:
//!
//! | module | mechanism | behind |
//! |---|---|---|
//! | [`event`] | an event to wait for beside a descriptor | cancellation |
//! | [`flock`] | whole-file locks, through `fs2` | file locks |
//! | [`folder`] | the private folders, at fixed places | named locks |
//! | [`fork`] | descriptors that a forked child does not keep | every held lock |
//! | [`mapping`] | shared memory as atomic words | what a crash leaves behind |
//! | [`process`] | which process is which, and whether it lives | owners |
//! | [`seqpacket`] | abstract sockets that hand themselves over | named locks on Linux |
//! | [`slot`] | a value that one thread at a time takes | kept descriptors |
//! | [`unnamed`] | files that are complete before they have a name | pidfiles |

#![allow(unsafe_code)]

pub(crate) mod event;
pub(crate) mod flock;
pub(crate) mod folder;
pub(crate) mod fork;
pub(crate) mod mapping;
pub(crate) mod process;
#[cfg(target_os = "linux")]
pub(crate) mod seqpacket;
pub(crate) mod slot;
pub(crate) mod unnamed;
