//! The messages between two instances, as bytes. No system calls; any input is read safely.
//!
//! The second instance connects and sends one request. The first sends one answer back and closes.
//! Both ends stay open until then: a sender that hangs up has given up. Each message is a header of
//! 12 bytes and its content, numbers little-endian:
//! ```text
//! 0   4 bytes   "lkin"
//! 4   u16       the version of the sender; the header is the same in every version
//! 6   u16       the kind: 1 a request, 2 an answer, 3 the first failed, 4 the request was not understood
//! 8   u32       the length of the content
//! ```
//! The content of a request, where a *text* is its length (u32) and its bytes:
//! ```text
//! u32, texts            the arguments: their number, and each
//! text                  the working directory; empty where the sender does not know it
//! u32, pairs of texts   the variables: their number, and the name and value of each
//! text                  the bytes
//! ```
//! Nothing may follow it. The content of an answer is its bytes; the other two kinds have none. A
//! reader reads no more than the header says, and allocates no memory for bytes that have not
//! arrived.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The most bytes that an activation can carry, and the most bytes of its answer: 1 MiB.
///
/// ```
/// fn fits(bytes: &[u8]) -> bool {
///     bytes.len() <= lockkit::instance::MOST_BYTES
/// }
/// ```
pub const MOST_BYTES: usize = 1 << 20;

/// The longest content of a request: the arguments and the environment of a process never take more
/// than 6 MiB on Linux ([execve(2)](https://man7.org/linux/man-pages/man2/execve.2.html)), and the
/// bytes 1 MiB.
pub(super) const MAX_REQUEST_BYTES: usize = 8 << 20;

/// Raised when the content of any frame changes.
const VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"lkin";
const HEADER: usize = 12;

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Kind {
    /// From the second to the first.
    Request = 1,
    /// The first has handled it.
    Answer = 2,
    /// The first began to handle it and failed.
    Failed = 3,
    /// The first cannot read it.
    NotUnderstood = 4,
}

impl Kind {
    fn of(number: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Answer,
            Self::Failed,
            Self::NotUnderstood,
        ]
        .into_iter()
        .find(|kind| *kind as u16 == number)
    }
}

/// The reason why bytes are no frame, or no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// The bytes do not come from lockkit, or violate the format.
    Garbage,
    /// Another version of lockkit sent it.
    Version,
    /// It is longer than allowed.
    TooLong,
}

/// The part of a message that is too large to be sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLarge {
    pub(super) what: &'static str,
    pub(super) size: usize,
    pub(super) max: usize,
}

/// The data that a second start sends to the first instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) arguments: Vec<OsString>,
    pub(super) directory: Option<PathBuf>,
    pub(super) variables: Vec<(OsString, OsString)>,
    pub(super) bytes: Vec<u8>,
}

