//! The events and spans of locks for a subscriber of tracing.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Mutex, Once};
use std::time::Duration;

use lockkit::{Lease, LeaseStatus, Wait};
use lockkit_tests::async_conformance::runtime;
use lockkit_tests::fixtures::KINDS;
use lockkit_tests::{Actor, Kind, until};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber, span};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// The records of all tests of this program. Each test looks for its own lock.
static RECORDS: Mutex<Vec<Record>> = Mutex::new(Vec::new());

#[derive(Clone, Debug, Default)]
struct Record {
    level: String,
    /// Empty for a span.
    message: String,
    fields: HashMap<String, String>,
    /// The span itself, or the span that contains the event.
    span: Option<&'static str>,
}

impl Visit for Record {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let value = format!("{value:?}");
        match field.name() {
            "message" => self.message = value,
            name => _ = self.fields.insert(name.to_owned(), value),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields
            .insert(field.name().to_owned(), value.to_owned());
    }
}

struct Recorder;

impl<S: Subscriber + for<'s> LookupSpan<'s>> Layer<S> for Recorder {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut record = Record {
            level: event.metadata().level().to_string(),
            ..Record::default()
        };
        record.span = context.event_span(event).map(|span| span.name());
        event.record(&mut record);
        RECORDS.lock().unwrap().push(record);
    }

    fn on_new_span(&self, attributes: &span::Attributes<'_>, _: &span::Id, _: Context<'_, S>) {
        let mut record = Record {
            level: attributes.metadata().level().to_string(),
            ..Record::default()
        };
        record.span = Some(attributes.metadata().name());
        attributes.record(&mut record);
        RECORDS.lock().unwrap().push(record);
    }
}

fn start_recording() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Recorder))
            .unwrap();
    });
}

/// Returns the records of the lock so far.
fn records_of(at: &str) -> Vec<Record> {
    let records = RECORDS.lock().unwrap();
    records
        .iter()
        .filter(|record| {
            record
                .fields
                .get("name")
                .is_some_and(|name| name.contains(at))
        })
        .cloned()
        .collect()
}

/// Returns the levels and messages, in order. A span appears by its name.
fn outline(records: &[Record]) -> Vec<String> {
    let line = |record: &Record| match &*record.message {
        "" => format!("{} span {}", record.level, record.span.unwrap_or_default()),
        message => format!("{} {message}", record.level),
    };
    records.iter().map(line).collect()
}

fn find<'t>(records: &'t [Record], message: &str) -> &'t Record {
    records
        .iter()
        .find(|record| record.message == message)
        .unwrap_or_else(|| panic!("no record {message:?} in {records:#?}"))
}

fn waited(record: &Record) -> f64 {
    record.fields["waited"].parse().unwrap()
}

/// Returns the value of the field `kind` for this kind.
fn label(kind: Kind) -> &'static str {
    match kind.name() {
        "named-socket" | "machine-socket" | "named-mutex" | "machine-mutex" | "named-file"
        | "machine-file" => "named",
        "file" | "file-shared" => "file",
        other => other,
    }
}

/// Returns the kinds that processes share. A lease reports the same in every store.
fn kinds() -> impl Iterator<Item = Kind> {
    let is_shared = |kind: &Kind| !["memory", "etcd", "postgres", "redis"].contains(&kind.name());
    KINDS
        .iter()
        .copied()
        .filter(is_shared)
        .filter(|kind| kind.left_out().is_none())
}

#[test]
fn acquire_and_release_traced_once_with_kind_and_name() {
    start_recording();
    for kind in kinds() {
        for in_task in [false, true] {
            let spec = kind.fresh();
            let lock = spec.open();
            let wait = Wait::at_most(lockkit_tests::LIVELY);
            let guard = match in_task {
                true => runtime("one").block_on(lock.acquire_async(&wait)).unwrap(),
                false => lock.acquire(&wait).unwrap(),
            };
            drop(guard);
            let records = records_of(spec.at());
            assert_eq!(
                outline(&records),
                [
                    format!("{} span acquire", Level::DEBUG),
                    "DEBUG acquired".into(),
                    "TRACE released".into()
                ],
                "{kind:?}"
            );
            assert!(
                records
                    .iter()
                    .all(|record| record.fields["kind"] == label(kind)),
                "{records:#?}"
            );
            assert_eq!(records[1].span, Some("acquire"));
            assert!(waited(&records[1]) >= 0.0);
            spec.clean();
        }
    }
}

