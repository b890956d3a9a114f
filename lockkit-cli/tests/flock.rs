//! Tests of `lockkit flock`, side by side with the machine's own flock(1).

#![cfg(target_os = "linux")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use common::{PROGRAM, Running, code, code_of, left_out, lockkit, output, text};

/// Returns the machine's flock(1) and ours, each under the name `flock` in a directory of its own,
/// as `sh` would find them.
fn both_flocks() -> Option<(TempDir, [PathBuf; 2])> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let Some(real) = std::env::split_paths(&paths)
        .map(|directory| directory.join("flock"))
        .find(|path| path.is_file())
    else {
        left_out("this machine has no flock(1)");
        return None;
    };
    let directory = TempDir::new().expect("a directory");
    let both = [("real", real), ("ours", PROGRAM.into())].map(|(name, program)| {
        fs::create_dir(directory.path().join(name)).expect("a directory");
        let link = directory.path().join(name).join("flock");
        symlink(program, &link).expect("a link");
        link
    });
    Some((directory, both))
}

/// musl's error texts, each with the text of the C library that the machine's own flock uses.
#[cfg(target_env = "musl")]
const WORDS: [[&str; 2]; 3] = [
    ["Filename too long", "File name too long"],
    ["Symbolic link loop", "Too many levels of symbolic links"],
    ["Result not representable", "Numerical result out of range"],
];

#[cfg(not(target_env = "musl"))]
const WORDS: [[&str; 2]; 0] = [];

/// Returns the part of the result that must be equal: the exit code, and both outputs. The
/// program's own path, the times, and the C library's texts are normalised.
fn outcome(program: &Path, command: &mut Command) -> (i32, String, String) {
    let ended = command.output().expect("it starts");
    let plain = |bytes: &[u8]| {
        // Each byte becomes one letter, so that no byte is mistaken for another.
        let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
        let text = text.replace(&program.display().to_string(), "flock");
        let text = WORDS
            .iter()
            .fold(text, |text, [ours, theirs]| text.replace(ours, theirs));
        text.lines()
            .map(|line| match line.split_once("getting lock took ") {
                Some((begin, took)) => {
                    let seconds = took.strip_suffix(" seconds").expect("a time");
                    assert_eq!(
                        seconds.split_once('.').map(|(_, micros)| micros.len()),
                        Some(6),
                        "{line}"
                    );
                    format!("{begin}getting lock took T seconds\n")
                }
                None => format!("{line}\n"),
            })
            .collect()
    };
    (code_of(&ended), plain(&ended.stdout), plain(&ended.stderr))
}

/// In the arguments below: a free file, a file that is locked exclusively, a file that is locked
/// shared, and a directory.
const PLACES: [&str; 4] = ["{free}", "{held}", "{shared}", "{directory}"];

/// Running commands.
const COMMANDS: &[&[&str]] = &[
    &["{free}", "true"],
    &["{free}", "sh", "-c", "exit 7"],
    &["{free}", "sh", "-c", "kill -9 $$"],
    &["{free}", "sh", "-c", "kill -TERM $$"],
    &["{free}", "-c", "echo said; exit 5"],
    &["{free}", "--command", "echo said"],
    &["{free}", "-c"],
    &["{free}", "-c", "a", "b"],
    &["{free}", "--command"],
    &["{free}", "/no/such/program"],
    &["{free}", "/etc/passwd"],
    &["{free}", "echo", "-n", "--", "-x"],
    &["{directory}", "true"],
    &["-x", "{directory}", "echo", "said"],
    &["/no/such/directory/file", "true"],
    &["/etc/passwd/file", "true"],
    &["", "true"],
];