impl Request {
    /// Returns the frame of the request.
    pub(super) fn encode(&self) -> Result<Vec<u8>, TooLarge> {
        check("the bytes of an activation", self.bytes.len(), MOST_BYTES)?;
        let directory = self
            .directory
            .as_ref()
            .map(|directory| directory.as_os_str().as_bytes())
            .unwrap_or_default();
        let arguments = self.arguments.iter().map(|argument| argument.as_bytes());
        let variables = self
            .variables
            .iter()
            .flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]);
        let texts = arguments
            .clone()
            .chain([directory])
            .chain(variables.clone())
            .chain([&*self.bytes]);
        let size = texts.fold(2 * NUMBER, |size, text| {
            size.saturating_add(NUMBER + text.len())
        });
        check("an activation", size, MAX_REQUEST_BYTES)?;
        let mut frame = header(Kind::Request, size);
        // A request that fits into `MAX_REQUEST_BYTES` also fits into its numbers.
        let number =
            |frame: &mut Vec<u8>, number: usize| frame.extend((number as u32).to_le_bytes());
        let text = |frame: &mut Vec<u8>, text: &[u8]| {
            frame.extend((text.len() as u32).to_le_bytes());
            frame.extend(text);
        };
        number(&mut frame, self.arguments.len());
        arguments.for_each(|argument| text(&mut frame, argument));
        text(&mut frame, directory);
        number(&mut frame, self.variables.len());
        variables.for_each(|part| text(&mut frame, part));
        text(&mut frame, &self.bytes);
        Ok(frame)
    }

    fn decode(mut content: &[u8]) -> Result<Self, Malformed> {
        let from = &mut content;
        let arguments = (0..number(from)?)
            .map(|_| os_string(from))
            .collect::<Result<_, _>>()?;
        let directory = os_string(from)?;
        let variables = (0..number(from)?)
            .map(|_| Ok((os_string(from)?, os_string(from)?)))
            .collect::<Result<_, _>>()?;
        let bytes = text(from)?.to_vec();
        if !content.is_empty() || bytes.len() > MOST_BYTES {
            return Err(Malformed::Garbage);
        }
        let directory = (!directory.is_empty()).then(|| PathBuf::from(directory));
        Ok(Self {
            arguments,
            directory,
            variables,
            bytes,
        })
    }
}

const NUMBER: usize = size_of::<u32>();

fn number(from: &mut &[u8]) -> Result<u32, Malformed> {
    let (number, rest) = from.split_first_chunk().ok_or(Malformed::Garbage)?;
    *from = rest;
    Ok(u32::from_le_bytes(*number))
}

fn text<'a>(from: &mut &'a [u8]) -> Result<&'a [u8], Malformed> {
    let length = number(from)? as usize;
    let (text, rest) = from.split_at_checked(length).ok_or(Malformed::Garbage)?;
    *from = rest;
    Ok(text)
}

fn os_string(from: &mut &[u8]) -> Result<OsString, Malformed> {
    Ok(OsString::from_vec(text(from)?.to_vec()))
}

fn check(what: &'static str, size: usize, max: usize) -> Result<(), TooLarge> {
    if size > max {
        Err(TooLarge { what, size, max })
    } else {
        Ok(())
    }
}

fn header(kind: Kind, length: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER + length);
    frame.extend(MAGIC);
    frame.extend(VERSION.to_le_bytes());
    frame.extend((kind as u16).to_le_bytes());
    frame.extend((length as u32).to_le_bytes());
    frame
}

/// Returns the frame of an answer.
pub(super) fn answer(bytes: &[u8]) -> Result<Vec<u8>, TooLarge> {
    check("an answer", bytes.len(), MOST_BYTES)?;
    let mut frame = header(Kind::Answer, bytes.len());
    frame.extend(bytes);
    Ok(frame)
}

/// Returns a frame without content.
pub(super) fn empty_frame(kind: Kind) -> Vec<u8> {
    header(kind, 0)
}

/// A frame as it arrives.
#[derive(Debug)]
pub(super) struct Inbox {
    buffer: Vec<u8>,
    /// The longest content that is accepted.
    max: usize,
}

impl Inbox {
    pub(super) fn new(max: usize) -> Self {
        Self {
            buffer: Vec::new(),
            max,
        }
    }

    /// Returns the buffer for the arriving bytes.
    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    /// Returns the number of missing bytes, as far as it is known: 0 when the frame is complete.
    pub(super) fn missing(&self) -> Result<usize, Malformed> {
        let known = self.buffer.len().min(MAGIC.len());
        if self.buffer[..known] != MAGIC[..known] {
            return Err(Malformed::Garbage);
        }
        match self.header()? {
            None => Ok(HEADER - self.buffer.len()),
            Some((_, length)) => (HEADER + length)
                .checked_sub(self.buffer.len())
                .ok_or(Malformed::Garbage),
        }
    }

