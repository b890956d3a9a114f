//! Instances of a program: which process is first, how a second start hands over its arguments, and
//! the effect of processes that end, hang or attack.

#![cfg(target_os = "linux")]

use std::ffi::OsString;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use lockkit::instance::{MOST_BYTES, Outcome};
use lockkit::{
    Activation, CancelToken, ErrorKind, FirstInstance, Instance, NamedLock, SecondInstance, Wait,
};
use lockkit_tests::helper_process::{Actor, signal_pid};
use lockkit_tests::instances::{VARIABLE, address, call, empty_request, frame};
use lockkit_tests::namespaces::UserNamespace;
use lockkit_tests::{Belongings, LIVELY, another_user, fresh_name, until};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::Signal;

fn my_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn name() -> String {
    fresh_name("lockkit-test-instance")
}

fn first(name: &str) -> FirstInstance {
    match Instance::enter(name).unwrap() {
        Instance::First(first) => first,
        Instance::Second(second) => panic!("{:?} is first", second.owner()),
    }
}

fn second(name: &str) -> SecondInstance {
    match Instance::enter(name).unwrap() {
        Instance::Second(second) => second,
        Instance::First(_) => panic!("nobody is first"),
    }
}

fn answer(outcome: Outcome) -> Vec<u8> {
    match outcome {
        Outcome::Answered(bytes) => bytes,
        Outcome::BecameFirst(_) => panic!("it became first"),
    }
}

fn in_time() -> Wait {
    Wait::at_most(LIVELY)
}

fn next(first: &FirstInstance) -> Activation {
    first
        .next_activation(&in_time())
        .unwrap()
        .expect("an activation in time")
}

/// Returns the answer of a serving actor to the activation of `sender` with no arguments of its
/// own.
fn answered(sender: &Actor) -> String {
    format!("answered {} {} [] 0", my_uid(), sender.pid())
}

#[test]
fn activate_delivers_request_unchanged() {
    let name = name();
    let first = first(&name);
    let directory = tempfile::tempdir().unwrap();
    let arguments: Vec<OsString> = [
        &b"one"[..],
        b"--two=2",
        b"",
        b" ",
        b"with space",
        b"a\nb",
        b"\"quoted\"",
        b"'",
        b"$HOME",
        b"*",
        b"\xff\xfe\x80",
        "naïve ☃".as_bytes(),
        b"-",
        b"--",
        b"\\",
    ]
    .map(|argument| OsString::from_vec(argument.to_vec()))
    .to_vec();
    let value = OsString::from_vec(b"\xf0value".to_vec());
    let mut sender = Actor::start_instance_with(&name, |command| {
        command
            .args(&arguments)
            .current_dir(directory.path())
            .env(VARIABLE, &value);
    });
    sender.expect("enter", &format!("second of {}", std::process::id()));
    sender.tell("activate-with 30000 3");
    let activation = next(&first);
    assert_eq!(activation.arguments()[1..3], ["instance", &*name]);
    assert_eq!(activation.arguments()[3..], arguments);
    assert_eq!(
        activation.directory(),
        Some(&*directory.path().canonicalize().unwrap())
    );
    assert_eq!(
        activation.resolve("file"),
        directory.path().canonicalize().unwrap().join("file")
    );
    assert_eq!(activation.resolve("/file").as_os_str().as_bytes(), b"/file");
    assert_eq!(activation.variables(), [(VARIABLE.into(), value.clone())]);
    assert_eq!(activation.variable(VARIABLE), Some(&*value));
    assert_eq!(activation.variable("HOME"), None);
    assert_eq!(activation.bytes(), b"xxx");
    assert_eq!(
        (activation.uid(), activation.pid()),
        (my_uid(), Some(sender.pid()))
    );
    activation.answer(b"welcome").unwrap();
    assert_eq!(sender.answer(), "answered welcome");
}

#[test]
fn dropped_activation_answers_with_no_bytes() {
    let name = name();
    let first = first(&name);
    let mut sender = Actor::start_instance(&name);
    sender.ask("enter");
    sender.tell("activate 30000");
    drop(next(&first));
    assert_eq!(sender.answer(), "answered ");
}

#[test]
fn activate_with_one_mebibyte_works_and_with_more_fails() {
    let name = name();
    let first = first(&name);
    let bytes: Vec<u8> = (0..MOST_BYTES).map(|at| (at % 251) as u8).collect();
    std::thread::scope(|threads| {
        let second = second(&name).bytes(bytes.clone());
        let sender = threads.spawn(move || second.activate(&in_time()));
        let activation = next(&first);
        assert!(activation.bytes() == bytes);
        let reversed: Vec<u8> = bytes.iter().rev().copied().collect();
        activation.answer(&reversed).unwrap();
        assert!(answer(sender.join().unwrap().unwrap()) == reversed);

        let sender = threads.spawn(|| crate::second(&name).activate(&in_time()));
        let error = next(&first).answer(&vec![0; MOST_BYTES + 1]).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::TooLarge { size, .. } if *size == MOST_BYTES + 1),
            "{error}"
        );
        let error = sender.join().unwrap().unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::NotHandled { .. }),
            "{error}"
        );
    });
    let error = second(&name)
        .bytes(vec![0; MOST_BYTES + 1])
        .activate(&in_time())
        .unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::TooLarge { size, .. } if *size == MOST_BYTES + 1),
        "{error}"
    );
}

