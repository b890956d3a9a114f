//! `lockkit man`: the manual pages, one for each command.

use std::path::PathBuf;

use clap::CommandFactory;

use crate::failure::{Failure, Outcome, code};

/// Write the manual pages into a directory, one for each command.
#[derive(clap::Args)]
#[command(after_help = "Example: lockkit man ~/.local/share/man/man1 && man lockkit-run")]
pub(crate) struct Man {
    /// The directory, which is made if it is not there.
    directory: PathBuf,
}

impl Man {
    pub(crate) fn carry_out(self) -> Outcome {
        let failed = |error| Failure::io(format!("write manual pages into {}", self.directory.display()), error);
        std::fs::create_dir_all(&self.directory).map_err(failed)?;
        clap_mangen::generate_to(crate::Cli::command(), &self.directory).map_err(failed)?;
        Ok(code::OK)
    }
}
