//! The format of a lease file.
//!
//! ```text
//! lockkit lease 1
//! sum     8c1b6b3a2f9d0e47
//! state   held
//! token   00001795194191048576
//! claim   5e1bd5a2c4c94f0cbd2cf1c9f6dd4c8c
//! beat    00000000000000000017
//! ttl     00000000003000000000 ns
//! every   00000000000250000000 ns
//! saw     00000000000000000000000000000000 00000000000000000000 0000000000000000
//! ...
//! pid 4242
//! start 181264
//! ...
//! ```
//! Every field down to the notes has a fixed position, and newlines fill the record to a fixed
//! length. A renewal changes a few digits in place and needs no new space, except where a file
//! system writes each change elsewhere (btrfs, zfs). The four `saw` lines are the notes of
//! observers. The rest is the owner ([`owner_text`]), or the last owner if the state is `free`, or
//! `lost` (free, but not by a release). Content beyond that length does not count.
//!
//! The sum is FNV-1a over the record as 64-bit words, little-endian, without the sum itself and
//! without the notes. It guards against partial writes and accidents, not against forgery.
//!
//! A note contains the id of a clock, and the time in nanoseconds at which an observer first saw a
//! heartbeat number, the field `beat`. Observers write notes without a lock, so a note can meet a
//! later heartbeat number or another note. Each note therefore has a checksum of its own. It covers
//! the clock and the time, and starts from the [`fingerprint`](Record::fingerprint) of the record.
//! A note that is torn, or is about another heartbeat number, does not count.

use std::ops::Range;
use std::time::Duration;

use crate::base::owner::Owner;
use crate::base::owner_text;
use crate::lease::store::lease_store::ClaimId;
use crate::sys::fnv;

/// The length of a record in bytes.
pub(in crate::lease) const SIZE: usize = 1024;

const FAMILY: &[u8] = b"lockkit lease ";
const MAGIC: &[u8; 16] = b"lockkit lease 1\n";
const SUM: Range<usize> = 24..40;
const STATE: Range<usize> = 49..53;
const TOKEN: Range<usize> = 62..82;
const CLAIM: Range<usize> = 91..123;
const BEAT: Range<usize> = 132..152;
const TTL: Range<usize> = 161..181;
const EVERY: Range<usize> = 193..213;
const NOTES: Range<usize> = 217..217 + 4 * NOTE.len();
const OWNER: Range<usize> = NOTES.end..SIZE;

const HELD: &[u8; 4] = b"held";
const FREE: &[u8; 4] = b"free";
/// Free, but the last owner did not release: it had lost the lease before.
const LOST: &[u8; 4] = b"lost";

/// A note that no observer has written.
const NOTE: &[u8; 79] =
    b"saw     00000000000000000000000000000000 00000000000000000000 0000000000000000\n";
/// The first bytes of every note.
const SAW: Range<usize> = 0..8;
/// The position of the clock in a note.
const CLOCK: Range<usize> = 8..40;
/// The position of the time in a note.
const TIME: Range<usize> = 41..61;
/// The position of the checksum in a note.
const NOTE_SUM: Range<usize> = 62..78;

/// The beginning of a record, up to the notes.
const HEAD: &[u8; NOTES.start] = b"lockkit lease 1
sum     0000000000000000
state   free
token   00000000000000000000
claim   00000000000000000000000000000000
beat    00000000000000000000
ttl     00000000000000000000 ns
every   00000000000000000000 ns
";

/// A complete record.
#[derive(Clone, PartialEq, Eq)]
pub(in crate::lease) struct Record([u8; SIZE]);

/// The content of a file, classified.
#[derive(Debug)]
pub(in crate::lease) enum Content {
    Ours(Box<Record>),
    /// A record of a later version, which lockkit must not change.
    Newer,
    /// A blank file (empty, or zeros), or a truncated or damaged lease. It may be reclaimed when
    /// its holder has had the time to repair it.
    Damaged,
    /// Any other file. It belongs to another program, and lockkit never writes to it.
    Foreign,
}