/// Every option, also in its long forms.
const OPTIONS: &[&[&str]] = &[
    &["-s", "{free}", "true"],
    &["--shared", "{free}", "true"],
    &["-x", "{free}", "true"],
    &["-e", "{free}", "true"],
    &["--exclusive", "{free}", "true"],
    &["-u", "{free}", "echo", "said"],
    &["--unlock", "{held}", "echo", "said"],
    &["-n", "{free}", "true"],
    &["-n", "{held}", "true"],
    &["--nonblock", "{held}", "true"],
    &["--nonblocking", "{held}", "true"],
    &["--nb", "{held}", "true"],
    &["-n", "--verbose", "{held}", "true"],
    &["-n", "-s", "{shared}", "true"],
    &["-ns", "{shared}", "true"],
    &["-nx", "{shared}", "true"],
    &["-n", "-s", "{held}", "true"],
    &["-w", "0.05", "{held}", "true"],
    &["-w0.05", "{held}", "true"],
    &["-w", "0", "{held}", "true"],
    &["-w", "0", "--verbose", "{held}", "true"],
    &["--wait", "0.05", "{held}", "true"],
    &["--timeout=0.05", "{held}", "true"],
    &["--timeout", "0.05", "--verbose", "{held}", "true"],
    &["-w", "5", "{free}", "true"],
    &["-w", "abc", "{free}", "true"],
    &["-w", "", "{free}", "true"],
    &["-w", "1x", "{free}", "true"],
    &["-w", "-1", "{free}", "true"],
    &["-w", "1e30", "{free}", "true"],
    &["-w", "inf", "{free}", "true"],
    &["-w", "nan", "{free}", "true"],
    &["-w", ".1", "{free}", "true"],
    &["-w", " 1", "{free}", "true"],
    &["-w", "1 ", "{free}", "true"],
    &["-w", "0x1p-4", "{held}", "true"],
    &["-w", "0x", "{free}", "true"],
    &["-w", "9223372036854775807", "{free}", "true"],
    &["-w", "9223372036854775808", "{free}", "true"],
    &["-w"],
    &["--wait"],
    &["-E", "42", "-n", "{held}", "true"],
    &["-E42", "-n", "{held}", "true"],
    &["-nE", "42", "{held}", "true"],
    &["--conflict-exit-code", "42", "-w", "0.01", "{held}", "true"],
    &["--conflict-exit-code=0", "-n", "{held}", "true"],
    &["-E", "42", "{free}", "true"],
    &["-E", "256", "{free}", "true"],
    &["-E", "010", "-n", "{held}", "true"],
    &["-E", "0x10", "{free}", "true"],
    &["-E", "7 ", "{free}", "true"],
    &["-E", "2147483648", "{free}", "true"],
    &["-E", "1", "-nE2", "{held}", "true"],
    &["-E", "-1", "{free}", "true"],
    &["-E", "x", "{free}", "true"],
    &["-E", "", "{free}", "true"],
    &["-E", " 7", "-n", "{held}", "true"],
    &["-E", "+7", "-n", "{held}", "true"],
    &["-E", "99999999999", "{free}", "true"],
    &["-E", "99999999999999999999999", "{free}", "true"],
    &["-o", "{free}", "true"],
    &["--close", "{free}", "sh", "-c", "ls /proc/self/fd | wc -l"],
    &["-F", "{free}", "sh", "-c", "exit 3"],
    &["--no-fork", "{free}", "/no/such/program"],
    &["-F", "-o", "{free}", "true"],
    &["--verbose", "{free}", "true"],
    &["--verbose", "-s", "{free}", "-c", "echo said"],
    &["--verb", "{free}", "true"],
];

/// Invalid arguments.
const INVALID: &[&[&str]] = &[
    &[],
    &["-n"],
    &["-z"],
    &["-nz", "{free}", "true"],
    &["-?"],
    &["--bogus"],
    &["--bogus=1"],
    &["--no", "{free}", "true"],
    &["--n", "{free}", "true"],
    &["--ver"],
    &["-é", "{free}", "true"],
    &["--é=1", "{free}", "true"],
    &["-z", "-h"],
    &["--c", "{free}", "true"],
    &["--e", "{free}", "true"],
    &["--u", "{held}", "true"],
    &["--t", "0.01", "{held}", "true"],
    &["-s=1", "{free}", "true"],
    &["--w", "0.01", "{held}", "true"],
    &["--shared=1", "{free}", "true"],
    &["-c", "true", "{free}"],
    &["--", "{free}", "true"],
    &["--", "-n", "true"],
    &["-", "true"],
];

/// Descriptors.
const DESCRIPTORS: &[&[&str]] = &[
    &["99"],
    &["-1"],
    &["--", "-1"],
    &["abc"],
    &["99999999999"],
    &["+99"],
    &["0x0"],
    &["0 "],
    &[" 0"],
    &["0"],
    &["-o", "0"],
    &["-F", "0"],
    &["--verbose", "0"],
    &["-u", "0"],
    &["-n", "-x", "0"],
];

