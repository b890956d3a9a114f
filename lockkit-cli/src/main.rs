//! `lockkit`, the command: runs a program under a lock, and shows the holders of locks.
//!
//! It serves people without Rust code, and the inspection of locks. Each subcommand is a module
//! with its arguments and its code. A module uses only modules below it:
//!
//! | floor | modules |
//! |---|---|
//! | subcommands | `run`, `flock`, `list`, `table`, `lease`, `status`, `wait`, `pidfile`, `doctor`, `completions`, `man` |
//! | the program of `run` | `supervise`, above `held_lock` (the lock), above `loss` (the report that a lease is lost) |
//! | the display of a wait | `progress` |
//! | the state of a lock | `report`, above `target` (how a command line names a lock) and `locks` (the kernel's lists) |
//! | base | `failure` (a failure as a sentence, and its exit code), `style` (colours), `sys` (system calls) |
//!
//! Called under the name `flock`, the command is flock(1): see `flock`.
//!
//! It works on Linux, where it uses pidfds, signalfd and /proc, and on Windows, where `flock` and
//! `doctor` do not exist.

#![deny(unsafe_code)]

#[cfg(not(any(target_os = "linux", windows)))]
compile_error!("the command `lockkit` needs Linux or Windows; the library does not");

mod completions;
#[cfg(target_os = "linux")]
mod doctor;
mod failure;
#[cfg(target_os = "linux")]
mod flock;
mod held_lock;
mod lease;
mod list;
mod locks;
mod loss;
mod man;
mod pidfile;
mod progress;
mod report;
mod run;
mod status;
mod style;
#[cfg_attr(windows, path = "supervise_windows.rs")]
mod supervise;
mod sys;
mod table;
mod target;
mod wait;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use failure::{Failure, Outcome, code};

/// Runs programs under locks between processes, and shows the holders of locks.
#[derive(Parser)]
#[command(name = "lockkit", version, styles = style::HELP, max_term_width = 100, after_help = EXAMPLES)]
#[command(subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  lockkit run --name backup -- rsync -a /home /mnt     Only one backup runs at a time.
  lockkit run --try --pidfile /run/app.pid -- app      Fails with 75 if app runs already.
  lockkit list                                         Shows the locks and their holders.
  lockkit status backup && echo free                   Exits with 0 if free, 1 if held, 2 if stale.
  lockkit doctor /srv/shared                           Shows which locks are reliable there.

Exit codes besides those of each command: 64 for invalid arguments, 65 for a file that is no lock, 66 for a missing \
file, 69 for a request that this build or system does not support, 74 for a failure of the system, 75 for a lock that is \
held, 77 for a missing permission.";

