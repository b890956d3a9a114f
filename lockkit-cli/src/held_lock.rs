//! A lock that `lockkit run` holds for its program, on every system.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lockkit::{FileGuard, LeaseGuard, NamedGuard, Owner, PidGuard, Recovered};

use crate::failure::{Failure, code};
use crate::loss::LossPipe;
use crate::style::plain;

/// A lock that is held.
pub(crate) enum HeldLock {
    Named(NamedGuard),
    File(FileGuard),
    Pidfile(PidGuard),
    /// With the pipe that reports its loss.
    Lease(LeaseGuard, LossPipe),
}

/// The program to run.
#[derive(Clone, Copy)]
pub(crate) struct Job<'r> {
    pub(crate) command: &'r [OsString],
    /// The time that the program may take to end after a loss.
    #[cfg_attr(
        windows,
        expect(dead_code, reason = "nothing asks a program of Windows to end")
    )]
    pub(crate) grace: Duration,
    pub(crate) quiet: bool,
}

impl HeldLock {
    pub(crate) fn recovered(&self) -> Option<&Recovered> {
        match self {
            Self::Named(guard) => guard.recovered(),
            Self::File(guard) => guard.recovered(),
            Self::Pidfile(guard) => guard.recovered(),
            Self::Lease(guard, _) => guard.recovered(),
        }
    }

    /// Records that the program with this pid holds the lock.
    pub(crate) fn name_holder(&mut self, pid: u32, command: &[OsString]) -> Result<(), Failure> {
        // A program that has already ended needs no name.
        let owner = || Owner::of(pid).map(|owner| owner.with_program(program_name(command)));
        match self {
            Self::Named(guard) => owner().iter().for_each(|owner| guard.name_holder(owner)),
            Self::Pidfile(guard) => owner()
                .iter()
                .try_for_each(|owner| guard.rewrite_for(owner))?,
            Self::File(_) | Self::Lease(..) => {}
        }
        Ok(())
    }

    /// Passes to the program the fencing token, and the owner that died before.
    pub(crate) fn tell(&self, command: &mut Command) {
        if let Self::Lease(guard, _) = self {
            command.env("LOCKKIT_TOKEN", guard.token().to_string());
        }
        match self.recovered() {
            // A program may have any name, and a shell or a terminal may read the variable.
            Some(died) => command.env("LOCKKIT_RECOVERED", plain(&died.to_string())),
            None => command.env_remove("LOCKKIT_RECOVERED"),
        };
    }

    pub(crate) fn release(self) -> lockkit::Result<()> {
        match self {
            Self::Named(guard) => guard.release(),
            Self::File(guard) => guard.release(),
            Self::Pidfile(guard) => guard.release(),
            Self::Lease(guard, _) => guard.release(),
        }
    }
}

fn program_name(command: &[OsString]) -> String {
    let name = command.first().map(Path::new).and_then(Path::file_name);
    name.map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Returns the failure of a program that does not run, with its exit code.
pub(crate) fn cannot_run(program: &OsStr, error: &io::Error) -> Failure {
    let code = match error.kind() {
        io::ErrorKind::NotFound => code::NOT_FOUND,
        _ => code::CANNOT_RUN,
    };
    Failure::new(
        code,
        format!("cannot run {}: {error}", Path::new(program).display()),
    )
}
