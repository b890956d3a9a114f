//! `lockkit flock`, and `lockkit` called under the name `flock`: a drop-in for util-linux's
//! [flock(1)].
//!
//! Its options, exit codes and messages are flock(1)'s, so it does not use clap. It reads arguments
//! as getopt_long(3) does. It opens and locks files as flock(1) does, without the additions of
//! lockkit's own locks. The command inherits the descriptor, unless `--close` is given.
//!
//! [flock(1)]: https://man7.org/linux/man-pages/man1/flock.1.html

use std::cell::{Cell, RefCell};
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::failure::code;
use crate::sys;

/// The exit code of flock(1) when it did not get the lock.
const CONFLICT: u8 = 1;

/// The names of a program: the full one for messages of getopt(3), and the one without the
/// directory for other messages.
struct Name<'n> {
    full: &'n OsStr,
    short: String,
    /// The error of a failed write to the standard output.
    unsaid: RefCell<Option<io::Error>>,
    /// Whether a write to the standard error failed.
    mute: Cell<bool>,
}

/// An exit code without a further message.
struct End(u8);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Shared,
    Exclusive,
    Unlock,
}

struct Options {
    kind: Kind,
    block: bool,
    limit: Option<Duration>,
    conflict: u8,
    close: bool,
    fork: bool,
    verbose: bool,
}

/// The long options with their short options; `v` is no short option, only the code of `--verbose`.
const LONG: [(&str, char); 12] = [
    ("shared", 's'),
    ("exclusive", 'x'),
    ("unlock", 'u'),
    ("nonblocking", 'n'),
    ("nb", 'n'),
    ("timeout", 'w'),
    ("wait", 'w'),
    ("conflict-exit-code", 'E'),
    ("close", 'o'),
    ("no-fork", 'F'),
    ("verbose", 'v'),
    ("help", 'h'),
];
const VERSION: (&str, char) = ("version", 'V');
const SHORT: &str = "sexnoFuwEhV";
const WITH_VALUE: &str = "wE";

/// Runs the command with the arguments after its name.
pub(crate) fn main(called: &OsStr, arguments: Vec<OsString>) -> ExitCode {
    sys::end_at_a_closed_pipe();
    let short = Path::new(called)
        .file_name()
        .unwrap_or(called)
        .to_string_lossy()
        .into_owned();
    let name = Name {
        full: called,
        short,
        unsaid: RefCell::default(),
        mute: Cell::default(),
    };
    let (Ok(code) | Err(End(code))) = name.run(arguments);
    // As C programs do when they close the standard output at the end.
    match name.unsaid.take() {
        Some(error) => {
            name.warn(format!("write error: {}", text(&error)));
            ExitCode::FAILURE
        }
        None if name.mute.get() => ExitCode::FAILURE,
        None => ExitCode::from(code),
    }
}