    fn header(&self) -> Result<Option<(Kind, usize)>, Malformed> {
        let Some((&[_, _, _, _, v0, v1, k0, k1, l0, l1, l2, l3], _)) =
            self.buffer.split_first_chunk::<HEADER>()
        else {
            return Ok(None);
        };
        let kind = Kind::of(u16::from_le_bytes([k0, k1]));
        let version = u16::from_le_bytes([v0, v1]);
        // `NotUnderstood` is valid from every version. Any other frame of another version only
        // means that the version differs.
        if version != VERSION && kind != Some(Kind::NotUnderstood) {
            return Err(Malformed::Version);
        }
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3]))
            .map_err(|_| Malformed::TooLong)?;
        match kind {
            None => Err(Malformed::Garbage),
            Some(_) if length > self.max => Err(Malformed::TooLong),
            Some(kind) => Ok(Some((kind, length))),
        }
    }

    /// Returns the complete frame as a request.
    pub(super) fn request(&self) -> Result<Request, Malformed> {
        match self.header()? {
            Some((Kind::Request, _)) => Request::decode(&self.buffer[HEADER..]),
            _ => Err(Malformed::Garbage),
        }
    }

    /// Returns the complete frame as an answer.
    pub(super) fn answer(mut self) -> Result<(Kind, Vec<u8>), Malformed> {
        match self.header()? {
            None | Some((Kind::Request, _)) => Err(Malformed::Garbage),
            Some((kind, _)) => Ok((kind, self.buffer.split_off(HEADER))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads a frame that arrives in portions of `portion` bytes. Returns the number of `bytes`
    /// that it took.
    fn read(bytes: &[u8], portion: usize, max: usize) -> (Result<Inbox, Malformed>, usize) {
        let mut inbox = Inbox::new(max);
        loop {
            let at = inbox.buffer.len();
            match inbox.missing() {
                Err(malformed) => return (Err(malformed), at),
                Ok(0) => return (Ok(inbox), at),
                Ok(missing) => {
                    let end = (at + missing.min(portion)).min(bytes.len());
                    if end == at {
                        return (Ok(inbox), at);
                    }
                    inbox.buffer().extend(&bytes[at..end]);
                }
            }
        }
    }

    fn texts() -> impl Strategy<Value = OsString> {
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(OsString::from_vec)
    }

    fn requests() -> impl Strategy<Value = Request> {
        let directory = proptest::option::of(
            texts().prop_filter("a directory", |directory| !directory.is_empty()),
        );
        let variables = proptest::collection::vec((texts(), texts()), 0..5);
        (
            proptest::collection::vec(texts(), 0..20),
            directory,
            variables,
            proptest::collection::vec(any::<u8>(), 0..200),
        )
            .prop_map(|(arguments, directory, variables, bytes)| Request {
                arguments,
                directory: directory.map(PathBuf::from),
                variables,
                bytes,
            })
    }

    proptest! {
        #[test]
        fn request_read_in_portions_stops_at_its_end(
            request in requests(), portion in 1_usize..64, behind in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let frame = request.encode().unwrap();
            let (inbox, taken) = read(&[&*frame, &behind].concat(), portion, MAX_REQUEST_BYTES);
            prop_assert_eq!(inbox.unwrap().request(), Ok(request));
            prop_assert_eq!(taken, frame.len());
        }

        #[test]
        fn answer_is_received_as_sent(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (inbox, _) = read(&answer(&bytes).unwrap(), 7, MOST_BYTES);
            prop_assert_eq!(inbox.unwrap().answer(), Ok((Kind::Answer, bytes)));
        }

        #[test]
        fn read_of_any_bytes_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (inbox, _) = read(&bytes, 64, MAX_REQUEST_BYTES);
            let _ = inbox.map(|inbox| (inbox.request().is_ok(), inbox.answer().is_ok()));
        }

        #[test]
        fn read_of_any_content_does_not_panic(
            content in proptest::collection::vec(prop_oneof![Just(0_u8), Just(1), any::<u8>()], 0..100),
        ) {
            let mut frame = header(Kind::Request, content.len());
            frame.extend(&content);
            let (inbox, _) = read(&frame, 64, MAX_REQUEST_BYTES);
            if let Ok(request) = inbox.unwrap().request() {
                prop_assert_eq!(&request.encode().unwrap()[HEADER..], &*content);
            }
        }

        #[test]
        fn read_of_damaged_request_does_not_panic(
            request in requests(), cut in any::<proptest::sample::Index>(), position in any::<proptest::sample::Index>(),
            with in any::<u8>(),
        ) {
            let mut frame = request.encode().unwrap();
            let whole = frame.len();
            frame.truncate(cut.index(whole));
            let (inbox, _) = read(&frame, 64, MAX_REQUEST_BYTES);
            prop_assert!(inbox.unwrap().missing().unwrap() > 0, "a part is never complete");
            let mut frame = request.encode().unwrap();
            let at = position.index(whole);
            frame[at] = with;
            let _ = read(&frame, 64, MAX_REQUEST_BYTES).0.map(|inbox| inbox.request());
        }
    }

    #[test]
    fn invalid_frame_is_rejected_at_first_wrong_byte() {
        let frame = Request::default().encode().unwrap();
        let damaged = |at: usize, with: &[u8]| {
            let mut frame = frame.clone();
            frame[at..at + with.len()].copy_from_slice(with);
            let (inbox, taken) = read(&frame, 1, MAX_REQUEST_BYTES);
            (inbox.map(|_| ()), taken)
        };
        assert_eq!(damaged(0, b"G"), (Err(Malformed::Garbage), 1));
        assert_eq!(damaged(4, &[9, 9]), (Err(Malformed::Version), HEADER));
        assert_eq!(damaged(6, &[9]), (Err(Malformed::Garbage), HEADER));
        assert_eq!(damaged(8, &[0xff; 4]), (Err(Malformed::TooLong), HEADER));
        assert_eq!(
            damaged(8, &(MAX_REQUEST_BYTES as u32 + 1).to_le_bytes()),
            (Err(Malformed::TooLong), HEADER)
        );
    }

    #[test]
    fn wrong_lengths_are_rejected_without_allocation() {
        for content in [
            &[0xff; 4][..],
            &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            &[0; 15],
            &[0; 17],
        ] {
            let mut frame = header(Kind::Request, content.len());
            frame.extend(content);
            assert_eq!(
                read(&frame, 64, MAX_REQUEST_BYTES).0.unwrap().request(),
                Err(Malformed::Garbage),
                "{content:?}"
            );
        }
    }

    #[test]
    fn too_large_message_is_refused_before_sending() {
        let request = |bytes| Request {
            bytes: vec![0; bytes],
            ..Request::default()
        };
        assert!(request(MOST_BYTES).encode().is_ok());
        assert_eq!(
            request(MOST_BYTES + 1).encode().unwrap_err().size,
            MOST_BYTES + 1
        );
        assert_eq!(
            answer(&vec![0; MOST_BYTES + 1]).unwrap_err().max,
            MOST_BYTES
        );
        let arguments = vec![OsString::from_vec(vec![b'x'; MAX_REQUEST_BYTES])];
        assert_eq!(
            Request {
                arguments,
                ..Request::default()
            }
            .encode()
            .unwrap_err()
            .what,
            "an activation"
        );
    }

    #[test]
    fn not_understood_is_read_from_any_version() {
        let mut frame = empty_frame(Kind::NotUnderstood);
        frame[4] = 7;
        assert_eq!(
            read(&frame, 64, 0).0.unwrap().answer(),
            Ok((Kind::NotUnderstood, Vec::new()))
        );
        let mut frame = empty_frame(Kind::Answer);
        frame[4] = 7;
        assert_eq!(read(&frame, 64, 0).0.unwrap_err(), Malformed::Version);
    }
}