#[test]
fn two_hundred_second_instances_at_once_lose_no_message() {
    let name = name();
    let first = first(&name);
    let mut senders: Vec<Actor> = (0..200)
        .map(|number| {
            Actor::start_instance_with(&name, |command| {
                command.arg(format!("number {number}"));
            })
        })
        .collect();
    for sender in &mut senders {
        assert!(sender.ask("enter").starts_with("second of"));
    }
    // The limit is longer than this test itself waits for an answer.
    senders
        .iter_mut()
        .for_each(|sender| sender.tell("activate-with 60000 1000000"));
    let mut seen = Vec::new();
    for activation in first.activations(&in_time()).take(200) {
        let [.., number] = activation.arguments() else {
            panic!("no arguments")
        };
        let number = number.to_str().unwrap().to_owned();
        assert_eq!(activation.bytes().len(), 1_000_000);
        activation
            .answer(format!("hello {number}").as_bytes())
            .unwrap();
        seen.push(number);
    }
    for (number, sender) in senders.iter_mut().enumerate() {
        assert_eq!(sender.answer(), format!("answered hello number {number}"));
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 200);
    assert!(
        first.next_activation(&Wait::none()).unwrap().is_none(),
        "none came twice"
    );
}

#[test]
fn activate_stopped_first_times_out_and_is_never_handled() {
    let name = name();
    let [mut first, mut given_up, mut later] = [(); 3].map(|()| Actor::start_instance(&name));
    first.expect("enter", "first");
    first.signal(Signal::STOP);
    given_up.expect("enter", &format!("second of {}", first.pid()));
    // The size exceeds the kernel's buffer for a first instance that does not read.
    let said = given_up.ask("activate-with 200 1000000");
    let expected = "error NoAnswer: the first instance of ";
    assert!(
        said.starts_with(expected) && said.contains(&format!("it is pid {}", first.pid())),
        "{said}"
    );
    given_up.ask("enter");
    let said = given_up.ask("activate 200");
    assert!(said.starts_with(expected), "{said}");
    given_up.ask("enter");
    let said = given_up.ask("activate 0");
    assert!(said.starts_with(expected), "{said}");
    later.ask("enter");
    later.tell_to_wait("activate 30000");
    first.signal(Signal::CONT);
    first.expect(
        "take 30000",
        &format!("taken {} {} [] 0", my_uid(), later.pid()),
    );
    first.expect("answer hello", "done");
    assert_eq!(later.answer(), "answered hello");
    first.expect("take 0", "none");
}

#[test]
fn second_becomes_first_when_first_dies_before_answer() {
    let name = name();
    let [mut first, mut second] = [(); 2].map(|()| Actor::start_instance(&name));
    first.expect("enter", "first");
    second.ask("enter");
    second.tell("activate 30000");
    assert!(first.ask("take 30000").starts_with("taken "));
    first.kill();
    assert_eq!(second.answer(), "became first");
    let mut third = Actor::start_instance(&name);
    third.expect("enter", &format!("second of {}", second.pid()));
    second.expect("serve", "serving");
    third.expect("activate 30000", &answered(&third));
}

#[test]
fn second_becomes_first_when_first_dies_during_send() {
    let name = name();
    let [mut first, mut second] = [(); 2].map(|()| Actor::start_instance(&name));
    first.expect("enter", "first");
    first.signal(Signal::STOP);
    second.ask("enter");
    second.tell_to_wait("activate-with 30000 1000000");
    first.kill();
    assert_eq!(second.answer(), "became first");
    assert_eq!(second.ask("take 0"), "none");
}

