//! Checks that the name is held while a function runs, and free after the function has ended in any
//! way.

// They are const, but clippy does not see this in the macro's expansion.
#![cfg_attr(windows, allow(clippy::missing_const_for_thread_local))]

use std::future::Future;
use std::panic::catch_unwind;
use std::pin::pin;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use lockkit::{NamedGuard, NamedLock, Scope, single_instance};

fn is_held(name: &str) -> bool {
    match NamedLock::new(name).unwrap().try_lock() {
        Ok(_) => false,
        Err(error) if error.is_held() => true,
        Err(error) => panic!("{error}"),
    }
}

fn hold(name: &str) -> NamedGuard {
    NamedLock::new(name).unwrap().try_lock().unwrap()
}

const TASK: &str = "LOCKKIT_TEST_TASK";

/// Returns this program as a child that runs only `test` and does `task`.
fn child(test: &str, task: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--nocapture"])
        .env(TASK, task)
        .stdout(Stdio::null());
    command
}

/// Returns the task of this process, if it is a child.
fn child_task() -> Option<String> {
    std::env::var(TASK).ok()
}

/// Asserts that `call` runs with `name` held and leaves it free.
#[track_caller]
fn assert_holds(name: &str, call: impl FnOnce() -> bool) {
    assert!(call(), "{name} was free inside");
    assert!(!is_held(name), "{name} is still held");
}

#[test]
fn held_name_in_result_function_returns_error() {
    const NAME: &str = "lockkit-test-macro-result";

    #[single_instance(NAME)]
    fn work() -> lockkit::Result<bool> {
        Ok(is_held(NAME))
    }

    assert_holds(NAME, || work().unwrap());
    let _held = hold(NAME);
    let error = work().unwrap_err();
    assert!(error.is_held());
    assert_eq!(error.owner().unwrap().pid(), std::process::id());
}