#[test]
fn flock_matches_system_flock() {
    let Some((directory, both)) = both_flocks() else {
        return;
    };
    let file = directory.path().join("file").display().to_string();
    let held = directory.path().join("held").display().to_string();
    let shared = directory.path().join("shared").display().to_string();
    let dir = directory.path().join("real").display().to_string();
    let _held = [("-x", &held), ("-s", &shared)].map(|(kind, path)| {
        let mut holder = Command::new(&both[0]);
        holder.args([kind, path, "sh", "-c", "echo held; exec sleep 60"]);
        let mut holder = Running::start(holder);
        assert_eq!(holder.line(), "held");
        holder
    });
    let paths = [&file, &held, &shared, &dir];
    let path_of = |word: &str| {
        let place = PLACES.iter().position(|place| *place == word);
        place.map_or(word.to_owned(), |place| paths[place].clone())
    };
    for arguments in [COMMANDS, OPTIONS, INVALID, DESCRIPTORS].concat() {
        let arguments: Vec<_> = arguments.iter().copied().map(path_of).collect();
        let ended = both.each_ref().map(|program| {
            let mut command = Command::new(program);
            // The commands run in a directory of their own, because one case creates files with odd
            // names.
            command
                .args(&arguments)
                .stdin(File::open("/etc/hostname").expect("a file"))
                .current_dir(directory.path());
            command.env("SHELL", "/bin/sh").env("LC_ALL", "C");
            let (code, stdout, stderr) = outcome(program, &mut command);
            // If the output is a pipe, the machine's own flock writes its messages after the
            // command's.
            let mut lines: Vec<_> = stdout.lines().map(str::to_owned).collect();
            lines.sort_unstable();
            (code, lines, stderr)
        });
        assert_eq!(ended[1], ended[0], "flock {arguments:?}");
    }
}