#[test]
fn first_instance_end_promotes_one_waiter_that_serves_rest() {
    for end in ["kill", "release"] {
        let name = name();
        let mut first = Actor::start_instance(&name);
        first.expect("enter", "first");
        let mut senders: Vec<Actor> = (0..20).map(|_| Actor::start_instance(&name)).collect();
        senders
            .iter_mut()
            .for_each(|sender| sender.tell_to_wait("start 30000"));
        // One activation is in progress, the others wait.
        assert!(first.ask("take 30000").starts_with("taken "));
        match end {
            "kill" => first.kill(),
            _ => {
                first.expect("release", "released");
                first.expect("answer late", "done");
            }
        }
        let answers: Vec<String> = senders.iter_mut().map(Actor::answer).collect();
        assert_eq!(
            answers
                .iter()
                .filter(|answer| *answer == "became first")
                .count(),
            1,
            "{answers:?}"
        );
        let late = answers
            .iter()
            .filter(|answer| *answer == "answered late")
            .count();
        assert_eq!(late, usize::from(end == "release"), "{answers:?}");
        let own = senders
            .iter()
            .zip(&answers)
            .filter(|(sender, answer)| **answer == answered(sender))
            .count();
        assert_eq!(own, 19 - late, "{answers:?}");
    }
}

#[test]
fn concurrent_starts_have_one_first_instance() {
    let name = name();
    let mut starters = [(); 3].map(|()| Actor::start_instance(&name));
    for _ in 0..300 {
        starters
            .iter_mut()
            .for_each(|starter| starter.tell("start 30000"));
        let answers = starters.each_mut().map(Actor::answer);
        let firsts: Vec<usize> = (0..starters.len())
            .filter(|at| ["first", "became first"].contains(&&*answers[*at]))
            .collect();
        let [first] = firsts[..] else {
            panic!("{answers:?}")
        };
        for (starter, said) in starters
            .iter()
            .zip(&answers)
            .filter(|(_, said)| !said.ends_with("first"))
        {
            assert_eq!(*said, answered(starter));
        }
        starters[first].expect("release", "released");
    }
}

#[test]
fn start_racing_release_or_kill_is_answered_or_first() {
    let name = name();
    let mut holder = Actor::start_instance(&name);
    holder.expect("start 0", "first");
    for round in 0..60 {
        let mut starters = [(); 2].map(|()| Actor::start_instance(&name));
        starters
            .iter_mut()
            .for_each(|starter| starter.tell("start 30000"));
        if round % 2 == 0 {
            holder.tell("release");
        } else {
            holder.kill();
        }
        let answers = starters.each_mut().map(Actor::answer);
        let mut firsts = 0;
        for (starter, said) in starters.into_iter().zip(&answers) {
            let is_first =
                ["first", "became first"].contains(&&**said) || said.starts_with("first recovered");
            assert!(is_first || *said == answered(&starter), "{answers:?}");
            if is_first {
                firsts += 1;
                holder = starter;
            }
        }
        assert!(firsts <= 1, "{answers:?}");
        if firsts == 0 {
            // Both were answered before the end.
            holder = Actor::start_instance(&name);
            let said = holder.ask("start 30000");
            assert!(
                said.starts_with("first") || said == "became first",
                "{said}"
            );
        }
    }
}

#[test]
fn second_takes_over_after_first_crashes_at_any_step() {
    if !lockkit_tests::failpoint::are_enabled() {
        return;
    }
    for at in 1.. {
        let name = name();
        let [mut first, mut second] = [(); 2].map(|()| Actor::start_instance(&name));
        first.expect(&format!("kill-at {at}"), "armed");
        first.tell("start 30000");
        // The process may have died by now, or be about to die.
        let began = first.answer();
        let said = second.ask("start 30000");
        let is_first = said == "became first" || said.starts_with("first");
        assert!(
            is_first || said == answered(&second),
            "killed at step {at}: {said}"
        );
        if is_first {
            first.kill();
            let mut third = Actor::start_instance(&name);
            third.expect("start 30000", &answered(&third));
        } else if began != "gone" && first.ask("passed").starts_with("passed ") {
            println!("{}", first.ask("passed"));
            assert!(at > 6, "it passed only {at} steps");
            return;
        }
    }
}

#[test]
fn second_takes_over_after_first_crashes_in_release() {
    if !lockkit_tests::failpoint::are_enabled() {
        return;
    }
    for at in 1.. {
        let name = name();
        let [mut first, mut second, mut third] = [(); 3].map(|()| Actor::start_instance(&name));
        first.expect("enter", "first");
        for sender in [&mut second, &mut third] {
            sender.tell_to_wait("start 30000");
        }
        // One activation is in progress, and gets no answer. The first instance has not taken the
        // other yet.
        assert!(first.ask("take 30000").starts_with("taken "));
        first.expect(&format!("kill-at {at}"), "armed");
        let survived = first.ask("release") == "released";
        first.kill();
        let answers = [second.answer(), third.answer()];
        let became = answers
            .iter()
            .filter(|answer| *answer == "became first")
            .count();
        assert_eq!(became, 1, "killed at step {at}: {answers:?}");
        let [second, third] = [&second, &third].map(answered);
        assert!(
            answers.contains(&second) || answers.contains(&third),
            "killed at step {at}: {answers:?}"
        );
        if survived {
            assert!(at > 1, "it passed no step");
            return;
        }
    }
}

