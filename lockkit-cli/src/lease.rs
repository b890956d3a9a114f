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

/// Look at leases, and take them from who has them.
#[derive(clap::Subcommand)]
#[command(after_help = "Example: lockkit lease show /srv/shared/leader")]
pub(crate) enum LeaseCommand {
    /// Show who holds a lease, under which token, and for how long. Exits as status does: 0 free, 1 held, 2 stale.
    #[command(after_help = "Example: lockkit lease show file:///srv/shared/leader --json")]
    Show {
        /// The lease.
        #[arg(value_name = "PATH|URL")]
        lease: OsString,
        /// Write JSON: {"version":1,"lock":{…}}, as docs/CLI.md has it.
        #[arg(long)]
        json: bool,
    },
    /// Make a lease free that nobody has a use for: one that is stale, or one whose token you know.
    ///
    /// A lease that somebody holds is only released with its token, which lockkit run gives to its program as
    /// LOCKKIT_TOKEN. To take it from a holder, use steal.
    #[command(after_help = "Example: lockkit lease release /srv/shared/leader --token \"$LOCKKIT_TOKEN\"")]
    Release {
        /// The lease.
        #[arg(value_name = "PATH|URL")]
        lease: OsString,
        /// The token under which it is held.
        #[arg(long, value_name = "N")]
        token: Option<u64>,
    },
    /// Take a lease from its holder, and leave it free.
    ///
    /// The holder is not asked. It learns of it at its next heartbeat, and until then believes that it holds the lease:
    /// make sure that it is gone, or that what the lease guards refuses an old token.
    #[command(after_help = "Example: lockkit lease steal /srv/shared/leader --yes")]
    Steal {
        /// The lease.
        #[arg(value_name = "PATH|URL")]
        lease: OsString,
        /// Do not ask.
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
                    true => report::json(&Form { version: report::VERSION, lock: &sight })?,
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
    seen.owner().map_or_else(|| "an unknown process".to_owned(), lockkit::Owner::describe)
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
            None => format!("the lease {} is held by {}, and only its token releases it", lease.name(), owner(&seen)),
        };
        return Err(
            Failure::new(code::TEMPORARY, message).example(format!("lockkit lease steal {}", Path::new(url).display()))
        );
    }
    evict(&lease, &seen, "released")
}

fn steal(url: &OsStr, yes: bool) -> Outcome {
    let lease = target::lease(url, |builder| builder)?;
    let Some(seen) = held(&lease)? else {
        return tell(&format!("The lease {} is free already.", lease.name()));
    };
    if !yes && !confirmed(&format!("Take the lease {} from {}?", lease.name(), owner(&seen)))? {
        return Err(Failure::new(code::TEMPORARY, "the lease was left as it is"));
    }
    evict(&lease, &seen, "taken")
}

fn evict(lease: &Lease, seen: &LeaseSnapshot, done: &str) -> Outcome {
    match lease.evict(seen)? {
        true => tell(&format!("The lease {} was {done} from {}, and is free.", lease.name(), owner(seen))),
        false => {
            let message = format!("the lease {} has changed hands just now, and was left as it is", lease.name());
            Err(Failure::new(code::TEMPORARY, message).example(format!("lockkit lease show {}", lease.name())))
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
    std::io::stdin().lock().read_line(&mut answer).map_err(failed)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}