#[test]
fn flock_by_descriptor_matches_system_flock() {
    let Some((directory, both)) = both_flocks() else {
        return;
    };
    let scripts = [
        // The shell holds the lock from the command on, until it closes the descriptor.
        "exec 9>file; flock -n 9; echo $?; real -n file true; echo $?; exec 9>&-; real -n file true; echo $?",
        "(flock -x 8; real -n file true; echo $?) 8>file; real -n file true; echo $?",
        "exec 9>file; flock 9; flock -u 9; real -n file true; echo $?",
        "exec 9<file; flock -s 9; real -ns file true; echo $?; real -nx file true; echo $?",
        "exec 8>file 9>file; real 8; flock -n 9; echo $?; flock -n -E 5 --verbose 9; echo $?; flock -w 0.05 9; echo $?",
        "exec 8>file 9>file; real -s 8; flock -n -s 9; echo $?; flock -n 9; echo $?; flock -u 8; flock -n 9; echo $?",
        "exec 9>file; flock -n 7; echo $?; flock 9 9>&-; echo $?",
        // Closed descriptors count as missing, whatever Rust's runtime opens in their place.
        "flock 0 <&-; echo $?; flock 1 2>&1 >&-; echo $?; flock 2 2>&-; echo $?",
        "flock -h >&-; echo $?; flock file echo said >&-; echo $?; flock --verbose file true >&- 2>&-; echo $?",
        "flock -F file sh -c 'ls /proc/self/fd | wc -w' <&-; flock file sh -c 'ls /proc/self/fd | wc -w' <&-",
        "flock -z 2>/dev/full; echo $?; flock -n 2>&-; echo $?; flock --verbose file true 2>/dev/full; echo $?",
        // Bytes that are not valid text.
        "flock /no/such/$'f\\xff' true; flock file $'no\\xff'; flock -w $'\\xff' file true; flock -E $'\\xff' file true",
        "flock $'\\xff'; flock -n$'\\xff' file true; flock --n$'\\xff' file true; flock $'f\\xff' true; ls",
        // Files of other users, and files that may not be read or created.
        "chmod 755 .; chmod 600 file; [ $(id -u) != 0 ] || setpriv --reuid 65534 --clear-groups flock file true; echo $?",
        "chmod 755 .; chmod 644 file; [ $(id -u) != 0 ] || setpriv --reuid 65534 --clear-groups flock file true; echo $?",
        "chmod 755 .; [ $(id -u) != 0 ] || setpriv --reuid 65534 --clear-groups flock new true; echo $?; ls",
        "umask 027; flock new true; stat -c %a new; ln -s nowhere a; flock a true; ln -s b b; flock b true; ls",
        "flock dir/new true; flock file/ true; flock $(printf 'a%.0s' $(seq 300)) true; flock /dev/null echo said",
        "SHELL= flock file -c 'echo $0'; unset SHELL; flock file -c 'echo $0'; SHELL=/no/such flock file -c true; echo $?",
        "mkfifo fifo; exec 9<>fifo; flock 9; echo $?; exec 9<.; flock -n 9; echo $?; flock 9 -c 'echo said' 9>file; ls",
        // Signals: a command that receives one, and flock itself.
        "flock file sh -c 'kill -SEGV $$'; echo $?; trap '' INT CHLD; flock file sh -c 'kill -INT $$; exit 4'; echo $?",
        "flock file sh -c 'kill $PPID' & wait $!; echo $?; flock -w 9 file sh -c 'kill -INT $$' & wait $!; echo $?",
        // The command inherits the descriptor by default, and its surviving children keep the lock.
        "flock file sh -c 'sleep 60 > /dev/null 2>&1 & echo $! > pid'; real -n file true; echo $?; kill $(cat pid)",
        "flock -o file sh -c 'sleep 60 > /dev/null 2>&1 & echo $! > pid'; real -n file true; echo $?; kill $(cat pid)",
        // Without a fork the command has flock's own pid.
        "flock -F file sh -c 'echo $$' & wait $!; [ $! = $! ] && echo same",
        "flock -F file sh -c 'sleep 60 > /dev/null 2>&1 & echo $! > pid'; real -n file true; echo $?; kill $(cat pid)",
    ];
    for script in scripts {
        let ended = both.each_ref().map(|program| {
            let work = TempDir::new_in(directory.path()).expect("a directory");
            fs::write(work.path().join("file"), "").expect("a file");
            let script = script.replace("real", &both[0].display().to_string());
            let path = format!(
                "{}:{}",
                program.parent().expect("a directory").display(),
                std::env::var("PATH").expect("a path")
            );
            let mut command = Command::new("bash");
            command
                .args(["-c", &script])
                .current_dir(work.path())
                .env("PATH", path)
                .env("LC_ALL", "C");
            let (code, mut stdout, stderr) = outcome(program, &mut command);
            if script.contains("echo $$") {
                stdout = stdout.lines().skip(1).collect();
            }
            (code, stdout, stderr)
        });
        assert_eq!(ended[1], ended[0], "{script}");
    }
}

#[test]
fn flock_subcommand_excludes_system_flock() {
    let Some((directory, both)) = both_flocks() else {
        return;
    };
    let file = directory.path().join("file").display().to_string();
    let mut holder = lockkit(["flock", &file, "sh", "-c", "echo held; exec sleep 60"]);
    holder.stderr(Stdio::null());
    let mut holder = Running::start(holder);
    assert_eq!(holder.line(), "held");
    let real = |arguments: &[&str]| {
        Command::new(&both[0])
            .args(arguments)
            .status()
            .expect("it starts")
            .code()
    };
    assert_eq!(real(&["-n", &file, "true"]), Some(1));
    assert_eq!(code(["flock", "-n", &file, "true"]), 1);
    assert_eq!(code(["run", "--try", "--file", &file, "--", "true"]), 75);
    assert_eq!(code(["status", &file]), 1);
    assert!(
        text(&output(["flock", "--help"]).stdout)
            .contains("flock [options] <file>|<directory> <command>")
    );
    assert!(text(&output(["flock", "-V"]).stdout).starts_with("flock from lockkit "));
}

#[test]
fn flock_timed_wait_acquires_released_lock() {
    let directory = TempDir::new().expect("a directory");
    let file = directory.path().join("file").display().to_string();
    let mut holder = Running::start(lockkit([
        "flock",
        &file,
        "sh",
        "-c",
        "echo held; sleep 0.3",
    ]));
    assert_eq!(holder.line(), "held");
    assert_eq!(code(["flock", "-w", "30", &file, "true"]), 0);
}