#[test]
fn second_killed_at_any_step_does_not_affect_first() {
    if !lockkit_tests::failpoint::are_enabled() {
        return;
    }
    let name = name();
    let [mut first, mut other] = [(); 2].map(|()| Actor::start_instance(&name));
    first.expect("start 0", "first");
    let before = Belongings::of(first.pid());
    for at in 1.. {
        let mut victim = Actor::start_instance(&name);
        victim.expect(&format!("kill-at {at}"), "armed");
        let said = victim.ask("start 30000");
        other.expect("start 30000", &answered(&other));
        if said != "gone" {
            assert_eq!(said, answered(&victim));
            assert!(at > 3, "it passed only {at} steps");
            break;
        }
    }
    until("the first has closed all", || {
        Belongings::of(first.pid()) == before
    });
}

#[test]
fn activate_before_first_listens_waits() {
    let name = name();
    let lock = NamedLock::new(&name).unwrap();
    let holder = lock.try_lock().unwrap();
    let mut second = Actor::start_instance(&name);
    second.expect("enter", &format!("second of {}", std::process::id()));
    second.tell_to_wait("activate 30000");
    // Another first instance that takes over the name would act in the same way.
    let listener = UnixListener::bind_addr(&address(my_uid(), &name)).unwrap();
    let (mut connection, _) = listener.accept().unwrap();
    connection.read_exact(&mut [0; 12]).unwrap();
    drop((connection, listener));
    second.expect_silence();
    drop(holder);
    assert_eq!(second.answer(), "became first");

    let mut third = Actor::start_instance(&name);
    second.kill();
    let _holder = lock.lock().unwrap();
    third.ask("enter");
    let said = third.ask("activate 100");
    assert!(said.starts_with("error NoAnswer"), "{said}");
}

#[test]
fn enter_waits_for_address_of_previous_first() {
    let name = name();
    let lingering = UnixListener::bind_addr(&address(my_uid(), &name)).unwrap();
    let mut starter = Actor::start_instance(&name);
    starter.tell_to_wait("enter");
    drop(lingering);
    assert_eq!(starter.answer(), "first");
}

#[test]
fn child_processes_do_not_keep_instance_name_or_socket() {
    let name = name();
    let [mut first, mut second] = [(); 2].map(|()| Actor::start_instance(&name));
    first.expect("enter", "first");
    second.ask("enter");
    second.tell("activate 30000");
    assert!(first.ask("take 30000").starts_with("taken "));
    let children: Vec<u32> = ["fork", "spawn"]
        .map(|how| first.ask(how).split(' ').nth(1).unwrap().parse().unwrap())
        .to_vec();
    // The child has dropped its copies, of the first instance and of the activation.
    second.expect_silence();
    let mut third = Actor::start_instance(&name);
    third.expect("enter", &format!("second of {}", first.pid()));
    first.kill();
    assert_eq!(second.answer(), "became first");
    let alive = |pid: &u32| lockkit::Owner::of(*pid).is_some();
    assert!(
        children.iter().all(alive),
        "the children were to outlive the first"
    );
    children
        .into_iter()
        .for_each(|child| signal_pid(child, Signal::KILL));
}

#[test]
fn handler_panic_is_reported_and_next_request_handled() {
    let name = name();
    let [mut first, mut second] = [(); 2].map(|()| Actor::start_instance(&name));
    first.expect("enter", "first");
    first.expect("panic", "serving");
    for _ in 0..2 {
        second.ask("enter");
        let said = second.ask("activate 30000");
        assert!(
            said.starts_with("error NotHandled: the first instance of "),
            "{said}"
        );
    }
}

#[test]
fn activations_arrive_by_callback_iterator_and_poll() {
    let name = name();
    let first = first(&name);
    assert_eq!(first.activations(&Wait::none()).count(), 0);
    assert_eq!(
        first
            .activations(&Wait::at_most(Duration::from_millis(20)))
            .count(),
        0
    );

    let send = |threads: i32| {
        let send = |_| {
            std::thread::spawn({
                let name = name.clone();
                move || second(&name).activate(&in_time())
            })
        };
        (0..threads).map(send).collect::<Vec<_>>()
    };
    let senders = send(3);
    let quit = CancelToken::new();
    let mut seen = 0;
    for activation in first.activations(&Wait::forever().or_cancelled(&quit)) {
        activation.answer(b"iterated").unwrap();
        seen += 1;
        if seen == 3 {
            quit.cancel();
        }
    }
    assert_eq!(seen, 3);
    senders
        .into_iter()
        .for_each(|sender| assert_eq!(answer(sender.join().unwrap().unwrap()), b"iterated"));

    // This program polls occasionally.
    let senders = send(3);
    let mut seen = 0;
    until("all have come", || {
        for activation in first.activations(&Wait::none()) {
            activation.answer(b"looked").unwrap();
            seen += 1;
        }
        seen == 3
    });
    senders
        .into_iter()
        .for_each(|sender| assert_eq!(answer(sender.join().unwrap().unwrap()), b"looked"));

    let (pass_on, passed) = mpsc::channel();
    first
        .on_activation(move |activation| pass_on.send(activation).unwrap())
        .unwrap();
    let senders = send(3);
    for _ in 0..3 {
        passed
            .recv_timeout(LIVELY)
            .unwrap()
            .answer(b"called")
            .unwrap();
    }
    senders
        .into_iter()
        .for_each(|sender| assert_eq!(answer(sender.join().unwrap().unwrap()), b"called"));
    drop(first);
    assert!(
        matches!(
            passed.recv_timeout(LIVELY),
            Err(mpsc::RecvTimeoutError::Disconnected)
        ),
        "the thread has ended"
    );
}

