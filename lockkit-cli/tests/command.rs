//! Tests of the command `lockkit` on every system that has it: its core, without the parts of only
//! one system. The Linux parts are in `cli.rs`.

#![cfg(any(target_os = "linux", windows))]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lockkit::{FileLock, Lease, LeaseStatus, NamedLock, PidFile, PidStatus};
use serde_json::Value;

/// The time limit for anything that must happen: far more than it needs, because machines can be
/// slow.
const LIVELY: Duration = Duration::from_secs(30);

/// The variable with the task of the program of `run`, which is this test program itself.
const TASK: &str = "LOCKKIT_TEST_TASK";

fn until(what: &str, mut fact: impl FnMut() -> bool) {
    let start = Instant::now();
    while !fact() {
        assert!(start.elapsed() < LIVELY, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn fresh_name() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "lockkit-command-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

fn lockkit(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockkit"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .env("NO_COLOR", "1");
    command
}

fn output(arguments: &[&str]) -> Output {
    lockkit(arguments).output().expect("lockkit starts")
}

fn code(arguments: &[&str]) -> i32 {
    let output = output(arguments);
    output.status.code().unwrap_or_else(|| panic!("{output:?}"))
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_slice(&output(arguments).stdout).expect("JSON")
}

/// Returns `lockkit run` with the options `under`, whose program does `task`.
fn run(under: &[&str], task: &str) -> Command {
    let mut command = lockkit(&["run"]);
    command
        .args(under)
        .arg("--")
        .arg(std::env::current_exe().unwrap());
    command
        .args(["the_program", "--exact", "--nocapture"])
        .env(TASK, task);
    command
}

/// Starts `lockkit run` with a program that prints its pid and then runs until it is ended.
fn held(under: &[&str]) -> (Child, u32) {
    said_by(&mut run(under, "stay"))
}

fn said_by(command: &mut Command) -> (Child, u32) {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .expect("lockkit starts");
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let pid = lines
        .map_while(Result::ok)
        .find_map(|line| line.split("I am ").nth(1)?.trim().parse().ok());
    (child, pid.expect("it says its pid"))
}

fn is_alive(pid: u32) -> bool {
    lockkit::Owner::of(pid).is_some()
}

/// This is not a test. The other tests let `lockkit run` run it.
#[test]
fn the_program() {
    match std::env::var(TASK).as_deref() {
        Ok("stay") => {
            println!("I am {}", std::process::id());
            // A program that is left over must not stay.
            std::thread::sleep(LIVELY * 2);
        }
        #[cfg(windows)]
        Ok(task) if task.starts_with("interrupt ") => interrupt(&task["interrupt ".len()..]),
        Ok("token") => println!(
            "token={}",
            std::env::var("LOCKKIT_TOKEN").unwrap_or_default()
        ),
        Ok(code) => std::process::exit(code.parse().expect("an exit code")),
        Err(_) => {}
    }
}

#[test]
fn run_exits_with_program_code_or_75_if_held() {
    let name = fresh_name();
    for given in ["0", "3", "200"] {
        let status = run(&["--name", &name], given)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(given.parse().unwrap()));
    }
    #[cfg(windows)]
    assert_eq!(
        run(&["--name", &name], "259")
            .stdout(Stdio::null())
            .status()
            .unwrap()
            .code(),
        Some(259)
    );
    assert_eq!(
        code(&["run", "--name", &name, "--", "no-such-program-of-lockkits"]),
        127
    );
    let guard = NamedLock::new(&name).unwrap().try_lock().unwrap();
    let refused = run(&["--try", "--name", &name], "0").output().unwrap();
    assert_eq!(refused.status.code(), Some(75));
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains(&format!("pid {}", std::process::id())),
        "{refused:?}"
    );
    assert_eq!(
        run(
            &["--timeout", "50ms", "--exit-code", "9", "--name", &name],
            "0"
        )
        .status()
        .unwrap()
        .code(),
        Some(9)
    );
    drop(guard);
    assert_eq!(
        run(&["--try", "--name", &name], "4")
            .stdout(Stdio::null())
            .status()
            .unwrap()
            .code(),
        Some(4)
    );
}

#[test]
fn run_running_status_names_program_and_wait_waits() {
    let name = fresh_name();
    assert_eq!(code(&["status", &name]), 0);
    let (mut holder, program) = held(&["--name", &name]);
    assert_eq!(code(&["status", &name]), 1);
    let seen = json(&["status", &name, "--json"]);
    assert_eq!(seen["lock"]["state"], "held");
    assert_eq!(seen["lock"]["holders"][0]["pid"], program);
    assert_eq!(code(&["wait", &name, "--timeout", "50ms"]), 75);
    let listed = json(&["list", "--json"]);
    let names = listed["locks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|lock| lock["name"].as_str().unwrap_or_default());
    assert!(names.into_iter().any(|listed| listed == name), "{listed}");
    let mut waits = lockkit(&["wait", &name]).spawn().unwrap();
    assert!(waits.try_wait().unwrap().is_none());
    end(program);
    holder.wait().unwrap();
    assert_eq!(waits.wait().unwrap().code(), Some(0));
}

/// Ends any process.
fn end(pid: u32) {
    let mut command = match cfg!(windows) {
        true => Command::new("taskkill"),
        false => Command::new("kill"),
    };
    if cfg!(windows) {
        command.args(["/F", "/PID", &pid.to_string()]);
    } else {
        command.args(["-KILL", &pid.to_string()]);
    }
    assert!(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap()
            .success()
    );
}

/// On Linux the lock outlives the killed lockkit, and a keeper holds the lock. On Windows the
/// program ends with lockkit.
#[test]
fn kill_of_lockkit_keeps_lock_while_program_lives() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.lock");
    let (mut holder, program) = held(&["--file", file.to_str().unwrap()]);
    assert!(FileLock::new(&file).try_lock().unwrap_err().is_held());
    holder.kill().unwrap();
    holder.wait().unwrap();
    if cfg!(windows) {
        until("the program has ended, too", || !is_alive(program));
    } else {
        assert!(is_alive(program) && FileLock::new(&file).try_lock().unwrap_err().is_held());
        end(program);
    }
    drop(FileLock::new(&file).lock_for(LIVELY).unwrap());
}

/// This is the case under Wine without a screen.
#[cfg(windows)]
const NO_CONSOLE: &str = "no console can be made here";

/// A console sends the event to a group of processes, as Ctrl-C goes to all processes of the
/// console.
#[cfg(windows)]
#[test]
fn console_interrupt_ends_program_and_lockkit_waits() {
    use std::os::windows::process::CommandExt;
    use windows_sys::Win32::Foundation::STATUS_CONTROL_C_EXIT;
    use windows_sys::Win32::System::Threading::CREATE_NEW_CONSOLE;

    let name = fresh_name();
    let mut interrupter = Command::new(std::env::current_exe().unwrap());
    interrupter
        .args(["the_program", "--exact", "--nocapture"])
        .env(TASK, format!("interrupt {name}"));
    let told = interrupter
        .stdin(Stdio::null())
        .creation_flags(CREATE_NEW_CONSOLE)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&told.stdout);
    if text.contains(NO_CONSOLE) {
        use std::io::Write;
        // A print macro cannot do this, because test runners capture its output.
        return writeln!(
            std::io::stderr(),
            "left out: an interrupt of the console: {NO_CONSOLE}"
        )
        .unwrap();
    }
    assert!(
        text.contains(&format!("it ended with {STATUS_CONTROL_C_EXIT}.")),
        "{told:?}"
    );
    drop(NamedLock::new(&name).unwrap().lock_for(LIVELY).unwrap());
}

