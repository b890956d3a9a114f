//! Supervises the program of `lockkit run`, so that the program and the lock end together; for
//! Windows.
//!
//! This process holds the lock, and puts itself into a job object. Every process that it starts is
//! in the job from the start. Only this process has a handle on the job. So when it is killed, the
//! system closes the job and ends the program, and everything that the program has started, with
//! it. In a short moment in between, the lock is free and the program not yet gone. A resource that
//! this can harm needs a lease, whose fencing token covers the moment. When the program ends by
//! itself, the job is set to let its remaining processes live, and the lock is released.
//!
//! Ctrl-C and Ctrl-Break reach every process of the console by themselves, so this process ignores
//! them: the program decides whether they end it. When the console is closed, this process waits
//! for the program for as long as the system permits.
//!
//! A lost lease ends the job at once, this process with it: no signal asks a program of Windows to
//! end.

use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;

use lockkit::CancelToken;

use crate::failure::{Failure, Outcome, code};
use crate::held_lock::{self, HeldLock, Job};
use crate::loss::LossPipe;
use crate::sys::{self, Cage};

/// There are no signals; until the program runs, Ctrl-C ends this process, and so the wait for the
/// lock.
pub(crate) struct Signals(());

impl Signals {
    pub(crate) fn block() -> Result<Self, Failure> {
        Ok(Self(()))
    }

    pub(crate) fn cancelling<T>(
        &self,
        _: &CancelToken,
        wait: impl FnOnce() -> T,
    ) -> Result<T, Failure> {
        Ok(wait())
    }

    pub(crate) fn first_if(&self, _: bool) -> Option<u8> {
        None
    }
}

/// Runs `lead` in this process: the processes that must end with it are in its job.
pub(crate) fn behind(lead: impl FnOnce() -> Outcome) -> Outcome {
    lead()
}

/// Returns false: Windows has no first process of a namespace.
pub(crate) fn is_first() -> bool {
    false
}

/// Runs the program under the lock, releases the lock, and returns the program's exit code.
pub(crate) fn run(mut hold: HeldLock, _: Signals, job: Job<'_>) -> Outcome {
    let cage = Arc::new(
        Cage::around_this_process().map_err(|error| Failure::io("make a job object", error))?,
    );
    let ended = run_in(&cage, &mut hold, &job);
    // Also after a failure, which is reported later: closing the job would end this process.
    cage.open();
    let code = ended?;
    let leads = matches!(hold, HeldLock::Lease(..));
    match hold.release() {
        Err(error) if !job.quiet && !leads => Failure::from(error).show(),
        _ => {}
    }
    // A code larger than a byte is also passed on unchanged.
    u8::try_from(code).or_else(|_| std::process::exit(code))
}

/// Runs the program in the job, and returns its exit code. After a failure the program does not
/// continue.
fn run_in(cage: &Arc<Cage>, hold: &mut HeldLock, job: &Job<'_>) -> Result<i32, Failure> {
    let [program, arguments @ ..] = job.command else {
        return Ok(code::USAGE.into());
    };
    sys::pass_over_interrupts().map_err(|error| Failure::io("take note of Ctrl-C", error))?;
    let mut command = Command::new(program);
    hold.tell(command.args(arguments));
    let mut child = command
        .spawn()
        .map_err(|error| held_lock::cannot_run(program, &error))?;
    if let Err(error) = hold.name_holder(child.id(), job.command) {
        let _ = child.kill();
        return Err(error);
    }
    if let HeldLock::Lease(_, LossPipe(loss)) = hold {
        let cage = cage.clone();
        // No thread reads the replacement channel; the sender lives in the lease, which outlives
        // this function.
        let loss = std::mem::replace(loss, channel().1);
        std::thread::spawn(move || {
            if let Ok(reason) = loss.recv() {
                Failure::new(
                    code::TEMPORARY,
                    format!("{reason}, so the program is ended"),
                )
                .show();
                cage.end_all(code::TEMPORARY.into());
            }
        });
    }
    let ended = child
        .wait()
        .map_err(|error| Failure::io("wait for the program", error))?;
    Ok(ended.code().unwrap_or_default())
}