#[test]
fn contended_acquire_traces_holder_and_timeout_error() {
    start_recording();
    for kind in kinds() {
        for in_task in [false, true] {
            let spec = kind.fresh();
            let mut holder = Actor::start(&spec);
            holder.expect("lock", "held");
            let lock = spec.open();
            let take = |wait: &Wait| match in_task {
                true => runtime("one").block_on(lock.acquire_async(wait)),
                false => lock.acquire(wait),
            };
            let limit = Duration::from_millis(20);
            assert!(take(&Wait::at_most(limit)).err().unwrap().is_timeout());
            let records = records_of(spec.at());
            assert_eq!(
                outline(&records),
                ["DEBUG span acquire", "DEBUG waiting", "DEBUG not acquired"],
                "{kind:?}"
            );
            let waiting = find(&records, "waiting");
            // The same holds when a thread waits on behalf of a task.
            assert_eq!(waiting.span, Some("acquire"), "{kind:?}");
            let knows_its_holder = lock.owner().is_some();
            assert_eq!(
                waiting.fields.contains_key("holder"),
                knows_its_holder,
                "{kind:?}: {waiting:#?}"
            );
            if knows_its_holder {
                assert!(
                    waiting.fields["holder"].contains(&format!("pid {}", holder.pid())),
                    "{waiting:#?}"
                );
            }
            let timed_out = find(&records, "not acquired");
            assert!(waited(timed_out) >= limit.as_secs_f64(), "{timed_out:#?}");
            assert!(
                timed_out.fields["error"].contains("still held"),
                "{timed_out:#?}"
            );

            let guard = std::thread::scope(|scope| {
                let waiter = scope.spawn(|| take(&Wait::forever()));
                until("the waiter waits", || {
                    records_of(spec.at())
                        .iter()
                        .filter(|record| record.message == "waiting")
                        .count()
                        == 2
                });
                holder.expect("release", "released");
                waiter.join().unwrap().unwrap()
            });
            assert!(waited(find(&records_of(spec.at()), "acquired")) > 0.0);
            drop(guard);
            spec.clean();
        }
    }
}

#[test]
fn acquire_after_death_traces_warning_with_owner() {
    start_recording();
    for kind in kinds().filter(|kind| kind.reports_deaths()) {
        let spec = kind.fresh();
        let mut holder = Actor::start(&spec);
        holder.expect("lock", "held");
        holder.kill();
        drop(
            spec.open()
                .acquire(&Wait::at_most(lockkit_tests::LIVELY))
                .unwrap(),
        );
        let records = records_of(spec.at());
        let recovered = find(&records, "recovered");
        assert_eq!(
            (&*recovered.level, &*recovered.fields["kind"]),
            ("WARN", label(kind))
        );
        assert!(
            recovered.fields["recovered"].contains(&format!("pid {}", holder.pid())),
            "{recovered:#?}"
        );
        spec.clean();
    }
}

#[test]
fn lost_lease_is_traced_once_with_token_and_reason() {
    start_recording();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leader");
    let lease = Lease::file(&path).build().unwrap();
    let guard = lease.lock().unwrap();
    let LeaseStatus::Held(seen) = lease.status().unwrap() else {
        panic!("the lease is held")
    };
    assert!(lease.evict(&seen).unwrap());
    let reason = guard
        .lost()
        .wait(&Wait::at_most(lockkit_tests::LIVELY))
        .unwrap();
    let at = path.display().to_string();
    until("the loss is reported", || {
        records_of(&at)
            .iter()
            .any(|record| record.message == "lost")
    });
    let token = guard.token();
    assert!(guard.release().is_err());
    let records = records_of(&at);
    assert_eq!(
        outline(&records),
        ["DEBUG span acquire", "DEBUG acquired", "ERROR lost"]
    );
    assert_eq!(records[2].fields["token"], token.to_string());
    assert_eq!(records[2].fields["reason"], reason.to_string());
    assert_eq!(records[2].fields["kind"], "lease");
}

#[test]
fn acquire_of_memory_table_lock_is_traced() {
    start_recording();
    let lock = Kind::MEMORY.fresh().open();
    drop(lock.acquire(&Wait::none()).unwrap());
    let records = RECORDS.lock().unwrap().clone();
    let records: Vec<_> = records
        .into_iter()
        .filter(|record| {
            record
                .fields
                .get("kind")
                .is_some_and(|kind| kind == "memory")
        })
        .collect();
    assert_eq!(
        outline(&records),
        ["DEBUG span acquire", "DEBUG acquired", "TRACE released"]
    );
    assert!(records.iter().all(|record| record.fields["name"] == "0"));
}