/// Lets `lockkit run` hold `name` on the console of this process, interrupts it, and reports its
/// exit status.
#[cfg(windows)]
#[allow(unsafe_code)]
fn interrupt(name: &str) {
    use std::os::windows::process::CommandExt;
    use windows_sys::Win32::Foundation::ERROR_INVALID_HANDLE;
    use windows_sys::Win32::System::Console::{CTRL_BREAK_EVENT, GenerateConsoleCtrlEvent};
    use windows_sys::Win32::System::Threading::CREATE_NEW_PROCESS_GROUP;

    let (mut holder, program) =
        said_by(run(&["--name", name], "stay").creation_flags(CREATE_NEW_PROCESS_GROUP));
    // SAFETY: sends an event to the group of a child that has not been waited for.
    let sent = unsafe { GenerateConsoleCtrlEvent(CTRL_BREAK_EVENT, holder.id()) };
    let error = std::io::Error::last_os_error();
    if sent == 0 && error.raw_os_error() == Some(ERROR_INVALID_HANDLE as i32) {
        end(program);
        return println!("{NO_CONSOLE}");
    }
    assert!(sent != 0, "an interrupt can be sent: {error}");
    println!(
        "it ended with {}.",
        holder.wait().unwrap().code().unwrap_or_default()
    );
}