#[test]
fn held_name_converts_to_own_error_type() {
    const NAME: &str = "lockkit-test-macro-alias";
    type Outcome<T, E = Box<dyn std::error::Error + Send + Sync>> = Result<T, E>;

    #[derive(Debug)]
    enum Own {
        Lock(lockkit::Error),
    }

    impl From<lockkit::Error> for Own {
        fn from(error: lockkit::Error) -> Self {
            Self::Lock(error)
        }
    }

    #[single_instance(NAME)]
    fn boxed() -> Outcome<bool> {
        Ok(is_held(NAME))
    }

    #[single_instance(NAME)]
    fn io() -> std::io::Result<bool> {
        Ok(is_held(NAME))
    }

    #[single_instance(NAME)]
    fn own() -> Result<bool, Own> {
        Ok(is_held(NAME))
    }

    #[single_instance(NAME)]
    fn generic<E: From<lockkit::Error>>() -> Result<bool, E> {
        Ok(is_held(NAME))
    }

    assert_holds(NAME, || boxed().unwrap());
    assert_holds(NAME, || io().unwrap());
    assert_holds(NAME, || own().unwrap());
    assert_holds(NAME, || generic::<Own>().unwrap());
    let _held = hold(NAME);
    assert!(boxed().unwrap_err().is::<lockkit::Error>());
    assert_eq!(io().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert!(matches!(own(), Err(Own::Lock(error)) if error.is_held()));
    assert!(matches!(generic::<Own>(), Err(Own::Lock(error)) if error.is_held()));
}

#[test]
fn held_name_in_option_function_returns_none() {
    const NAME: &str = "lockkit-test-macro-option";

    #[single_instance(NAME)]
    fn work() -> Option<bool> {
        Some(is_held(NAME))
    }

    assert_holds(NAME, || work().unwrap());
    let _held = hold(NAME);
    assert_eq!(work(), None);
}

#[test]
fn on_held_handler_decides_return_value() {
    const NAME: &str = "lockkit-test-macro-on-held";

    fn why(error: lockkit::Error) -> String {
        error.to_string()
    }

    #[single_instance(NAME, on_held = why)]
    fn work() -> String {
        is_held(NAME).to_string()
    }

    assert_holds(NAME, || work() == "true");
    let _held = hold(NAME);
    assert!(
        work().starts_with("the named lock \"lockkit-test-macro-on-held\" is held by pid "),
        "{}",
        work()
    );
}

#[test]
fn wait_forever_ends_when_name_is_free() {
    const NAME: &str = "lockkit-test-macro-forever";

    #[single_instance(NAME, wait = "forever")]
    fn work() -> bool {
        is_held(NAME)
    }

    #[single_instance(NAME, wait = "forever")]
    fn nothing(done: &mpsc::Sender<()>) {
        done.send(()).unwrap();
    }

    assert_holds(NAME, work);
    let held = hold(NAME);
    let (done, is_done) = mpsc::channel();
    thread::scope(|threads| {
        threads.spawn(|| nothing(&done));
        assert!(
            is_done.recv_timeout(Duration::from_millis(100)).is_err(),
            "it did not wait"
        );
        drop(held);
        is_done
            .recv_timeout(Duration::from_secs(10))
            .expect("it went on");
    });
}

#[test]
fn wait_with_limit_ends_at_limit() {
    const NAME: &str = "lockkit-test-macro-limit";

    #[single_instance(NAME, wait = "100ms")]
    fn work() -> lockkit::Result<bool> {
        Ok(is_held(NAME))
    }

    assert_holds(NAME, || work().unwrap());
    let _held = hold(NAME);
    let start = Instant::now();
    assert!(work().unwrap_err().is_timeout());
    let waited = start.elapsed();
    assert!(
        (Duration::from_millis(100)..Duration::from_secs(10)).contains(&waited),
        "{waited:?}"
    );
}

#[test]
fn refuse_returns_convertible_error_and_panics_otherwise() {
    use lockkit::instance::{OrGiveUp as _, Returns};

    fn error() -> lockkit::Error {
        NamedLock::new("0").unwrap_err()
    }

    let returned: Result<(), std::io::Error> = Returns::new().refuse(error());
    assert_eq!(
        returned.unwrap_err().kind(),
        std::io::ErrorKind::InvalidInput
    );
    assert_eq!(Returns::<Option<u8>>::new().refuse(error()), None);
    let panic = catch_unwind(|| Returns::<Result<(), String>>::new().refuse(error())).unwrap_err();
    assert!(
        panic
            .downcast_ref::<String>()
            .unwrap()
            .contains("starts with an ASCII letter")
    );
}

#[test]
fn scope_without_argument_is_user() {
    const NAME: &str = "lockkit-test-macro-scope";

    #[single_instance(NAME, scope = "machine")]
    fn machine() -> Option<bool> {
        let lock = NamedLock::builder(NAME)
            .scope(Scope::Machine)
            .build()
            .unwrap();
        Some(lock.try_lock().is_err_and(|error| error.is_held()) && !is_held(NAME))
    }

    #[single_instance(NAME, scope = "user")]
    fn user() -> Option<bool> {
        Some(is_held(NAME))
    }

    assert_holds(NAME, || machine().unwrap());
    assert_holds(NAME, || user().unwrap());
}

#[test]
fn early_return_and_panic_release_name() {
    const NAME: &str = "lockkit-test-macro-leave";

    #[single_instance(NAME)]
    fn work(how: &str) -> Result<bool, Box<dyn std::error::Error>> {
        let held = is_held(NAME);
        match how {
            "return" => return Ok(held),
            "?" => how.parse::<u8>()?,
            _ => panic!("{how}"),
        };
        Ok(false)
    }

    assert_holds(NAME, || work("return").unwrap());
    assert_holds(NAME, || {
        work("?").unwrap_err().is::<std::num::ParseIntError>()
    });
    assert_holds(NAME, || catch_unwind(|| work("panic")).is_err());
}

#[test]
fn locals_are_dropped_before_release() {
    const NAME: &str = "lockkit-test-macro-locals";

    struct Local<'a>(&'a mut bool);

    impl Drop for Local<'_> {
        fn drop(&mut self) {
            *self.0 = is_held(NAME);
        }
    }

    #[single_instance(NAME)]
    fn work(held: &mut bool) -> Option<()> {
        let _local = Local(held);
        Some(())
    }

    let mut held = false;
    assert_holds(NAME, || work(&mut held).is_some());
    assert!(held);
}

