//! Links, owners and modes of the file and of its directories.

use std::fs;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockkit::{ErrorKind, Lease, LeaseStatus};
use lockkit_tests::leases::Terms;
use lockkit_tests::{Actor, another_user};

use crate::fixture::{acquire, is_held, read, temp_lease, token, token_after, wait_for_heartbeats};
use crate::store::MemoryStore;

#[test]
fn record_link_refused_directory_link_is_same_lease() {
    let (directory, terms) = temp_lease();
    let at = |name: &str| Terms::of(directory.path().join(name));
    let mut holder = Actor::start_lease(&terms);
    acquire(&mut holder, "try");
    symlink(directory.path(), directory.path().join("here")).unwrap();
    assert!(is_held(&Actor::start_lease(&at("here/lease")).ask("try")));
    let name = directory.path().file_name().unwrap().to_str().unwrap();
    assert!(is_held(
        &Actor::start_lease(&at(&format!("./here/../{name}/lease"))).ask("try")
    ));
    let mut relative = Actor::start_lease_with(&Terms::of("lease"), |command| {
        command.current_dir(directory.path());
    });
    assert!(is_held(&relative.ask("try")));
    relative.expect("go /", "gone there");
    assert!(is_held(&relative.ask("try")));
    relative.tell_to_wait("lock");
    holder.expect("release", "released");
    token(&relative.answer());

    symlink("lease", directory.path().join("soft")).unwrap();
    let refused = Actor::start_lease(&at("soft")).ask("try");
    assert!(
        refused.starts_with("error Insecure") && refused.contains("symbolic link"),
        "{refused}"
    );
    fs::hard_link(&terms.path, directory.path().join("hard")).unwrap();
    for name in ["lease", "hard"] {
        let refused = Actor::start_lease(&at(name)).ask("try");
        assert!(
            refused.starts_with("error Insecure") && refused.contains("hard link"),
            "{refused}"
        );
    }
    // The holder is uncertain as long as there are two links, and the lease continues when there is
    // one again.
    relative.expect("is-held", "yes");
    fs::remove_file(directory.path().join("hard")).unwrap();
    wait_for_heartbeats(&terms);
    relative.expect("is-held", "yes");
    symlink("nowhere", directory.path().join("dangling")).unwrap();
    assert!(
        Actor::start_lease(&at("dangling"))
            .ask("try")
            .starts_with("error Insecure")
    );
    assert!(Actor::start_lease(&at(".")).ask("try").starts_with("error"));
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        directory.path().join("fifo"),
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .unwrap();
    assert!(
        Actor::start_lease(&at("fifo"))
            .ask("try")
            .starts_with("error Insecure")
    );
}

#[test]
fn acquire_file_of_other_user_refused_of_root_allowed() {
    let Some(user) = another_user() else { return };
    let Some(third) = another_user() else { return };
    let (directory, terms) = temp_lease();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let mut theirs = Actor::start_lease_as(&terms, user.uid);
    acquire(&mut theirs, "try");
    theirs.expect("release", "released");
    assert_eq!(fs::metadata(&terms.path).unwrap().uid(), user.uid);
    let denied = Actor::start_lease_as(&terms, third.uid).ask("try");
    assert!(
        denied.starts_with("error Io: cannot open") && denied.contains("Permission denied"),
        "{denied}"
    );
    fs::set_permissions(&terms.path, Permissions::from_mode(0o666)).unwrap();
    let record = read(&terms);
    for refused in [
        Actor::start_lease_as(&terms, third.uid).ask("try"),
        Actor::start_lease(&terms).ask("lock"),
    ] {
        assert!(refused.starts_with("error ForeignOwner"), "{refused}");
    }
    assert_eq!(read(&terms), record);
    // Root may make it free.
    acquire(&mut theirs, "try");
    let LeaseStatus::Held(seen) = terms.open().status().unwrap() else {
        panic!("the lease is held")
    };
    assert!(terms.open().evict(&seen).unwrap());
    assert_eq!(terms.open().status().unwrap(), LeaseStatus::Free);
    assert_eq!(fs::metadata(&terms.path).unwrap().uid(), user.uid);
    chown(&terms.path, Some(0), None).unwrap();
    acquire(&mut Actor::start_lease_as(&terms, third.uid), "try");
}