impl Name<'_> {
    fn run(&self, arguments: Vec<OsString>) -> Result<u8, End> {
        if arguments.is_empty() {
            self.warn("not enough arguments");
            return Err(self.try_help());
        }
        let (options, rest) = self.options(arguments)?;
        let (mut file, path, command) = match rest.as_slice() {
            [] => return Err(self.fail(code::USAGE, "requires file descriptor, file or directory")),
            [number] => {
                let number = self.number(number, "bad file descriptor")?;
                let file = sys::inherited(number).map_err(|error| {
                    self.fail(code::DATA, format!("{number}: {}", text(&error)))
                })?;
                (file, None, Vec::new())
            }
            [path, command @ ..] => (self.open(path)?, Some(path), self.command(command)?),
        };
        let begun = Instant::now();
        let given = rest
            .first()
            .map(|given| given.as_bytes())
            .unwrap_or_default();
        if let Err(error) = self.lock(&file, &options)? {
            // NFS implements these locks by fcntl(2), which requires a file with an exclusive lock
            // to be open for writing.
            let writable = match path {
                Some(path)
                    if options.kind == Kind::Exclusive
                        && matches!(error, Errno::IO | Errno::BADF) =>
                {
                    OpenOptions::new().read(true).write(true).open(path).ok()
                }
                _ => None,
            };
            let again = match writable {
                Some(writable) => {
                    file = writable;
                    self.lock(&file, &options)?
                }
                None => Err(error),
            };
            if let Err(error) = again {
                let code = if matches!(error, Errno::NOLCK | Errno::NOMEM) {
                    code::OS
                } else {
                    code::DATA
                };
                return Err(self.fail(code, [given, b": ", text_of(error).as_bytes()].concat()));
            }
        }
        if options.verbose {
            let took = begun.elapsed();
            let took = format!("{}.{:06} seconds", took.as_secs(), took.subsec_micros());
            self.say(format!("{}: getting lock took {took}\n", self.short));
        }
        match command.split_first() {
            Some((program, arguments)) => self.execute(&file, program, arguments, &options),
            None => Ok(code::OK),
        }
    }

    /// Reads the options as a getopt_long(3) that stops at the first argument that is no option.
    fn options(&self, arguments: Vec<OsString>) -> Result<(Options, Vec<OsString>), End> {
        let mut options = Options {
            kind: Kind::Exclusive,
            block: true,
            limit: None,
            conflict: CONFLICT,
            close: false,
            fork: true,
            verbose: false,
        };
        let mut arguments = arguments.into_iter().peekable();
        while let Some(argument) =
            arguments.next_if(|next| next.as_bytes().starts_with(b"-") && next.len() > 1)
        {
            if argument == "--" {
                break;
            }
            if let Some(long) = argument.as_bytes().strip_prefix(b"--") {
                self.long(long, &mut options, &mut arguments)?;
                continue;
            }
            let mut letters = argument.as_bytes()[1..].iter();
            while let Some(&letter) = letters.next() {
                let option = char::from(letter);
                if option == '?' {
                    return Err(self.try_help());
                }
                if !SHORT.contains(option) {
                    return Err(
                        self.misused([b"invalid option -- '", &[letter][..], b"'"].concat())
                    );
                }
                let value = match (WITH_VALUE.contains(option), letters.as_slice()) {
                    (false, _) => None,
                    (true, []) => match arguments.next() {
                        Some(value) => Some(value),
                        None => {
                            return Err(
                                self.misused(format!("option requires an argument -- '{option}'"))
                            );
                        }
                    },
                    (true, rest) => {
                        let value = OsStr::from_bytes(rest).to_owned();
                        letters = [].iter();
                        Some(value)
                    }
                };
                self.set(option, value.as_deref(), &mut options)?;
            }
        }
        if options.close && !options.fork {
            return Err(self.fail(
                code::USAGE,
                "the --no-fork and --close options are incompatible",
            ));
        }
        Ok((options, arguments.collect()))
    }

    fn long(
        &self,
        given: &[u8],
        options: &mut Options,
        rest: &mut impl Iterator<Item = OsString>,
    ) -> Result<(), End> {
        let (name, value) = match given.iter().position(|byte| *byte == b'=') {
            Some(at) => (
                &given[..at],
                Some(OsStr::from_bytes(&given[at + 1..]).to_owned()),
            ),
            None => (given, None),
        };
        let all = || LONG.into_iter().chain([VERSION]);
        let begins: Vec<_> = all()
            .filter(|(long, _)| long.as_bytes().starts_with(name))
            .collect();
        let exact = begins
            .iter()
            .find(|(long, _)| long.as_bytes() == name)
            .copied();
        let (long, option) = match (exact, begins.as_slice()) {
            (Some(exact), _) => exact,
            (None, []) => {
                return Err(self.misused([b"unrecognized option '--", given, b"'"].concat()));
            }
            // Two names of one option are not ambiguous.
            (None, [first, others @ ..]) if others.iter().all(|other| other.1 == first.1) => *first,
            (None, several) => {
                // Other names of the first one's option are not listed.
                let first = several.first().map(|(_, option)| *option);
                let told = several
                    .iter()
                    .enumerate()
                    .filter(|(at, (_, option))| *at == 0 || Some(*option) != first);
                let names: Vec<_> = told.map(|(_, (long, _))| format!("'--{long}'")).collect();
                let possible = [
                    b"' is ambiguous; possibilities: ",
                    names.join(" ").as_bytes(),
                ]
                .concat();
                return Err(self.misused([b"option '--", given, &possible].concat()));
            }
        };
        let value = match (WITH_VALUE.contains(option), value) {
            (false, Some(_)) => {
                return Err(self.misused(format!("option '--{long}' doesn't allow an argument")));
            }
            (true, None) => match rest.next() {
                Some(value) => Some(value),
                None => return Err(self.misused(format!("option '--{long}' requires an argument"))),
            },
            (_, value) => value,
        };
        self.set(option, value.as_deref(), options)
    }

    fn set(&self, option: char, value: Option<&OsStr>, options: &mut Options) -> Result<(), End> {
        let value = value.unwrap_or_default();
        match option {
            's' => options.kind = Kind::Shared,
            'e' | 'x' => options.kind = Kind::Exclusive,
            'u' => options.kind = Kind::Unlock,
            'o' => options.close = true,
            'F' => options.fork = false,
            'n' => options.block = false,
            'v' => options.verbose = true,
            'w' => {
                let Some(seconds) = value.to_str().and_then(seconds) else {
                    return Err(self.fail(
                        code::USAGE,
                        [b"invalid timeout value: '", value.as_bytes(), b"'"].concat(),
                    ));
                };
                // A limit beyond the range of the kernel's timer.
                let limit = Duration::try_from_secs_f64(seconds)
                    .ok()
                    .filter(|limit| i64::try_from(limit.as_secs()).is_ok());
                let Some(limit) = limit else {
                    return Err(self.fail(code::OS, "cannot set up timer: Invalid argument"));
                };
                options.limit = Some(limit);
            }
            'E' => match self.number(value, "invalid exit code")?.try_into() {
                Ok(conflict) => options.conflict = conflict,
                Err(_) => {
                    return Err(
                        self.fail(code::USAGE, "exit code out of range (expected 0 to 255)")
                    );
                }
            },
            'V' => {
                self.say(format!(
                    "{} from lockkit {}\n",
                    self.short,
                    env!("CARGO_PKG_VERSION")
                ));
                return Err(End(code::OK));
            }
            _ => {
                self.say(help(&self.short));
                return Err(End(code::OK));
            }
        }
        Ok(())
    }

    /// Parses a number as strtol(3) does, to the end.
    fn number(&self, text: &OsStr, what: &str) -> Result<i32, End> {
        let digits = text.to_str().unwrap_or_default().trim_ascii_start();
        let unsigned = digits.strip_prefix(['+', '-']).unwrap_or(digits);
        let is_number = !unsigned.is_empty() && unsigned.bytes().all(|byte| byte.is_ascii_digit());
        if let (true, Ok(number)) = (is_number, digits.parse()) {
            return Ok(number);
        }
        let why = if is_number {
            format!(": {}", text_of(Errno::RANGE))
        } else {
            String::new()
        };
        let shown = [
            what.as_bytes(),
            b": '",
            text.as_bytes(),
            b"'",
            why.as_bytes(),
        ]
        .concat();
        Err(self.fail(code::USAGE, shown))
    }

    /// Opens the file or directory, or creates the file with mode 0666 less the umask.
    fn open(&self, path: &OsStr) -> Result<File, End> {
        let open = |flags: OFlags, create: bool| {
            let mut options = OpenOptions::new();
            // Created with read access only, which `create` of the standard library does not
            // support.
            let flags = if create {
                flags | OFlags::CREATE
            } else {
                flags
            };
            options
                .read(true)
                .mode(0o666)
                .custom_flags((flags | OFlags::NOCTTY).bits() as i32)
                .open(path)
        };
        let opened = match open(OFlags::empty(), true) {
            // A directory cannot be opened with O_CREAT.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                open(OFlags::empty(), false)
            }
            opened => opened,
        };
        opened.map_err(|error| {
            let code = match Errno::from_io_error(&error) {
                Some(Errno::NOMEM | Errno::MFILE | Errno::NFILE) => code::OS,
                Some(Errno::ROFS | Errno::NOSPC) => code::CANNOT_CREATE,
                _ => code::NO_INPUT,
            };
            let why = format!(": {}", text(&error));
            self.fail(
                code,
                [b"cannot open lock file ", path.as_bytes(), why.as_bytes()].concat(),
            )
        })
    }

    /// Returns the command in the arguments after the file.
    fn command(&self, given: &[OsString]) -> Result<Vec<OsString>, End> {
        match given {
            [option, command @ ..] if option == "-c" || option == "--command" => {
                let [command] = command else {
                    let option = option.to_string_lossy();
                    return Err(self.fail(
                        code::USAGE,
                        format!("{option} requires exactly one command argument"),
                    ));
                };
                let shell = std::env::var_os("SHELL").filter(|shell| !shell.is_empty());
                Ok(vec![
                    shell.unwrap_or_else(|| "/bin/sh".into()),
                    "-c".into(),
                    command.clone(),
                ])
            }
            command => Ok(command.to_vec()),
        }
    }

    /// Acquires the lock; the inner error is the system's.
    fn lock(&self, file: &File, options: &Options) -> Result<Result<(), Errno>, End> {
        // A limit of zero means no wait: a timer of zero would never expire.
        let waits = options.block && options.limit != Some(Duration::ZERO);
        let limit = options.limit.filter(|_| waits);
        let tried = match (options.kind, waits, limit) {
            (Kind::Unlock, ..) => flock(file, FlockOperation::Unlock),
            (kind, false, _) => flock(file, kind.at_once()),
            (kind, true, None) => wait(file, kind),
            (kind, true, Some(limit)) => match flock(file, kind.at_once()) {
                Err(Errno::WOULDBLOCK) => match self.wait_for(file, kind, limit) {
                    Some(waited) => waited,
                    None => {
                        if options.verbose {
                            self.warn("timeout while waiting to get lock");
                        }
                        return Err(End(options.conflict));
                    }
                },
                tried => tried,
            },
        };
        if tried == Err(Errno::WOULDBLOCK) {
            if options.verbose {
                self.warn("failed to get lock");
            }
            return Err(End(options.conflict));
        }
        Ok(tried)
    }

    /// Waits in the kernel, on a thread that is abandoned at the deadline: this process ends then.
    fn wait_for(&self, file: &File, kind: Kind, limit: Duration) -> Option<Result<(), Errno>> {
        let copy = match file.try_clone() {
            Ok(copy) => copy,
            Err(error) => return Some(Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))),
        };
        let (send, done) = channel();
        let waiter = std::thread::Builder::new().spawn(move || {
            let _ = send.send(wait(&copy, kind));
        });
        match waiter {
            Ok(_) => done.recv_timeout(limit).ok(),
            Err(error) => Some(Err(Errno::from_io_error(&error).unwrap_or(Errno::NOMEM))),
        }
    }

    fn execute(
        &self,
        file: &File,
        program: &OsStr,
        arguments: &[OsString],
        options: &Options,
    ) -> Result<u8, End> {
        sys::wait_for_children();
        if options.verbose {
            self.say(
                [
                    self.short.as_bytes(),
                    b": executing ",
                    program.as_bytes(),
                    b"\n",
                ]
                .concat(),
            );
        }
        if !options.close {
            let inherited = rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty());
            inherited.map_err(|error| self.fail(code::OS, text_of(error)))?;
        }
        let mut command = Command::new(program);
        sys::as_given(command.args(arguments));
        let failed = |error: io::Error| {
            let code = if error.kind() == io::ErrorKind::OutOfMemory {
                code::OS
            } else {
                code::UNAVAILABLE
            };
            let why = format!(": {}", text(&error));
            self.fail(
                code,
                [b"failed to execute ", program.as_bytes(), why.as_bytes()].concat(),
            )
        };
        if !options.fork {
            return Err(failed(command.exec()));
        }
        let mut child = command.spawn().map_err(failed)?;
        let status = child
            .wait()
            .map_err(|error| self.fail(CONFLICT, format!("waitpid failed: {}", text(&error))))?;
        let signalled = || {
            status
                .signal()
                .map(|signal| signal + i32::from(code::SIGNALLED))
        };
        Ok(status
            .code()
            .or_else(signalled)
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(code::OS))
    }

    /// Writes at once, because the command may write to the same output.
    fn say(&self, text: impl AsRef<[u8]>) {
        let mut out = io::stdout().lock();
        if let Err(error) = out.write_all(text.as_ref()).and_then(|()| out.flush()) {
            self.unsaid.borrow_mut().get_or_insert(error);
        }
    }

    fn warn(&self, message: impl AsRef<[u8]>) {
        self.note(&[self.short.as_bytes(), b": ", message.as_ref()].concat());
    }

    /// Writes a line to the standard error.
    fn note(&self, line: &[u8]) {
        let closed = || sys::inherited(2).is_err();
        if closed()
            || io::stderr()
                .lock()
                .write_all(&[line, b"\n"].concat())
                .is_err()
        {
            self.mute.set(true);
        }
    }

    fn fail(&self, code: u8, message: impl AsRef<[u8]>) -> End {
        self.warn(message);
        End(code)
    }

    /// Reports a misuse as getopt(3) does, with the full name.
    fn misused(&self, message: impl AsRef<[u8]>) -> End {
        self.note(&[self.full.as_bytes(), b": ", message.as_ref()].concat());
        self.try_help()
    }

    fn try_help(&self) -> End {
        self.note(format!("Try '{} --help' for more information.", self.short).as_bytes());
        End(code::USAGE)
    }
}