/// Classifies the content of a file by its first [`SIZE`] + 1 bytes, or all bytes of a shorter
/// file. lockkit never writes more than [`SIZE`] bytes, so a longer file is a lease only if its
/// record is intact.
pub(in crate::lease) fn parse(bytes: &[u8]) -> Content {
    if let Some(bytes) = bytes.first_chunk::<SIZE>() {
        if bytes.starts_with(MAGIC) {
            let record = Box::new(Record(*bytes));
            if record.0[SUM] == record.sum() && record.is_well_formed() {
                return Content::Ours(record);
            }
        }
    }
    match bytes {
        bytes if is_newer(bytes) => Content::Newer,
        bytes if bytes.len() <= SIZE && is_damaged(bytes) => Content::Damaged,
        _ => Content::Foreign,
    }
}

fn is_newer(bytes: &[u8]) -> bool {
    let Some(version) = bytes.strip_prefix(FAMILY) else {
        return false;
    };
    let digits = version
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    let newer = version[..digits] != *b"1" && version.first().is_some_and(|byte| *byte != b'0');
    newer && (1..=9).contains(&digits) && version.get(digits) == Some(&b'\n')
}

/// Returns whether the content begins with [`MAGIC`], or is the beginning of [`MAGIC`] followed by
/// zeros. Notes do not count: an observer can write its note just after another program truncated
/// the file.
fn is_damaged(bytes: &[u8]) -> bool {
    if bytes.starts_with(MAGIC) {
        return true;
    }
    let notes = bytes
        .get(NOTES.start..bytes.len().min(NOTES.end))
        .unwrap_or_default();
    let are_notes = notes
        .chunks(NOTE.len())
        .all(|note| note.starts_with(&NOTE[SAW]) || note.iter().all(|byte| *byte == 0));
    let is_text = |(at, byte): (usize, &u8)| *byte != 0 && !NOTES.contains(&at);
    let end = bytes
        .iter()
        .enumerate()
        .rposition(is_text)
        .map_or(0, |last| last + 1);
    are_notes && MAGIC.starts_with(&bytes[..end])
}

/// Returns a hash that distinguishes one content of a file from another.
pub(in crate::lease) fn fingerprint(bytes: &[u8]) -> u64 {
    add_words(fnv::BASIS, bytes)
}