#[test]
fn dropped_next_activation_future_loses_no_activation() {
    let name = name();
    let first = first(&name);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let forever = Wait::forever();
    let outside = std::pin::pin!(first.next_activation_async(&forever));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match Future::poll(outside, &mut context) {
        std::task::Poll::Ready(Err(error)) => assert!(
            matches!(error.kind(), ErrorKind::Unsupported { .. }),
            "{error}"
        ),
        _ => panic!("nothing would wake it"),
    }
    fn is_send<T: Send>(future: T) -> T {
        future
    }
    let none = runtime
        .block_on(is_send(first.next_activation_async(&Wait::none())))
        .unwrap();
    assert!(none.is_none());
    let mut senders: Vec<Actor> = (0..20).map(|_| Actor::start_instance(&name)).collect();
    senders
        .iter_mut()
        .for_each(|sender| sender.tell("start 30000"));
    let mut seen = 0;
    let mut dropped = 0;
    runtime.block_on(async {
        while seen < senders.len() {
            // The limit drops the future at every moment of it.
            let limit = Duration::from_micros(50 * (dropped % 40));
            match tokio::time::timeout(limit, first.next_activation_async(&in_time())).await {
                Ok(activation) => {
                    activation
                        .unwrap()
                        .expect("an activation in time")
                        .answer(b"awaited")
                        .unwrap();
                    seen += 1;
                }
                Err(_) => dropped += 1,
            }
        }
    });
    senders
        .iter_mut()
        .for_each(|sender| assert_eq!(sender.answer(), "answered awaited"));
    let quit = CancelToken::new();
    let cancelled = runtime.block_on(async {
        let wait = Wait::forever().or_cancelled(&quit);
        let (next, ()) = tokio::join!(first.next_activation_async(&wait), async { quit.cancel() });
        next
    });
    assert!(cancelled.unwrap().is_none());
}

#[test]
fn activation_stream_ends_when_cancelled() {
    use tokio_stream::StreamExt;

    let name = name();
    let first = first(&name);
    let mut senders = [(); 5].map(|()| Actor::start_instance(&name));
    senders
        .iter_mut()
        .for_each(|sender| sender.tell("start 30000"));
    let quit = CancelToken::new();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let received = runtime.block_on(async {
        let mut received = 0;
        let mut activations = first.activations_async(&in_time().or_cancelled(&quit));
        while let Some(activation) = activations.next().await {
            activation.answer(b"streamed").unwrap();
            received += 1;
            if received == senders.len() {
                quit.cancel();
            }
        }
        received
    });
    assert_eq!(received, senders.len());
    senders
        .iter_mut()
        .for_each(|sender| assert_eq!(sender.answer(), "answered streamed"));
}