#[test]
fn attribute_on_methods_and_generic_functions_works() {
    const NAME: &str = "lockkit-test-macro-shapes";

    struct Job {
        runs: Vec<bool>,
    }

    impl Job {
        #[single_instance(NAME)]
        fn run(&mut self) -> lockkit::Result<&mut bool> {
            self.runs.push(is_held(NAME));
            Ok(self.runs.last_mut().unwrap())
        }

        #[single_instance(NAME)]
        fn end(self) -> Option<Vec<bool>> {
            is_held(NAME).then_some(self.runs)
        }
    }

    #[single_instance(NAME)]
    fn longest<'a, T: ?Sized>(
        all: &'a [&'a T],
        len: impl Fn(&T) -> usize,
    ) -> lockkit::Result<Option<&'a T>> {
        assert!(is_held(NAME));
        Ok(all.iter().copied().max_by_key(|one| len(one)))
    }

    #[single_instance(NAME)]
    fn opaque_in_result() -> lockkit::Result<impl Iterator<Item = bool>> {
        Ok([is_held(NAME)].into_iter())
    }

    #[single_instance(NAME)]
    fn opaque_in_option<'a>(text: &'a str) -> Option<impl Fn() -> &'a str + use<'a>> {
        is_held(NAME).then_some(move || text)
    }

    #[single_instance(NAME, wait = "forever")]
    fn opaque_in_waiting_result() -> Result<impl Sized, String> {
        is_held(NAME).then_some(1).ok_or_else(String::new)
    }

    #[single_instance(NAME, wait = "forever")]
    fn opaque() -> impl Iterator<Item = bool> {
        [is_held(NAME)].into_iter()
    }

    let mut job = Job { runs: Vec::new() };
    assert_holds(NAME, || *job.run().unwrap());
    assert_holds(NAME, || job.end() == Some(vec![true]));
    assert_holds(NAME, || {
        longest(&["a", "bcd", "ef"], str::len).unwrap() == Some("bcd")
    });
    assert_holds(NAME, || opaque_in_result().unwrap().eq([true]));
    assert_holds(NAME, || opaque_in_option("text").unwrap()() == "text");
    assert_holds(NAME, || opaque_in_waiting_result().is_ok());
    assert_holds(NAME, || opaque().eq([true]));
    let _held = hold(NAME);
    assert!(longest(&["a"], str::len).is_err());
    assert!(opaque_in_result().is_err());
    assert!(opaque_in_option("text").is_none());
}

#[test]
fn two_attributes_on_function_hold_both_names() {
    const OUTER: &str = "lockkit-test-macro-outer";
    const INNER: &str = "lockkit-test-macro-inner";

    #[single_instance(OUTER)]
    #[single_instance(INNER)]
    fn work() -> Option<bool> {
        Some(is_held(OUTER) && is_held(INNER))
    }

    assert_holds(OUTER, || work().unwrap());
    assert!(!is_held(INNER));
}

#[test]
fn async_function_holds_name_across_awaits() {
    const NAME: &str = "lockkit-test-macro-async";

    #[single_instance(NAME)]
    async fn work() -> lockkit::Result<bool> {
        let before = is_held(NAME);
        tokio::time::sleep(Duration::from_millis(1)).await;
        Ok(before && is_held(NAME))
    }

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_time()
        .build()
        .unwrap();
    // Spawning requires that the future, and so the guard, is `Send`.
    assert_holds(NAME, || {
        runtime.block_on(runtime.spawn(work())).unwrap().unwrap()
    });
    let _held = hold(NAME);
    assert!(runtime.block_on(work()).unwrap_err().is_held());
}