#[test]
fn run_pidfile_names_program_and_check_shows_state() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.pid");
    let text = path.to_str().unwrap();
    assert_eq!(code(&["pidfile", "check", text]), 66);
    let (mut holder, program) = held(&["--pidfile", text]);
    assert!(
        matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(owner) if owner.pid() == program)
    );
    assert_eq!(code(&["pidfile", "check", text]), 1);
    assert_eq!(code(&["status", text]), 1);
    end(program);
    holder.wait().unwrap();
    assert_eq!(code(&["pidfile", "check", text]), 66);
    left_by_the_dead(&path, program);
    assert_eq!(code(&["pidfile", "check", text]), 2);
    assert_eq!(code(&["pidfile", "clean", text]), 0);
    assert!(!path.exists());
}

fn left_by_the_dead(path: &Path, pid: u32) {
    std::fs::write(path, format!("{pid}\n")).unwrap();
}

#[test]
fn lease_show_reports_token_and_steal_ends_program() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leader");
    let text = path.to_str().unwrap();
    let told = run(&["--lease", text], "token").output().unwrap();
    let said = String::from_utf8_lossy(&told.stdout).into_owned();
    let token = |line: &str| line.split("token=").nth(1)?.trim().parse::<u64>().ok();
    let first = said
        .lines()
        .find_map(token)
        .unwrap_or_else(|| panic!("{told:?}"));
    assert_eq!(code(&["lease", "show", text]), 0);
    let (mut holder, program) = held(&["--lease", text, "--ttl", "5s", "--grace", "1s"]);
    let shown = json(&["lease", "show", text, "--json"]);
    assert_eq!(shown["lock"]["state"], "held");
    assert!(shown["lock"]["token"].as_u64().unwrap() > first, "{shown}");
    assert_eq!(code(&["lease", "show", text]), 1);
    assert_eq!(code(&["lease", "release", text]), 75);
    assert_eq!(code(&["lease", "steal", text, "--yes"]), 0);
    until("the program has ended", || !is_alive(program));
    assert!(!holder.wait().unwrap().success());
    assert!(matches!(
        Lease::file(&path).build().unwrap().status().unwrap(),
        LeaseStatus::Free
    ));
}

#[test]
fn table_in_directory_allocates_numbers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("table");
    let text = path.to_str().unwrap();
    assert_eq!(code(&["table", "create", "--directory", text]), 0);
    let number = |arguments: &[&str]| {
        String::from_utf8(output(arguments).stdout)
            .unwrap()
            .trim()
            .to_owned()
    };
    assert_eq!(number(&["table", "allocate", text]), "0");
    assert_eq!(number(&["table", "allocate", text]), "1");
    assert_eq!(code(&["table", "free", text, "0"]), 0);
    assert_ne!(code(&["table", "free", text, "0"]), 0);
    assert_eq!(code(&["table", "list", text]), 0);
}

#[cfg(windows)]
#[test]
fn unsupported_command_on_windows_exits_69() {
    let directory = tempfile::tempdir().unwrap();
    let table = directory.path().join("table");
    for arguments in [
        &["flock", "-n", "a"][..],
        &["doctor"],
        &["table", "create", table.to_str().unwrap()],
    ] {
        let output = output(arguments);
        assert_eq!(output.status.code(), Some(69), "{output:?}");
        assert!(!output.stderr.is_empty());
    }
}
