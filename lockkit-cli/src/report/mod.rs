//! The information about one lock: its kind, its state and its holders, as text and as JSON.
//!
//! | module | contents |
//! |---|---|
//! | `form` | the form of a report, and its output |
//! | `at_path` | the reports about what is at a path |
//!
//! This module has the reports about what the command line names, and about named locks.

mod at_path;
mod form;

use std::path::Path;

use lockkit::{Backend, HeldNamedLock, Lease, NamedLock, Owner, Scope};

use crate::failure::Failure;
use crate::locks::FileLocks;
use crate::target::{self, ScopeArgument, Target};

pub(crate) use self::at_path::*;
use self::at_path::{Found, file, found_at, table, tried};
pub(crate) use self::form::*;

/// Returns the report of the lock at `place`. `locks` reads the kernel's information about locked
/// files if it is needed.
pub(crate) fn at(
    place: &Target,
    scope: ScopeArgument,
    locks: impl FnOnce() -> FileLocks,
) -> Result<Report, Failure> {
    match place {
        Target::Lease(lease) => of_lease(lease),
        Target::Name(name) => named(&target::named_or_file(name, scope)?),
        Target::Path(path) => at_path(&target::absolute(path)?, &locks()),
    }
}

/// Returns the report for an absolute path, as [`at`] does.
pub(crate) fn at_path(path: &Path, locks: &FileLocks) -> Result<Report, Failure> {
    match recognised(path, locks, true)? {
        Some(sight) => Ok(sight),
        None => file(path, locks),
    }
}

/// A lock whose state is read repeatedly: cheaply, and without blocking other processes.
pub(crate) struct Watched<'p> {
    place: &'p Target,
    scope: ScopeArgument,
    /// For a path. Kept, because a lease of another host counts as expired once it was seen
    /// unchanged for long enough.
    lease: Option<Lease>,
}

impl<'p> Watched<'p> {
    pub(crate) fn new(place: &'p Target, scope: ScopeArgument) -> Self {
        Self {
            place,
            scope,
            lease: None,
        }
    }

    pub(crate) fn state(&mut self) -> Result<State, Failure> {
        let path = match self.place {
            Target::Name(name) => {
                let usual = target::named_or_file(name, self.scope)?;
                // A lock that is kept in a file on request is another lock of the same name.
                let held = usual.is_held()? || filed(name, self.scope.into())?.is_held()?;
                return Ok(if held { State::Held } else { State::Free });
            }
            Target::Lease(lease) => return Ok(of_lease(lease)?.state),
            Target::Path(path) => target::absolute(path)?,
        };
        match found_at(&path)? {
            Found::Missing => Ok(State::Free),
            Found::Lease => {
                let lease = match &self.lease {
                    Some(lease) => lease,
                    None => self.lease.insert(Lease::file(&path).build()?),
                };
                Ok(of_lease(lease)?.state)
            }
            Found::Table => Ok(table(&path)?.state),
            Found::Pidfile => Ok(pidfile(&path)?.state),
            Found::Number(_) => match pidfile(&path)?.state {
                State::Held => Ok(State::Held),
                state => Ok(if tried(&path)?.is_some() {
                    State::Held
                } else {
                    state
                }),
            },
            Found::Plain => Ok(if tried(&path)?.is_some() {
                State::Held
            } else {
                State::Free
            }),
            Found::Special => Ok(file(&path, &FileLocks::read_table())?.state),
        }
    }
}

fn filed(name: &str, scope: Scope) -> Result<NamedLock, Failure> {
    Ok(NamedLock::builder(name)
        .scope(scope)
        .backend(Backend::File)
        .build()?)
}

pub(crate) fn named(lock: &NamedLock) -> Result<Report, Failure> {
    let sight = of_named(lock)?;
    if sight.state == State::Free && lock.backend() != Backend::File {
        let filed = filed(lock.name(), lock.scope())?;
        if filed.is_held()? {
            return of_named(&filed);
        }
    }
    Ok(sight)
}

/// Returns the report of one of a list of held locks, or `None` if the lock is known to be released
/// meanwhile.
pub(crate) fn of_held(held: &HeldNamedLock) -> Option<Report> {
    let mut sight = with_owner(held.lock(), State::Held, held.owner());
    if held.owner().is_none() {
        // Without a record the kernel may know more.
        match of_named(held.lock()) {
            Ok(asked) if asked.state == State::Free => return None,
            Ok(asked) => sight.holders = asked.holders,
            // The lock is held by a process that cannot be queried.
            Err(_) => {}
        }
    }
    sight.waiters = Some(held.waiters());
    Some(sight)
}

fn with_owner(lock: &NamedLock, state: State, owner: Option<&Owner>) -> Report {
    let mut sight = Report::new(Kind::Named, lock.name(), state);
    sight.scope = Some(match lock.scope() {
        Scope::Machine => "machine",
        _ => "user",
    });
    sight.holders = owner.map(Holder::new).into_iter().collect();
    sight
}

/// Returns the report of the lock of this backend only.
fn of_named(lock: &NamedLock) -> Result<Report, Failure> {
    let owner = lock.owner()?;
    // A name can be held by a process that cannot be looked up.
    let held = owner.is_some() || lock.is_held()?;
    let mut sight = with_owner(
        lock,
        if held { State::Held } else { State::Free },
        owner.as_ref(),
    );
    // Read after the owner. Reading the owner may take a place in the queue only if there is no
    // record.
    sight.waiters = lock.waiters().ok();
    Ok(sight)
}