#[test]
fn future_acquires_at_first_poll_and_releases_on_drop() {
    const NAME: &str = "lockkit-test-macro-future";

    #[single_instance(NAME)]
    async fn work() -> Option<()> {
        std::future::pending().await
    }

    {
        let mut future = pin!(work());
        assert!(!is_held(NAME), "nothing has run yet");
        assert_eq!(
            future
                .as_mut()
                .poll(&mut Context::from_waker(Waker::noop())),
            Poll::Pending
        );
        assert!(is_held(NAME));
    }
    assert!(!is_held(NAME));
}

#[test]
fn attribute_on_async_method_with_borrow_works() {
    const NAME: &str = "lockkit-test-macro-async-method";

    struct Job(Vec<bool>);

    impl Job {
        #[single_instance(NAME, wait = "1s")]
        async fn run<'a, T>(&mut self, value: &'a T) -> Result<&'a T, Box<dyn std::error::Error>> {
            tokio::task::yield_now().await;
            self.0.push(is_held(NAME));
            Ok(value)
        }
    }

    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut job = Job(Vec::new());
    assert_holds(NAME, || {
        runtime.block_on(job.run(&1)).is_ok_and(|value| *value == 1)
    });
    assert_eq!(job.0, [true]);
}

#[test]
fn on_recovered_gets_dead_owner() {
    const NAME: &str = "lockkit-test-macro-recovered";
    thread_local! {
        static DEAD: std::cell::Cell<Option<u32>> = const { std::cell::Cell::new(None) };
    }

    fn note(recovered: &lockkit::Recovered) {
        assert!(is_held(NAME), "the name is taken by now");
        DEAD.set(recovered.owner().map(lockkit::Owner::pid));
    }

    #[single_instance(NAME, on_recovered = note)]
    fn work() -> Option<bool> {
        Some(is_held(NAME))
    }

    if child_task().is_some() {
        std::mem::forget(hold(NAME));
        std::process::abort();
    }
    let mut child = child("on_recovered_gets_dead_owner", "die")
        .spawn()
        .unwrap();
    assert!(!child.wait().unwrap().success());
    assert_holds(NAME, || work().unwrap());
    assert_eq!(DEAD.get(), Some(child.id()));
    DEAD.set(None);
    assert_holds(NAME, || work().unwrap());
    assert_eq!(DEAD.get(), None, "a release is no death");
}

#[test]
fn main_with_held_name_reports_and_exits() {
    const NAME: &str = "lockkit-test-macro-main";

    fn plain() {
        #[single_instance(NAME)]
        fn main() {}
        main()
    }

    fn waiting() {
        #[single_instance(NAME, wait = "50ms")]
        fn main() -> Result<(), String> {
            Ok(())
        }
        main().unwrap()
    }

    fn with_code() {
        #[single_instance(NAME, exit_code = 3)]
        fn main() -> std::process::ExitCode {
            std::process::ExitCode::SUCCESS
        }
        assert_eq!(main(), std::process::ExitCode::SUCCESS)
    }

    fn with_handler() {
        #[single_instance(NAME, on_held = say_so)]
        fn main() {}
        fn say_so(error: lockkit::Error) {
            eprintln!("handled: {error}");
        }
        main()
    }

    match child_task().as_deref() {
        None => {}
        Some("plain") => return plain(),
        Some("waiting") => return waiting(),
        Some("with code") => return with_code(),
        Some("with handler") => return with_handler(),
        Some(_) => lockkit::instance::exit(NAME, &NamedLock::new("0").unwrap_err(), 75),
    }
    let held = hold(NAME);
    let pid = std::process::id();
    let running = format!("{NAME} is already running: pid {pid} (");
    let handled = format!("handled: the named lock {NAME:?} is held by pid {pid} (");
    let failed = format!("{NAME} cannot start: invalid lock name \"0\"");
    for (task, code, said) in [
        ("plain", 75, &running),
        ("waiting", 75, &running),
        ("with code", 3, &running),
        ("with handler", 0, &handled),
        ("fail", 71, &failed),
    ] {
        let output = child("main_with_held_name_reports_and_exits", task)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{task}: {stderr}");
        assert!(
            stderr.starts_with(said) && stderr.lines().count() == 1,
            "{task}: {stderr}"
        );
    }
    drop(held);
    for task in ["plain", "waiting", "with code", "with handler"] {
        let output = child("main_with_held_name_reports_and_exits", task)
            .output()
            .unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{task}: {output:?}"
        );
    }
}