/// Computes FNV-1a over the words of `bytes`, starting from `sum`. The last word may be incomplete.
fn add_words(sum: u64, bytes: &[u8]) -> u64 {
    let add = |sum, word| fnv::add(sum, u64::from_le_bytes(word));
    let words = bytes.chunks_exact(8);
    let rest = words.remainder();
    let sum = words.filter_map(|word| word.try_into().ok()).fold(sum, add);
    if rest.is_empty() {
        return sum;
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    add(sum, last)
}

impl Record {
    /// Creates the record of a held lease: the first heartbeat of `claim`.
    pub(in crate::lease) fn held(
        claim: &ClaimId,
        token: u64,
        ttl: Duration,
        heartbeat: Duration,
        owner: &Owner,
    ) -> Self {
        let mut record = Self([b'\n'; SIZE]);
        record.0[..HEAD.len()].copy_from_slice(HEAD);
        record.0[STATE].copy_from_slice(HELD);
        record.set_number(TOKEN, token);
        record.set_hex(CLAIM, claim.number());
        record.set_number(TTL, nanos(ttl));
        record.set_number(EVERY, nanos(heartbeat));
        record.clear_notes();
        record.set_owner(Some(owner));
        record
    }

    /// Sets the owner, or the last owner.
    pub(in crate::lease) fn set_owner(&mut self, owner: Option<&Owner>) {
        self.0[OWNER].fill(b'\n');
        let Some(owner) = owner else { return };
        let mut text = format!("pid {}\n", owner.pid);
        owner_text::write(owner, &mut text);
        // Only text for people is cut off, because the program and the time come last.
        let end = text.len().min(OWNER.len());
        let end = text.as_bytes()[..end]
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |last| last + 1);
        self.0[OWNER.start..][..end].copy_from_slice(&text.as_bytes()[..end]);
    }

    /// Frees the record. The token stays.
    pub(in crate::lease) fn set_free(&mut self) {
        self.0[STATE].copy_from_slice(FREE);
        self.set_hex(CLAIM, 0);
        self.clear_notes();
    }

    /// Frees the record as [`set_free`](Self::set_free) does, for an owner that had lost the lease.
    pub(in crate::lease) fn set_lost(&mut self) {
        self.set_free();
        self.0[STATE].copy_from_slice(LOST);
    }

    pub(in crate::lease) fn is_lost(&self) -> bool {
        self.0[STATE] == *LOST
    }

    pub(in crate::lease) fn is_held(&self) -> bool {
        self.0[STATE] == *HELD
    }

    pub(in crate::lease) fn token(&self) -> u64 {
        self.number(TOKEN).unwrap_or_default()
    }

    pub(in crate::lease) fn claim(&self) -> ClaimId {
        ClaimId::from_number(self.hex(CLAIM).unwrap_or_default())
    }

    pub(in crate::lease) fn heartbeat_number(&self) -> u64 {
        self.number(BEAT).unwrap_or_default()
    }

    /// Sets the next heartbeat number, which no observer has seen yet.
    pub(in crate::lease) fn set_heartbeat_number(&mut self, number: u64) {
        self.set_number(BEAT, number);
        self.clear_notes();
    }

    pub(in crate::lease) fn ttl(&self) -> Duration {
        Duration::from_nanos(self.number(TTL).unwrap_or_default())
    }

    pub(in crate::lease) fn heartbeat(&self) -> Duration {
        Duration::from_nanos(self.number(EVERY).unwrap_or_default())
    }

    /// Returns the holder, or the last holder.
    pub(in crate::lease) fn owner(&self) -> Option<Owner> {
        let text = String::from_utf8_lossy(&self.0[OWNER]);
        let (pid, rest) = text.strip_prefix("pid ")?.split_once('\n')?;
        Some(owner_text::read(pid.parse().ok()?, rest.lines()))
    }

    /// Returns when an observer first saw this heartbeat number by this clock, if a note says so.
    pub(in crate::lease) fn first_seen(&self, clock: u128) -> Option<Duration> {
        let is_of_clock = |note: &Range<usize>| {
            self.hex(within(note, CLOCK)) == Some(clock) && self.is_of_this_heartbeat(note)
        };
        let note = self.notes().find(is_of_clock)?;
        self.number(within(&note, TIME)).map(Duration::from_nanos)
    }

    /// Returns a note that an observer first saw this heartbeat number at `now` on this clock, and
    /// its offset in the file. It replaces a note of the same clock, or a note that does not count.
    /// If all notes are of other clocks it replaces one of them, and that observer starts again.
    pub(in crate::lease) fn note(&self, clock: u128, now: Duration) -> (u64, [u8; NOTE.len()]) {
        let is_usable = |note: &Range<usize>| {
            self.hex(within(note, CLOCK)) == Some(clock) || !self.is_of_this_heartbeat(note)
        };
        let at = self
            .notes()
            .find(is_usable)
            .map_or(NOTES.start + (clock % 4) as usize * NOTE.len(), |note| {
                note.start
            });
        let mut note = *NOTE;
        note[CLOCK].copy_from_slice(&hex_digits::<32>(clock));
        write_number(&mut note[TIME], nanos(now));
        let sum = self.note_sum(&note);
        note[NOTE_SUM].copy_from_slice(&sum);
        (at as u64, note)
    }

    fn is_of_this_heartbeat(&self, note: &Range<usize>) -> bool {
        let note = &self.0[note.clone()];
        note.starts_with(&NOTE[SAW]) && note[NOTE_SUM] == self.note_sum(note)
    }

    fn note_sum(&self, note: &[u8]) -> [u8; NOTE_SUM.end - NOTE_SUM.start] {
        hex_digits(add_words(self.fingerprint(), &note[CLOCK.start..TIME.end]).into())
    }

    /// Returns a hash that changes with the statement of the record, but not with the notes of
    /// observers.
    pub(in crate::lease) fn fingerprint(&self) -> u64 {
        fingerprint(&self.0[STATE.start..BEAT.end])
    }

    /// Completes the record with its sum, and returns the bytes to write.
    pub(in crate::lease) fn seal(&mut self) -> &[u8; SIZE] {
        let sum = self.sum();
        self.0[SUM].copy_from_slice(&sum);
        &self.0
    }

    fn sum(&self) -> [u8; SUM.end - SUM.start] {
        let sum = add_words(
            add_words(
                add_words(fnv::BASIS, &self.0[..SUM.start]),
                &self.0[SUM.end..NOTES.start],
            ),
            &self.0[NOTES.end..],
        );
        hex_digits(sum.into())
    }

    fn is_well_formed(&self) -> bool {
        [HELD, FREE, LOST]
            .iter()
            .any(|state| self.0[STATE] == **state)
            && [TOKEN, BEAT, TTL, EVERY]
                .into_iter()
                .all(|field| self.number(field).is_some())
            && self.hex(CLAIM).is_some()
    }

    fn notes(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        NOTES
            .step_by(NOTE.len())
            .map(|start| start..start + NOTE.len())
    }

    fn clear_notes(&mut self) {
        for note in self.notes() {
            self.0[note].copy_from_slice(NOTE);
        }
    }

    fn number(&self, field: Range<usize>) -> Option<u64> {
        self.0[field].iter().try_fold(0_u64, |number, byte| {
            let digit = byte.is_ascii_digit().then(|| byte - b'0')?;
            number.checked_mul(10)?.checked_add(digit.into())
        })
    }

    fn set_number(&mut self, field: Range<usize>, number: u64) {
        write_number(&mut self.0[field], number);
    }

    fn hex(&self, field: Range<usize>) -> Option<u128> {
        self.0[field].iter().try_fold(0_u128, |number, byte| {
            let digit = char::from(*byte).to_digit(16)?;
            Some(number << 4 | u128::from(digit))
        })
    }

    fn set_hex(&mut self, field: Range<usize>, number: u128) {
        self.0[field].copy_from_slice(&hex_digits::<32>(number));
    }
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(String::from_utf8_lossy(&self.0).trim_end())
    }
}

