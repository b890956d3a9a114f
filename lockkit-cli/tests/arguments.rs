//! Tests of the arguments: help, completions, manual pages, errors, and an output that cannot be
//! written.

#![cfg(target_os = "linux")]

mod common;

use std::fs::{self, File};

use tempfile::TempDir;

use common::{Lock, Site, code, code_of, lockkit, output, text};

#[test]
fn commands_have_completions_man_page_and_help_example() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = output(["completions", shell]);
        assert!(
            code_of(&script) == 0 && text(&script.stdout).contains("lockkit"),
            "{shell}"
        );
    }
    let directory = TempDir::new().expect("a directory");
    assert_eq!(code(["man", &directory.path().display().to_string()]), 0);
    let commands = [
        "run",
        "flock",
        "list",
        "status",
        "wait",
        "pidfile",
        "lease",
        "table",
        "doctor",
        "completions",
        "man",
    ];
    for command in commands {
        let page = fs::read_to_string(directory.path().join(format!("lockkit-{command}.1")))
            .expect(command);
        assert!(page.contains(".TH"), "{command}");
        if command == "flock" {
            // Its help is flock(1)'s.
            assert!(page.contains("Example: lockkit flock"), "{page}");
            continue;
        }
        let mut below = vec![Vec::new()];
        below.extend(match command {
            "pidfile" => ["check", "clean"].map(|name| vec![name]).to_vec(),
            "lease" => ["show", "release", "steal"].map(|name| vec![name]).to_vec(),
            "table" => ["create", "list", "allocate", "free", "renumber"]
                .map(|name| vec![name])
                .to_vec(),
            _ => Vec::new(),
        });
        for names in below {
            let help = lockkit([command])
                .args(&names)
                .arg("--help")
                .output()
                .expect("lockkit starts");
            assert_eq!(code_of(&help), 0, "{command} {names:?}");
            let help = text(&help.stdout);
            let first = help.lines().next().unwrap_or_default();
            assert!(
                first.starts_with(char::is_uppercase) && first.contains(' '),
                "{command} {names:?}: {first}"
            );
            assert!(help.contains("Example"), "{command} {names:?}");
            let page = [&["lockkit", command], &names[..]].concat().join("-");
            let page =
                fs::read_to_string(directory.path().join(format!("{page}.1"))).expect("a page");
            assert!(
                page.contains(".TH") && page.contains("Example"),
                "{command} {names:?}"
            );
        }
    }
}

#[test]
fn invalid_arguments_fail_with_example() {
    let cases: [&[&str]; 9] = [
        &["nonsense"],
        &["status"],
        &["run", "--name", "a"],
        &["run", "--", "true"],
        &["run", "--name", "a", "--file", "b", "--", "true"],
        &["run", "--name", "a/b", "--", "true"],
        &["run", "--name", "a", "--shared", "--", "true"],
        &["run", "--name", "a", "--timeout", "soon", "--", "true"],
        &["table", "free", "/dev/shm/x"],
    ];
    for arguments in cases {
        let refused = lockkit([])
            .args(arguments)
            .output()
            .expect("lockkit starts");
        assert_eq!(code_of(&refused), 64, "{arguments:?}");
        assert!(
            text(&refused.stderr).contains("For example: lockkit "),
            "{arguments:?}: {refused:?}"
        );
        assert!(!text(&refused.stderr).contains('\x1b'));
    }
}

#[test]
fn d8_scheme_with_one_slash_is_a_usage_error() {
    let site = Site::new();
    for url in [
        "redis:/host/x",
        "redis:host/x",
        "REDIS:/host/x",
        "etcd:/host/x",
        "postgres:/host/db/x",
        "postgresql:/host/db/x",
        "rediss:/host/x",
        "valkey:/host/x",
        "http:/host/x",
        "https:/host/x",
        "file:/srv/x",
        "redis:///",
    ] {
        for arguments in [
            ["run", "--try", "--lease", url, "--", "true"].as_slice(),
            &["status", url],
            &["lease", "show", url],
        ] {
            let ended = site.run(arguments);
            // If the form is valid, the first error is about a missing engine.
            assert!(
                ended.code == 64 || url == "redis:///" && ended.code == 69,
                "{arguments:?}: {ended:?}"
            );
            assert!(!ended.err.is_empty());
        }
    }
    assert_eq!(
        fs::read_dir(site.directory()).expect("a directory").count(),
        0,
        "nothing was made"
    );
    // A file with that name remains accessible.
    fs::create_dir_all(site.path("redis:/host")).expect("directories");
    assert_eq!(
        site.run(&["run", "--lease", "./redis:/host/x", "--", "true"])
            .code,
        0
    );
    let url = "redis:/user:secret@host/x";
    assert!(!site.run(&["status", url]).err.contains("secret"));
}

#[test]
fn commands_without_writable_output_do_not_panic() {
    let lock = Lock::new("--name");
    let (_running, _) = lock.hold([]);
    let full = || {
        File::options()
            .write(true)
            .open("/dev/full")
            .expect("a device")
    };
    let file = lock.directory.path().join("file").display().to_string();
    let cases: [(&[&str], i32); 6] = [
        (&["list"], 74),
        (&["list", "--json"], 74),
        (&["run", "--try", "--name", &lock.place, "--", "true"], 75),
        (
            &[
                "run",
                "--verbose",
                "--timeout",
                "300ms",
                "--name",
                &lock.place,
                "--",
                "true",
            ],
            75,
        ),
        (&["flock", "--verbose", &file, "true"], 1),
        (&["nonsense"], 64),
    ];
    for (arguments, code) in cases {
        let status = lockkit([])
            .args(arguments)
            .stdout(full())
            .stderr(full())
            .status()
            .expect("lockkit starts");
        assert_eq!(status.code(), Some(code), "{arguments:?}");
    }
}