// Instances exist on Linux only.
#[cfg(target_os = "linux")]
#[test]
fn on_second_runs_after_on_recovered_returns() {
    const NAME: &str = "lockkit-test-macro-recovered-first";
    static STEPS: std::sync::Mutex<Vec<&str>> = std::sync::Mutex::new(Vec::new());

    fn step(step: &'static str) {
        STEPS.lock().unwrap().push(step);
    }

    fn activate(limit: Duration) -> lockkit::Result<()> {
        let lockkit::Instance::Second(second) = lockkit::Instance::enter(NAME)? else {
            panic!("it is taken")
        };
        second.activate(&lockkit::Wait::at_most(limit)).map(drop)
    }

    fn repair(_: &lockkit::Recovered) {
        step("repair");
        assert!(
            activate(Duration::from_millis(100))
                .unwrap_err()
                .is_timeout()
        );
        step("repaired");
    }

    fn opened(_: lockkit::Activation) {
        step("opened");
    }

    #[single_instance(NAME, on_recovered = repair, on_second = opened)]
    fn main() {
        activate(Duration::from_secs(30)).unwrap();
    }

    if child_task().is_some() {
        std::mem::forget(hold(NAME));
        std::process::abort();
    }
    let test = "on_second_runs_after_on_recovered_returns";
    assert!(!child(test, "die").status().unwrap().success());
    main();
    assert_eq!(*STEPS.lock().unwrap(), ["repair", "repaired", "opened"]);
}

// Instances exist on Linux only.
#[cfg(target_os = "linux")]
#[test]
fn on_second_activates_first_instance_and_exits_zero() {
    const NAME: &str = "lockkit-test-macro-on-second";
    const TEST: &str = "on_second_activates_first_instance_and_exits_zero";
    static SEEN: std::sync::Mutex<Vec<(Option<u32>, Option<String>)>> =
        std::sync::Mutex::new(Vec::new());

    fn opened(activation: lockkit::Activation) {
        let token = activation
            .variable("XDG_ACTIVATION_TOKEN")
            .and_then(|token| token.to_str())
            .map(str::to_owned);
        SEEN.lock().unwrap().push((activation.pid(), token));
    }

    fn work() {
        #[single_instance(NAME, on_second = opened)]
        fn main() {
            eprintln!("first");
        }
        main()
    }

    fn impatient() {
        #[single_instance(NAME, on_second = opened, wait = "50ms", exit_code = 4)]
        fn main() {
            eprintln!("first");
        }
        main()
    }

    match child_task().as_deref() {
        None => {}
        Some("work") => return work(),
        Some(_) => return impatient(),
    }
    let start = |task: &str| {
        let command = &mut child(TEST, task);
        let child = command
            .env("XDG_ACTIVATION_TOKEN", "a token")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        let output = child.wait_with_output().unwrap();
        (
            pid,
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert_eq!(start("work").2, "first\n", "nobody else runs");
    {
        #[single_instance(NAME, on_second = opened)]
        fn main() {}
        main();
        assert!(!is_held(NAME), "it is held as long as it runs");
    }
    let lockkit::Instance::First(first) = lockkit::Instance::enter(NAME).unwrap() else {
        panic!("it is free")
    };
    first.on_activation(opened).unwrap();
    let (pid, code, said) = start("work");
    assert_eq!((code, &*said), (Some(0), ""));
    assert_eq!(
        *SEEN.lock().unwrap(),
        [(Some(pid), Some("a token".to_owned()))]
    );
    drop(first);

    // The first instance exists and takes no activations.
    let held = hold(NAME);
    let (_, code, said) = start("impatient");
    assert_eq!(code, Some(4), "{said}");
    let expected = format!(
        "{NAME} is already running, but does not answer: pid {} (",
        std::process::id()
    );
    assert!(
        said.starts_with(&expected) && said.lines().count() == 1,
        "{said}"
    );
    drop(held);
}
