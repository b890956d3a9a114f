//! `lockkit man`: the manual pages, one for each command.

use std::path::PathBuf;

use crate::failure::{Failure, Outcome, code};

/// Writes the manual pages into a directory, one for each command.
#[derive(clap::Args)]
#[command(after_help = "Example: lockkit man ~/.local/share/man/man1 && man lockkit-run")]
pub(crate) struct Man {
    /// The directory. It is created if it is missing.
    directory: PathBuf,
}

impl Man {
    /// Writes the pages of `command`, the whole command line.
    pub(crate) fn carry_out(self, command: clap::Command) -> Outcome {
        let failed = |error| {
            Failure::io(
                format!("write manual pages into {}", self.directory.display()),
                error,
            )
        };
        std::fs::create_dir_all(&self.directory).map_err(failed)?;
        clap_mangen::generate_to(command, &self.directory).map_err(failed)?;
        Ok(code::OK)
    }
}