#[test]
fn concurrent_tasks_share_activations() {
    let name = name();
    let first = first(&name);
    let mut senders = [(); 2].map(|()| Actor::start_instance(&name));
    let receive = || async {
        let wait = in_time();
        let activation = first
            .next_activation_async(&wait)
            .await
            .unwrap()
            .expect("an activation in time");
        activation.answer(b"shared").unwrap();
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    // Both wait by the time at which the senders start.
    let start = async {
        senders
            .iter_mut()
            .for_each(|sender| sender.tell("start 30000"))
    };
    runtime.block_on(async { tokio::join!(receive(), receive(), start) });
    senders
        .iter_mut()
        .for_each(|sender| assert_eq!(sender.answer(), "answered shared"));
}

/// Lets a task wait for an activation, runs `meanwhile` before the task is polled again, and
/// returns the activation.
fn received_by_a_task(first: &FirstInstance, meanwhile: impl FnOnce()) -> Activation {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let forever = Wait::forever();
        let mut waiting = std::pin::pin!(first.next_activation_async(&forever));
        std::future::poll_fn(|context| {
            assert!(waiting.as_mut().poll(context).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        meanwhile();
        let received = tokio::time::timeout(LIVELY, waiting)
            .await
            .expect("the task is woken");
        received.unwrap().expect("it waits for ever")
    })
}

#[test]
fn unanswered_activation_does_not_block_waiting_receiver() {
    let name = name();
    let first = first(&name);
    let (mut senders, mut kept) = (Vec::new(), None);
    let received = received_by_a_task(&first, || {
        for _ in 0..2 {
            let mut sender = call(my_uid(), &name);
            sender.write_all(&empty_request()).unwrap();
            senders.push(sender);
        }
        kept = first.next_activation(&Wait::none()).unwrap();
    });
    kept.expect("both were there").answer(b"kept").unwrap();
    received.answer(b"received").unwrap();
    let mut said: Vec<_> = senders.iter().map(closed).collect();
    said.sort();
    assert_eq!(said, [frame(1, 2, 4, b"kept"), frame(1, 2, 8, b"received")]);
}

#[test]
fn receiver_return_at_connection_limit_does_not_block_others() {
    let name = name();
    let first = first(&name);
    let mut idle = Vec::new();
    let mut sender = None;
    let received = received_by_a_task(&first, || {
        idle.extend((0..32).map(|_| call(my_uid(), &name)));
        let mut later = call(my_uid(), &name);
        later.write_all(&empty_request()).unwrap();
        sender = Some(later);
        assert!(first.next_activation(&Wait::none()).unwrap().is_none());
    });
    received.answer(b"received").unwrap();
    assert_eq!(closed(&sender.unwrap()), frame(1, 2, 8, b"received"));
}

#[test]
fn activate_can_be_cancelled_and_first_instance_released() {
    let name = name();
    let first = first(&name);
    let quit = CancelToken::new();
    let sender = std::thread::spawn({
        let (second, wait) = (second(&name), Wait::forever().or_cancelled(&quit));
        move || second.activate(&wait)
    });
    let taken = next(&first);
    quit.cancel();
    assert!(sender.join().unwrap().unwrap_err().is_cancelled());
    let error = taken.answer(b"late").unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::Io {
                action: "answer",
                ..
            }
        ),
        "{error}"
    );
    assert!(
        second(&name)
            .activate(&Wait::forever().or_cancelled(&quit))
            .unwrap_err()
            .is_cancelled()
    );
    first.release().unwrap();
    drop(crate::first(&name));
}

#[test]
fn repeated_activations_leak_no_thread_or_descriptor() {
    let name = name();
    let [mut first, mut second] = [(); 2].map(|()| Actor::start_instance(&name));
    let round = |first: &mut Actor, second: &mut Actor| {
        first.expect("start 0", "first");
        second.expect("start 30000", &answered(second));
        first.expect("release", "released");
        let pids = [first.pid(), second.pid()];
        until("its thread has ended", || {
            Belongings::of(pids[0]).threads() == 1
        });
        pids.map(Belongings::of)
    };
    let before = round(&mut first, &mut second);
    for _ in 0..20 {
        assert_eq!(round(&mut first, &mut second), before);
    }
}

