//! Tests of `lockkit pidfile`.

#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use common::{PROGRAM, Site, code, code_of, dead, json, left_out, lockkit, output, pidfiles, text};

#[test]
fn pidfile_clean_removes_only_stale_files() {
    let (directory, paths) = pidfiles();
    let text_of = |path: &Path| path.display().to_string();
    let dir = text_of(directory.path());
    assert_eq!(code(["pidfile", "check", &text_of(&paths[0])]), 1);
    assert_eq!(code(["pidfile", "check", &text_of(&paths[1])]), 2);
    assert_eq!(code(["pidfile", "check", &dir]), 1);
    assert_eq!(
        code([
            "pidfile",
            "check",
            &text_of(&directory.path().join("none.pid"))
        ]),
        66
    );
    let form = json(&output(["pidfile", "check", "--json", &dir]));
    assert_eq!(
        (&form["version"], form["locks"].as_array().map(Vec::len)),
        (&1.into(), Some(2))
    );
    let dead = fs::read(&paths[1]).expect("a file");
    let dry = output(["pidfile", "clean", "--dry-run", &dir]);
    assert!(text(&dry.stdout).contains("would remove") && paths[1].exists());
    let clean = output(["pidfile", "clean", &dir]);
    assert_eq!(
        (code_of(&clean), text(&clean.stdout).lines().count()),
        (0, 1)
    );
    assert_eq!(
        paths.each_ref().map(|path| path.exists()),
        [true, false, true]
    );
    // A link's target is left unchanged, and the output says so.
    let link = directory.path().join("link.pid");
    fs::write(&paths[2], dead).expect("a file");
    symlink(&paths[2], &link).expect("a link");
    for options in [["clean", "--dry-run"].as_slice(), &["clean"]] {
        let refused = lockkit(["pidfile"])
            .args(options)
            .arg(&dir)
            .output()
            .expect("lockkit starts");
        assert_eq!(
            (code_of(&refused), text(&refused.stdout)),
            (77, String::new())
        );
        assert!(link.is_symlink() && paths[2].exists());
    }
}

#[test]
fn b6_dry_run_check_and_clean_judge_alike() {
    let (directory, [alive, dead, junk]) = pidfiles();
    let old = |path: &Path| {
        let file = fs::File::options().write(true).open(path).expect("a file");
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(60))
            .expect("its time can be set");
    };
    let file = |name: &str| directory.path().join(name);
    fs::write(file("blank.pid"), "").expect("a file");
    old(&file("blank.pid"));
    fs::write(file("text.pid"), "key = value\n").expect("a file");
    fs::copy(&dead, file("one.pid")).expect("a file");
    fs::hard_link(file("one.pid"), file("two.pid")).expect("a link");
    symlink(&dead, file("link.pid")).expect("a link");
    let missing = file("none.pid");
    for (path, checked, cleaned) in [
        (&alive, 1, 0),
        (&junk, 65, 65),
        (&file("text.pid"), 65, 65),
        (&file("blank.pid"), 0, 0),
        (&file("one.pid"), 2, 77),
        (&file("link.pid"), 2, 77),
        (&missing, 66, 66),
        (&file("no/such.pid"), 66, 66),
        (&dead, 2, 0),
    ] {
        let path_text = path.display().to_string();
        let before = fs::read(path).ok();
        assert_eq!(
            code(["pidfile", "check", &path_text]),
            checked,
            "{path_text}"
        );
        let said = |dry: &[&str]| {
            let run = lockkit(["pidfile", "clean"])
                .args(dry)
                .arg(path)
                .output()
                .expect("lockkit starts");
            // The age of the file differs in each run.
            let done = text(&run.stdout).replace("would remove", "removed");
            (
                code_of(&run),
                done.split(", since").next().unwrap_or_default().to_owned(),
                text(&run.stderr),
            )
        };
        let dry = said(&["--dry-run"]);
        assert_eq!(fs::read(path).ok(), before, "{path_text}");
        assert_eq!(said(&[]), dry, "{path_text}");
        assert_eq!(
            (dry.0, dry.1.is_empty()),
            (cleaned, path != &dead),
            "{path_text}: {dry:?}"
        );
        assert_eq!(
            path.exists(),
            before.is_some() && path != &dead,
            "{path_text}"
        );
    }
    // The other files of a directory are judged nevertheless.
    fs::write(&dead, "4194304\n").expect("a file");
    let dir = directory.path().display().to_string();
    let run = output(["pidfile", "clean", &dir]);
    assert!(
        text(&run.stdout).contains("dead.pid") && code_of(&run) != 0,
        "{run:?}"
    );
}

#[test]
fn b6_file_that_may_not_be_read_or_removed_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return left_out("acting as another user needs root");
    }
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("app.pid");
    let set = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it can be set")
    };
    for (above, mode) in [(0o777, 0o600), (0o755, 0o644), (0o1777, 0o644)] {
        fs::write(&path, "4194304\n").expect("a file");
        set(directory.path(), above);
        set(&path, mode);
        for command in [["clean", "--dry-run"].as_slice(), &["clean"]] {
            let mut run = Command::new("setpriv");
            run.args([
                "--reuid=1001",
                "--regid=1001",
                "--clear-groups",
                PROGRAM,
                "pidfile",
            ])
            .args(command)
            .arg(&path);
            let run = run.output().expect("setpriv starts");
            assert_eq!(
                (code_of(&run), text(&run.stdout)),
                (77, String::new()),
                "{command:?} {mode:o}: {run:?}"
            );
            assert!(path.exists());
        }
    }
}

#[test]
fn b6_clean_dry_run_matches_clean() {
    let site = Site::new();
    let content = format!("{}\n", dead());
    site.write("a.pid", &content);
    fs::hard_link(site.path("a.pid"), site.path("b.pid")).expect("a link");
    site.write("single.pid", &content);
    symlink(site.path("single.pid"), site.path("link.pid")).expect("a link");
    site.write_old("junk.pid", "junk\n");
    for name in ["a.pid", "link.pid", "junk.pid", "single.pid"] {
        let dry = site.run(&["pidfile", "clean", "--dry-run", name]);
        let clean = site.run(&["pidfile", "clean", name]);
        assert_eq!(dry.code, clean.code, "{name}: {dry:?}, {clean:?}");
        assert_eq!(
            dry.out.contains("would remove"),
            clean.out.contains("removed"),
            "{name}: {dry:?}, {clean:?}"
        );
        assert_eq!(
            clean.out.contains("removed"),
            !site.path(name).is_symlink() && !site.path(name).exists(),
            "{name}"
        );
    }
    assert_eq!(site.run(&["pidfile", "clean", "nosuchdir"]).code, 66);
}
