//! `lockkit completions`: shell scripts that complete the command's arguments.

use std::io::Write;

use clap_complete::Shell;

use crate::failure::{Failure, Outcome, code};

/// Prints a script that completes lockkit's arguments in a shell.
#[derive(clap::Args)]
#[command(
    after_help = "Example: lockkit completions bash > ~/.local/share/bash-completion/completions/lockkit"
)]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    /// Prints the script for `command`, the whole command line.
    pub(crate) fn carry_out(self, command: &mut clap::Command) -> Outcome {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, command, "lockkit", &mut script);
        std::io::stdout()
            .write_all(&script)
            .map_err(|error| Failure::io("write the script", error))?;
        Ok(code::OK)
    }
}