#[test]
fn environment_variables_do_not_change_instance() {
    let name = name();
    let directory = tempfile::tempdir().unwrap();
    let mut first = Actor::start_instance(&name);
    first.expect("start 0", "first");
    let mut second = Actor::start_instance_with(&name, |command| {
        for variable in [
            "TMPDIR",
            "TMP",
            "HOME",
            "XDG_RUNTIME_DIR",
            "XDG_STATE_HOME",
            "XDG_CACHE_HOME",
        ] {
            command.env(variable, directory.path());
        }
    });
    second.expect("start 30000", &answered(&second));
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

#[test]
fn first_instance_rejects_other_user() {
    let Some(stranger) = another_user() else {
        return;
    };
    let name = name();
    let first = first(&name);
    let mut intruder =
        Actor::start_rogue(["intrude", &format!("{}/{name}", my_uid())], stranger.uid);
    assert_eq!(intruder.answer(), "connected");
    let mut sender = Actor::start_instance(&name);
    sender.tell("start 30000");
    assert_eq!(next(&first).pid(), Some(sender.pid()));
    assert_eq!(intruder.answer(), "was given 0 bytes");
    assert!(first.next_activation(&Wait::none()).unwrap().is_none());
}

#[test]
fn c1_overflow_uid_is_not_trusted_with_activations() {
    let Some(stranger) = another_user() else {
        return;
    };
    let Some(inside) = UserNamespace::new(4_000_000) else {
        return;
    };
    let (last, name) = (UserNamespace::LAST, name());
    // Inside, a stranger outside looks like the same user.
    let mut pretender = Actor::start_rogue(["pretend", &format!("{last}/{name}")], stranger.uid);
    assert_eq!(pretender.answer(), "listening");
    let mut instance = inside.start(last, &["instance", &name]);
    let answer = instance.ask("start 30000");
    assert!(answer.contains("ForeignOwner"), "{answer}");
    assert_eq!(pretender.answer(), "was told 0 bytes");
    pretender.kill();
    // The processes of the user inside are first and second.
    let mut first = inside.start(last, &["instance", &name]);
    assert_eq!(first.ask("start 30000"), "first");
    let mut intruder = Actor::start_rogue(["intrude", &format!("{last}/{name}")], stranger.uid);
    assert_eq!(intruder.answer(), "connected");
    let mut second = inside.start(last, &["instance", &name]);
    second.tell("start 30000");
    assert_eq!(intruder.answer(), "was given 0 bytes");
    let answer = second.answer();
    assert!(answer.starts_with("answered"), "{answer}");
}

#[test]
fn activate_sends_nothing_to_instance_of_other_user() {
    let Some(stranger) = another_user() else {
        return;
    };
    let name = name();
    let mut pretender =
        Actor::start_rogue(["pretend", &format!("{}/{name}", my_uid())], stranger.uid);
    assert_eq!(pretender.answer(), "listening");
    let foreign = |error: lockkit::Error| match error.kind() {
        ErrorKind::ForeignOwner { uid, pid, .. } => {
            assert_eq!((*uid, *pid), (stranger.uid, Some(pretender.pid())))
        }
        _ => panic!("{error}"),
    };
    foreign(Instance::enter(&name).unwrap_err());
    let lock = NamedLock::new(&name).unwrap();
    let holder = lock
        .try_lock()
        .expect("who cannot receive does not keep the name");
    foreign(second(&name).activate(&in_time()).unwrap_err());
    drop(holder);
    for _ in 0..2 {
        assert_eq!(pretender.answer(), "was told 0 bytes");
    }
}

#[test]
fn first_instances_of_users_are_separate() {
    let Some(user) = another_user() else { return };
    let name = name();
    let _first = first(&name);
    let mut theirs = Actor::start_instance_as(&name, user.uid);
    theirs.expect("enter", "first");
}

/// Reads the remaining data of a connection that the first instance has closed.
fn closed(mut connection: &UnixStream) -> Vec<u8> {
    connection.set_read_timeout(Some(LIVELY)).unwrap();
    let mut said = Vec::new();
    match connection.read_to_end(&mut said) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => {
            panic!("it is not closed: {error}")
        }
        _ => said,
    }
}

#[test]
fn malformed_requests_are_rejected_at_once() {
    let name = name();
    let [mut first, mut second] = [(); 2].map(|()| Actor::start_instance(&name));
    first.expect("start 0", "first");
    let before = Belongings::of(first.pid());
    let not_understood = frame(1, 4, 0, &[]);
    for bad in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 100_000],
        frame(1, 1, u32::MAX, &[]),
        frame(1, 1, (8 << 20) + 1, &[]),
        frame(2, 1, 16, &[0; 16]),
        frame(1, 2, 0, &[]),
        frame(1, 9, 0, &[]),
        frame(1, 1, 17, &[0; 17]),
        frame(1, 1, 15, &[0; 15]),
        frame(1, 1, 16, &[0xff; 16]),
    ] {
        let mut rogue = call(my_uid(), &name);
        let _ = rogue.write_all(&bad);
        assert_eq!(
            closed(&rogue),
            not_understood,
            "{:?}",
            &bad[..bad.len().min(20)]
        );
        second.expect("start 30000", &answered(&second));
    }
    until("the first has closed all", || {
        Belongings::of(first.pid()) == before
    });
}

#[test]
fn silent_or_partial_peers_do_not_delay_second_instance() {
    let name = name();
    let [mut first, mut second] = [(); 2].map(|()| Actor::start_instance(&name));
    first.expect("start 0", "first");
    let before = Belongings::of(first.pid()).descriptors();
    let mut idle: Vec<UnixStream> = Vec::new();
    for number in 0..300 {
        let mut rogue = call(my_uid(), &name);
        let half = &empty_request()[..number % 28];
        // The first instance may have closed it already, in favour of a later connection.
        let _ = rogue.write_all(half);
        idle.push(rogue);
    }
    second.expect("start 30000", &answered(&second));
    let now = Belongings::of(first.pid()).descriptors();
    assert!(now <= before + 32, "{now} descriptors, {before} before");
    // A first instance also closes idle connections when no other process waits for it, although
    // their peers keep them open.
    until("the first has closed all", || {
        Belongings::of(first.pid()).descriptors() == before
    });
    assert!(idle.iter().all(|rogue| closed(rogue).is_empty()));
}

