//! `lockkit lease`: shows a lease, and releases or steals it.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

use lockkit::lease::LeaseSnapshot;
use lockkit::{Lease, LeaseStatus};

use crate::failure::{Failure, Outcome, code};
use crate::report;
use crate::status::Form;
use crate::target;

/// Shows leases, and releases them or takes them from their holders.
#[derive(clap::Subcommand)]
#[command(after_help = "Example: lockkit lease show /srv/shared/leader")]
pub(crate) enum LeaseCommand {
    /// Shows the holder of a lease, its token, and the remaining time. Exits with 0 if free, 1 if
    /// held, 2 if stale.
    #[command(after_help = "Example: lockkit lease show file:///srv/shared/leader --json")]
    Show {
        /// The lease.
        #[arg(value_name = "PATH|URL")]
        lease: OsString,
        /// Writes JSON: {"version":1,"lock":{…}}; see docs/CLI.md.
        #[arg(long)]
        json: bool,
    },
    /// Releases a stale lease, or a held lease whose token is given.
    ///
    /// A held lease is released only with its token. lockkit run passes the token to its program as
    /// LOCKKIT_TOKEN. The command steal takes a lease from its holder without the token.
    #[command(
        after_help = "Example: lockkit lease release /srv/shared/leader --token \"$LOCKKIT_TOKEN\""
    )]
    Release {
        /// The lease.
        #[arg(value_name = "PATH|URL")]
        lease: OsString,
        /// The token of the holder.
        #[arg(long, value_name = "N")]
        token: Option<u64>,
    },
    /// Takes a lease from its holder, and leaves it free.
    ///
    /// The holder is not asked. It notices the loss at its next heartbeat, and acts as the holder
    /// until then. Before the call, stop the holder, or make sure that the guarded resource rejects
    /// an old token.
    #[command(after_help = "Example: lockkit lease steal /srv/shared/leader --yes")]
    Steal {
        /// The lease.
        #[arg(value_name = "PATH|URL")]
        lease: OsString,
        /// Does not ask for a confirmation.
        #[arg(long, short)]
        yes: bool,
    },
}

impl LeaseCommand {
    pub(crate) fn carry_out(self) -> Outcome {
        match self {
            Self::Show { lease, json } => {
                let sight = report::of_lease(&target::lease(&lease, |builder| builder)?)?;
                match json {
                    true => report::json(&Form {
                        version: report::VERSION,
                        lock: &sight,
                    })?,
                    false => report::say(|mut out| sight.show(&mut out))?,
                }
                Ok(sight.state.code())
            }
            Self::Release { lease, token } => release(&lease, token),
            Self::Steal { lease, yes } => steal(&lease, yes),
        }
    }
}

fn held(lease: &Lease) -> Result<Option<LeaseSnapshot>, Failure> {
    Ok(match lease.status()? {
        LeaseStatus::Held(seen) => Some(seen),
        _ => None,
    })
}

fn owner(seen: &LeaseSnapshot) -> String {
    seen.owner()
        .map_or_else(|| "an unknown process".to_owned(), lockkit::Owner::describe)
}

fn release(url: &OsStr, token: Option<u64>) -> Outcome {
    let lease = target::lease(url, |builder| builder)?;
    let Some(seen) = held(&lease)? else {
        return tell(&format!("The lease {} is free already.", lease.name()));
    };
    let is_over = seen.expires_in().is_some_and(|left| left.is_zero());
    if !is_over && (token.is_none() || token != seen.token()) {
        let message = match token {
            Some(token) => format!(
                "the lease {} is held by {} under the token {}, not {token}",
                lease.name(),
                owner(&seen),
                seen.token().unwrap_or_default()
            ),
            None => format!(
                "the lease {} is held by {}, and only its token releases it",
                lease.name(),
                owner(&seen)
            ),
        };
        return Err(Failure::new(code::TEMPORARY, message)
            .example(format!("lockkit lease steal {}", Path::new(url).display())));
    }
    evict(&lease, &seen, "released")
}

fn steal(url: &OsStr, yes: bool) -> Outcome {
    let lease = target::lease(url, |builder| builder)?;
    let Some(seen) = held(&lease)? else {
        return tell(&format!("The lease {} is free already.", lease.name()));
    };
    if !yes
        && !confirmed(&format!(
            "Take the lease {} from {}?",
            lease.name(),
            owner(&seen)
        ))?
    {
        return Err(Failure::new(code::TEMPORARY, "the lease was left as it is"));
    }
    evict(&lease, &seen, "taken")
}

fn evict(lease: &Lease, seen: &LeaseSnapshot, done: &str) -> Outcome {
    match lease.evict(seen)? {
        true => tell(&format!(
            "The lease {} was {done} from {}, and is free.",
            lease.name(),
            owner(seen)
        )),
        false => {
            let message = format!(
                "the lease {} has changed hands just now, and was left as it is",
                lease.name()
            );
            Err(Failure::new(code::TEMPORARY, message)
                .example(format!("lockkit lease show {}", lease.name())))
        }
    }
}

fn tell(text: &str) -> Outcome {
    report::say(|out| writeln!(out, "{text}"))?;
    Ok(code::OK)
}

/// Asks on the terminal. Without a terminal there can be no answer, so it fails.
pub(crate) fn confirmed(question: &str) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        let message = format!("{question} There is no terminal to ask on; say so with --yes");
        return Err(Failure::usage(message));
    }
    let failed = |error| Failure::io("ask", error);
    let mut stderr = std::io::stderr().lock();
    write!(stderr, "{question} [y/N] ").map_err(failed)?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(failed)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}