fn within(note: &Range<usize>, part: Range<usize>) -> Range<usize> {
    note.start + part.start..note.start + part.end
}

fn write_number(field: &mut [u8], mut number: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

fn hex_digits<const N: usize>(number: u128) -> [u8; N] {
    std::array::from_fn(|at| b"0123456789abcdef"[(number >> (4 * (N - 1 - at)) & 0xf) as usize])
}

/// Converts to nanoseconds, which have room for 584 years.
fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn me() -> Owner {
        Owner {
            acquired: Some(SystemTime::now()),
            ..Owner::current()
        }
    }

    fn record() -> Record {
        let mut record = Record::held(&ClaimId::from_number(0xabc), 7, S * 3, S / 4, &me());
        record.set_heartbeat_number(42);
        record
    }

    fn reread(record: &mut Record) -> Record {
        match parse(record.seal()) {
            Content::Ours(record) => *record,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn record_text_matches_documented_format() {
        let mut record = record();
        let text = String::from_utf8(record.seal().to_vec()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "lockkit lease 1");
        assert_eq!(lines[2], "state   held");
        assert_eq!(lines[3], "token   00000000000000000007");
        assert_eq!(lines[4], "claim   00000000000000000000000000000abc");
        assert_eq!(lines[5], "beat    00000000000000000042");
        assert_eq!(lines[6], "ttl     00000000003000000000 ns");
        assert_eq!(lines[7], "every   00000000000250000000 ns");
        assert_eq!(lines[12], format!("pid {}", std::process::id()));
    }

    #[test]
    fn free_record_keeps_token_and_owner() {
        let mut freed = record();
        freed.set_free();
        let freed = reread(&mut freed);
        assert!(!freed.is_held() && !freed.is_lost());
        let mut lost = record();
        lost.set_lost();
        let lost = reread(&mut lost);
        assert!(!lost.is_held() && lost.is_lost() && lost.owner().is_some());
        assert_eq!(
            (
                freed.token(),
                freed.claim().number(),
                freed.owner().unwrap().pid()
            ),
            (7, 0, std::process::id())
        );
    }

    /// Returns the record with this note in it.
    fn noted(record: &Record, clock: u128, time: Duration) -> Record {
        let (at, note) = record.note(clock, time);
        let mut noted = record.clone();
        noted.0[at as usize..][..note.len()].copy_from_slice(&note);
        noted
    }

    #[test]
    fn notes_count_for_one_heartbeat_only() {
        let mut record = record();
        record.seal();
        let mut noted_by_all = record.clone();
        for clock in 1..=4 {
            noted_by_all = noted(&noted_by_all, clock, S * clock as u32);
        }
        let Content::Ours(noted_by_all) = parse(&noted_by_all.0) else {
            panic!("notes are no part of the sum")
        };
        assert_eq!(noted_by_all.fingerprint(), record.fingerprint());
        assert!((1..=4).all(|clock| noted_by_all.first_seen(clock) == Some(S * clock as u32)));
        let fifth = noted(&noted_by_all, 5, S * 5);
        assert_eq!(
            fifth.first_seen(5),
            Some(S * 5),
            "the fifth note replaces another"
        );
        assert_eq!(
            (1..=4)
                .filter(|clock| fifth.first_seen(*clock).is_some())
                .count(),
            3
        );
        assert_eq!(noted(&noted_by_all, 3, S * 30).first_seen(3), Some(S * 30));
        // An observer writes its note just after the next heartbeat.
        let (at, note) = record.note(1, S);
        let mut next = record;
        next.set_heartbeat_number(43);
        next.0[at as usize..][..note.len()].copy_from_slice(&note);
        assert_eq!(
            next.first_seen(1),
            None,
            "the note is about another heartbeat"
        );
        let again = noted(&next, 2, S);
        assert_eq!(
            again.note(3, S).0,
            at + note.len() as u64,
            "a note that does not count is replaced"
        );
    }

    #[test]
    fn parse_classifies_newer_damaged_and_foreign_content() {
        let whole = *record().seal();
        for newer in ["lockkit lease 2\n", "lockkit lease 10\nflavour sour\n"] {
            assert!(
                matches!(parse(newer.as_bytes()), Content::Newer),
                "{newer:?}"
            );
        }
        let zeros = [0; SIZE + 1];
        let damaged = [
            "",
            "l",
            "lockkit lease ",
            "lockkit lease 1\n",
            "lockkit lease 1\nsum",
            "lock\0\0",
        ]
        .map(str::as_bytes);
        for damaged in damaged
            .into_iter()
            .chain([&zeros[..1], &zeros[..SIZE], &whole[..SIZE - 1]])
        {
            assert!(matches!(parse(damaged), Content::Damaged), "{damaged:?}");
        }
        let foreign = [
            "\n",
            "4242\n",
            "lockkit lease 0\n",
            "lockkit lease 02\n",
            "lockkit lease 2",
            "lockkit lease notes\n",
            "lockkit\n",
            "\x7fELF",
            "\0\0x",
            "lockkit lease\n",
        ];
        let foreign = foreign.map(str::as_bytes).into_iter();
        let damaged_with_tail = [b"lockkit lease 1\nnotes", &zeros[..]].concat();
        for foreign in foreign.chain([&zeros[..], &damaged_with_tail[..SIZE + 1]]) {
            assert!(matches!(parse(foreign), Content::Foreign), "{foreign:?}");
        }
        assert!(
            matches!(parse(&[&whole[..], b"x"].concat()), Content::Ours(_)),
            "what follows a record does not count"
        );
    }

    #[test]
    fn note_in_emptied_file_leaves_it_reclaimable() {
        let (at, note) = record().note(7, S);
        let mut bytes = vec![0; at as usize];
        bytes.extend(note);
        assert!(matches!(parse(&bytes), Content::Damaged));
        bytes[at as usize] = b'x';
        assert!(matches!(parse(&bytes), Content::Foreign));
    }

    proptest! {
        #[test]
        fn written_record_reads_back(
            claim: u128, token: u64, number: u64, ttl: u64, every: u64, pid in 1..=u32::MAX, start: Option<u64>,
            boot: Option<u128>, namespace: Option<u64>, program in proptest::option::of(".*"), clock in 1_u128..,
            seen: u64,
        ) {
            let owner = Owner { pid, start, boot, namespace, program, ..me() };
            let [ttl, every, seen] = [ttl, every, seen].map(Duration::from_nanos);
            let mut record = Record::held(&ClaimId::from_number(claim), token, ttl, every, &owner);
            record.set_heartbeat_number(number);
            let mut record = noted(&record, clock, seen);
            let record = reread(&mut record);
            prop_assert_eq!((record.claim().number(), record.token()), (claim, token));
            prop_assert_eq!(record.heartbeat_number(), number);
            prop_assert_eq!((record.ttl(), record.heartbeat(), record.first_seen(clock)), (ttl, every, Some(seen)));
            let read = record.owner().unwrap();
            prop_assert_eq!((read.pid, read.start, read.boot), (pid, start, boot));
            prop_assert_eq!((read.namespace, read.host, read.acquired), (namespace, owner.host, owner.acquired));
        }

        #[test]
        fn parse_arbitrary_bytes_returns_no_record(bytes in proptest::collection::vec(any::<u8>(), 0..2 * SIZE)) {
            prop_assert!(!matches!(parse(&bytes), Content::Ours(_)));
        }

        #[test]
        fn parse_arbitrary_tail_does_not_panic(tail in proptest::collection::vec(any::<u8>(), 0..SIZE)) {
            parse(&[FAMILY, &tail].concat());
        }

        #[test]
        fn sealed_record_with_arbitrary_owner_and_notes_is_readable(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b' '), any::<u8>()], OWNER.len()),
            lines in "pid [0-9]{0,12}\n((start|boot|namespace|host|program|acquired) [ -~\u{e4}]{0,24}\n){0,9}",
            notes in proptest::collection::vec(prop_oneof![Just(b'f'), b'0'..=b'9', any::<u8>()], NOTES.len()),
            clock in 1_u128..,
        ) {
            let mut record = record();
            record.0[OWNER].copy_from_slice(&bytes);
            let length = lines.len().min(OWNER.len());
            record.0[OWNER.start..][..length].copy_from_slice(&lines.as_bytes()[..length]);
            record.0[NOTES].copy_from_slice(&notes);
            let Content::Ours(record) = parse(record.seal()) else { panic!("it is sealed and well formed") };
            let pid = lines[4..lines.find('\n').unwrap()].parse::<u32>().ok();
            prop_assert_eq!(record.owner().map(|owner| owner.pid), pid);
            record.first_seen(clock);
            prop_assert_eq!(noted(&record, clock, S).first_seen(clock), Some(S));
        }

        #[test]
        fn parse_changed_byte_returns_no_record(at in 0..SIZE - NOTES.len(), change in 1_u8..) {
            let at = if at < NOTES.start { at } else { at + NOTES.len() };
            let mut bytes = *record().seal();
            bytes[at] ^= change;
            prop_assert!(!matches!(parse(&bytes), Content::Ours(_)));
        }

        #[test]
        fn torn_note_does_not_count(at in 0..NOTE.len(), change in 1_u8..) {
            let record = record();
            let (start, note) = record.note(7, S);
            let mut noted = record;
            noted.0[start as usize..][..note.len()].copy_from_slice(&note);
            noted.0[start as usize + at] ^= change;
            prop_assert_eq!(noted.first_seen(7).filter(|time| *time != S), None);
        }

        #[test]
        fn parse_truncated_record_returns_damaged(length in 0..SIZE) {
            prop_assert!(matches!(parse(&record().seal()[..length]), Content::Damaged));
        }
    }
}