#[test]
fn descriptors_sent_with_request_are_not_received() {
    let name = name();
    let [mut first, mut second] = [(); 2].map(|()| Actor::start_instance(&name));
    first.expect("enter", "first");
    second.ask("enter");
    second.tell("activate 30000");
    assert!(first.ask("take 30000").starts_with("taken "));
    first.expect("drop", "done");
    let before = Belongings::of(first.pid());
    let (mut end, sent) = std::io::pipe().unwrap();
    let mut rogue = call(my_uid(), &name);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [sent.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    rustix::net::sendmsg(
        &rogue,
        &[IoSlice::new(&empty_request())],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    drop(sent);
    let taken = first.ask("take 30000");
    assert!(
        taken.starts_with(&format!("taken {} {} ", my_uid(), std::process::id())),
        "{taken}"
    );
    assert_eq!(
        end.read(&mut [0]).unwrap(),
        0,
        "nobody has the other end any more"
    );
    first.expect("answer fine", "done");
    let mut said = Vec::new();
    rogue.read_to_end(&mut said).unwrap();
    assert_eq!(said, frame(1, 2, 4, b"fine"));
    assert_eq!(Belongings::of(first.pid()), before);
}

#[test]
fn activate_malformed_answer_fails() {
    for (nonsense, problem) in [
        (b"HTTP/1.1 200 OK\r\n".to_vec(), "is invalid"),
        (frame(1, 2, u32::MAX, &[]), "is invalid"),
        (frame(1, 1, 0, &[]), "is invalid"),
        (frame(2, 2, 0, &[]), "another version"),
        (frame(2, 4, 0, &[]), "another version"),
        (frame(1, 3, 0, &[]), "failed"),
    ] {
        let name = name();
        let _holder = NamedLock::new(&name).unwrap().try_lock().unwrap();
        let listener = UnixListener::bind_addr(&address(my_uid(), &name)).unwrap();
        let second = second(&name);
        let sender = std::thread::spawn(move || second.activate(&in_time()));
        let (mut connection, _) = listener.accept().unwrap();
        connection.write_all(&nonsense).unwrap();
        let error = sender.join().unwrap().unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::NotHandled { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(problem), "{error}");
    }
}

#[test]
fn activate_with_truncated_answer_fails_without_retry() {
    for is_held in [true, false] {
        let name = name();
        let holder = NamedLock::new(&name).unwrap().try_lock().unwrap();
        let listener = UnixListener::bind_addr(&address(my_uid(), &name)).unwrap();
        let second = second(&name);
        let sender = std::thread::spawn(move || second.activate(&in_time()));
        let (mut connection, _) = listener.accept().unwrap();
        // The test reads the complete request, because a close with unread data ends the connection
        // differently.
        let mut header = [0; 12];
        connection.read_exact(&mut header).unwrap();
        let length = u32::from_le_bytes(header[8..].try_into().unwrap());
        connection
            .read_exact(&mut vec![0; length as usize])
            .unwrap();
        connection.write_all(&frame(1, 2, 1000, &[0; 500])).unwrap();
        let _holder = is_held.then_some(holder);
        if is_held {
            drop(connection);
            let error = sender.join().unwrap().unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::NotHandled { .. }),
                "{error}"
            );
            assert!(error.to_string().contains("is incomplete"), "{error}");
            listener.set_nonblocking(true).unwrap();
            assert_eq!(
                listener.accept().unwrap_err().kind(),
                std::io::ErrorKind::WouldBlock,
                "it called again"
            );
        } else {
            drop((connection, listener));
            assert!(matches!(
                sender.join().unwrap().unwrap(),
                Outcome::BecameFirst(_)
            ));
        }
    }
}

#[test]
fn answer_not_read_by_sender_fails_in_bounded_time() {
    let name = name();
    let first = first(&name);
    let mut rogue = call(my_uid(), &name);
    rogue.write_all(&empty_request()).unwrap();
    let activation = next(&first);
    let start = Instant::now();
    let error = activation.answer(&vec![0; MOST_BYTES]).unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::Io {
                action: "answer",
                ..
            }
        ),
        "{error}"
    );
    assert!(start.elapsed() < LIVELY);
}

#[test]
fn sender_in_other_pid_namespace_has_no_pid() {
    if !Command::new("unshare")
        .args(["--pid", "--fork", "true"])
        .status()
        .is_ok_and(|status| status.success())
    {
        lockkit_tests::left_out("this machine makes no pid namespaces for the test");
        return;
    }
    let name = name();
    let mut first = Actor::start_instance_with(&name, |command| {
        let actor = command.get_program().to_owned();
        *command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--kill-child"])
            .arg(actor)
            .args(["instance", &name]);
        command
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped());
    });
    first.expect("enter", "first");
    let mut second = Actor::start_instance(&name);
    second.tell("start 30000");
    first.expect("take 30000", &format!("taken {} 0 [] 0", my_uid()));
    first.expect("answer hello", "done");
    assert_eq!(second.answer(), "answered hello");
}