impl Kind {
    fn at_once(self) -> FlockOperation {
        match self {
            Self::Shared => FlockOperation::NonBlockingLockShared,
            Self::Exclusive => FlockOperation::NonBlockingLockExclusive,
            Self::Unlock => FlockOperation::NonBlockingUnlock,
        }
    }
}

fn wait(file: &File, kind: Kind) -> Result<(), Errno> {
    let operation = match kind {
        Kind::Shared => FlockOperation::LockShared,
        Kind::Exclusive => FlockOperation::LockExclusive,
        Kind::Unlock => FlockOperation::Unlock,
    };
    rustix::io::retry_on_intr(|| flock(file, operation))
}

/// Parses a number as strtod(3) does, to the end: in decimal, or in hexadecimal with a binary
/// exponent.
fn seconds(text: &str) -> Option<f64> {
    let text = text.trim_ascii_start();
    let (sign, unsigned) = match text.strip_prefix('-') {
        Some(unsigned) => (-1.0, unsigned),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    let Some(hex) = unsigned
        .strip_prefix("0x")
        .or_else(|| unsigned.strip_prefix("0X"))
    else {
        return text.parse().ok();
    };
    let (digits, exponent) = match hex.split_once(['p', 'P']) {
        Some((digits, exponent)) => (digits, exponent.parse::<i32>().ok()?),
        None => (hex, 0),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let all = || whole.chars().chain(part.chars());
    all().next()?;
    let value = all().try_fold(0.0, |value, digit| {
        Some(value * 16.0 + f64::from(digit.to_digit(16)?))
    })?;
    Some(
        sign * value
            * 2f64.powi(exponent.saturating_sub(i32::try_from(part.len()).ok()?.saturating_mul(4))),
    )
}

/// Returns the C library's text of the error.
fn text(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error")
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn text_of(error: Errno) -> String {
    text(&error.into())
}

fn help(name: &str) -> String {
    format!(
        "
Usage:
 {name} [options] <file>|<directory> <command> [<argument>...]
 {name} [options] <file>|<directory> -c <command>
 {name} [options] <file descriptor number>

Manage file locks from shell scripts.

Options:
 -s, --shared             get a shared lock
 -x, --exclusive          get an exclusive lock (default)
 -u, --unlock             remove a lock
 -n, --nonblock           fail rather than wait
 -w, --timeout <secs>     wait for a limited amount of time
 -E, --conflict-exit-code <number>  exit code after conflict or timeout
 -o, --close              close file descriptor before running command
 -c, --command <command>  run a single command string through the shell
 -F, --no-fork            execute command without forking
     --verbose            increase verbosity

 -h, --help               display this help
 -V, --version            display version

For more details see flock(1).
"
    )
}