#[test]
fn create_with_modes_applies_them_to_file_and_parents() {
    let (directory, terms) = temp_lease();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    drop(terms.open().lock().unwrap());
    assert_eq!(mode(&terms.path), 0o600);
    let path = directory.path().join("a/b/lease");
    let lease = Lease::file(&path)
        .create_parents()
        .file_write_mode(0o640)
        .directory_write_mode(0o750)
        .build()
        .unwrap();
    assert!(
        !directory.path().join("a").exists(),
        "no directory is created before the acquisition"
    );
    drop(lease.lock().unwrap());
    let modes = [&path, path.parent().unwrap(), &directory.path().join("a")].map(mode);
    assert_eq!(modes, [0o640, 0o750, 0o750]);
}

#[test]
fn a10_group_mode_shares_lease_between_users() {
    let (Some(one), Some(two)) = (another_user(), another_user()) else {
        return;
    };
    let group = one.uid;
    let (directory, mut terms) = temp_lease();
    chown(directory.path(), Some(0), Some(group)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o2775)).unwrap();
    let mode = || fs::metadata(&terms.path).unwrap().mode() & 0o7777;
    let start = |terms: &Terms, uid| Actor::start_lease_in_group(terms, uid, group);
    // By default a lease belongs to one user, and the error of another user says why.
    acquire(&mut start(&terms, one.uid), "try");
    assert_eq!(mode(), 0o600);
    let denied = start(&terms, two.uid).ask("try");
    assert!(
        denied.starts_with("error Io: cannot open") && denied.contains("Permission denied"),
        "{denied}"
    );
    let denied = start(&terms, two.uid).ask("status");
    assert!(
        denied.starts_with("error Io: cannot open") && denied.contains("Permission denied"),
        "not free: {denied}"
    );
    fs::remove_file(&terms.path).unwrap();

    let path = terms.path.clone();
    terms.mode = 0o664;
    let mut first = start(&terms, one.uid);
    let before = acquire(&mut first, "try");
    assert_eq!(
        fs::metadata(&path).unwrap().mode() & 0o7777,
        0o664,
        "the umask has no effect"
    );
    let mut second = start(&terms, two.uid);
    assert!(is_held(&second.ask("try")));
    second.tell_to_wait("lock");
    first.expect("release", "released");
    let after = token(&second.answer());
    assert!(after > before);
    second.kill();
    assert!(token_after(&first.ask("lock"), second.pid()) > after);
    wait_for_heartbeats(&terms);
    first.expect("is-held", "yes");
    // A user without a shared mode is refused, and so is a user outside the group.
    let private = Terms {
        mode: 0,
        ..terms.clone()
    };
    assert!(
        start(&private, two.uid)
            .ask("try")
            .starts_with("error ForeignOwner")
    );
    let outsider = Actor::start_lease_as(&terms, two.uid).ask("try");
    assert!(outsider.contains("Permission denied"), "{outsider}");
    // The owner does not let the group write.
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let denied = start(&terms, two.uid).ask("try");
    assert!(denied.contains("Permission denied"), "{denied}");
    assert!(
        Actor::start_lease(&terms)
            .ask("try")
            .starts_with("error ForeignOwner"),
        "root is refused, too"
    );
    first.expect("is-held", "yes");
}

#[test]
fn a11_create_parents_only_on_request() {
    let (directory, _) = temp_lease();
    let path = directory.path().join("a/b/lease");
    let lease = Lease::file(&path).build().unwrap();
    let start = Instant::now();
    for error in [lease.try_lock().unwrap_err(), lease.lock().unwrap_err()] {
        let text = error.to_string();
        assert!(
            text.contains(directory.path().join("a/b").to_str().unwrap())
                && text.contains("No such file"),
            "{text}"
        );
        assert_eq!(
            std::io::Error::from(error).kind(),
            std::io::ErrorKind::NotFound
        );
    }
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "the error comes at once"
    );
    assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    let made = Lease::file(&path).create_parents().build().unwrap();
    let guard = made.lock().unwrap();
    assert!(lease.try_lock().unwrap_err().is_held());
    drop(guard);
    let shared = directory.path().join("shared/leases/lease");
    let builder = Lease::file(&shared)
        .create_parents()
        .file_write_mode(0o666)
        .directory_write_mode(0o2777);
    drop(builder.build().unwrap().lock().unwrap());
    for directory in shared.ancestors().skip(1).take(2) {
        assert_eq!(
            fs::metadata(directory).unwrap().mode() & 0o7777,
            0o2777,
            "the umask has no effect"
        );
    }
    let other_store = Lease::with_store(Arc::new(MemoryStore::default()), "key")
        .create_parents()
        .build();
    assert!(matches!(
        other_store.unwrap_err().kind(),
        ErrorKind::InvalidOption {
            option: "create_parents",
            ..
        }
    ));
}