#[derive(Subcommand)]
enum Command {
    Run(run::Run),
    // Its arguments are flock(1)'s, which clap cannot parse.
    /// Does what flock(1) does, with its options, exit codes and messages.
    #[command(
        disable_help_flag = true,
        after_help = "Example: lockkit flock -n /tmp/backup.lock rsync -a /home /mnt"
    )]
    Flock {
        /// The arguments of flock(1); `lockkit flock --help` shows them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    List(list::List),
    Status(status::Status),
    Wait(wait::WaitFor),
    #[command(subcommand)]
    Pidfile(pidfile::Pidfile),
    #[command(subcommand)]
    Lease(lease::LeaseCommand),
    #[command(subcommand)]
    Table(table::Table),
    #[cfg(target_os = "linux")]
    Doctor(doctor::Doctor),
    /// Is not available on this system; docs/PLATFORM.md lists the reliable locks of each system.
    #[cfg(not(target_os = "linux"))]
    #[command(hide = true)]
    Doctor {
        /// Directories.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    Completions(completions::Completions),
    Man(man::Man),
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let called = arguments.next().unwrap_or_default();
    #[cfg(target_os = "linux")]
    if std::path::Path::new(&called)
        .file_name()
        .is_some_and(|name| name == "flock")
    {
        return flock::main(&called, arguments.collect());
    }
    let mut arguments = arguments.peekable();
    // Before clap, which would handle `--help` and unknown options itself.
    #[cfg(target_os = "linux")]
    if arguments.next_if(|first| first == "flock").is_some() {
        return flock::main("flock".as_ref(), arguments.collect());
    }
    if arguments.next_if(|first| first == "run").is_some() {
        // Its arguments alone: building the arguments of all commands would take longer than
        // everything else before the program runs.
        let command = clap::Command::new("lockkit-run")
            .bin_name("lockkit run")
            .no_binary_name(true);
        let command = run::Run::augment_args(command)
            .styles(style::HELP)
            .max_term_width(100);
        return end(
            match command
                .try_get_matches_from(arguments)
                .and_then(|found| run::Run::from_arg_matches(&found))
            {
                Ok(run) => run.carry_out(),
                Err(error) => misused(&error, "lockkit run --name backup -- rsync -a /home /mnt"),
            },
        );
    }
    sys::end_at_a_closed_pipe();
    let given: Vec<_> = [called].into_iter().chain(arguments).collect();
    let parsed = Cli::command()
        .try_get_matches_from(&given)
        .and_then(|found| Cli::from_arg_matches(&found));
    end(match parsed {
        Ok(cli) => cli.command.carry_out(),
        Err(error) => misused(&error, &example_for(&given)),
    })
}

/// Prints the error in the arguments, or the requested help or version.
fn misused(error: &clap::Error, example: &str) -> Outcome {
    let _ = error.print();
    if !error.use_stderr() {
        return Ok(code::OK);
    }
    failure::note(format_args!("For example: {example}"));
    // Clap's own code means a stale lock here.
    Ok(code::USAGE)
}

/// Returns the first example in the help of the intended command.
fn example_for(given: &[OsString]) -> String {
    let mut command = Cli::command();
    for argument in given.iter().skip(1) {
        match command.find_subcommand(argument) {
            Some(found) => command = found.clone(),
            None => break,
        }
    }
    let help = command
        .get_after_help()
        .map(ToString::to_string)
        .unwrap_or_default();
    let line = help
        .lines()
        .find_map(|line| line.find("lockkit ").map(|at| &line[at..]))
        .unwrap_or("lockkit --help");
    line.split("   ")
        .next()
        .unwrap_or(line)
        .trim_end()
        .to_owned()
}

fn end(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.show();
            ExitCode::from(failure.code())
        }
    }
}

impl Command {
    fn carry_out(self) -> Outcome {
        match self {
            Self::Run(run) => run.carry_out(),
            #[cfg(target_os = "linux")]
            Self::Flock { .. } => Err(Failure::usage(
                "flock is called by its name: lockkit flock FILE COMMAND",
            )),
            #[cfg(not(target_os = "linux"))]
            Self::Flock { .. } => Err(Failure::new(
                code::UNAVAILABLE,
                "flock(1) is not a command of this system",
            )
            .example("lockkit run --file backup.lock -- CMD")),
            Self::List(list) => list.carry_out(),
            Self::Status(status) => status.carry_out(),
            Self::Wait(wait) => wait.carry_out(),
            Self::Pidfile(pidfile) => pidfile.carry_out(),
            Self::Lease(lease) => lease.carry_out(),
            Self::Table(table) => table.carry_out(),
            #[cfg(target_os = "linux")]
            Self::Doctor(doctor) => doctor.carry_out(),
            #[cfg(not(target_os = "linux"))]
            Self::Doctor { .. } => Err(Failure::new(
                code::UNAVAILABLE,
                "doctor tries what only Linux has",
            )),
            Self::Completions(completions) => completions.carry_out(&mut Cli::command()),
            Self::Man(man) => man.carry_out(Cli::command()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argument_definitions_are_consistent() {
        Cli::command().debug_assert();
    }
}
