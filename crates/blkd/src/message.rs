//! Messages of vhost-user as bytes and files: seen before they are taken, and sent.
//!
//! A message is a header of three words (request, flags, size of the body), then the body. The
//! files come with its first byte.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use vhost::vhost_user::message::FrontendReq as Request;

/// Bytes of a header.
pub(crate) const HEADER: usize = 12;
/// Longest body (the same limit as in the crate `vhost`).
const MAX_BODY: usize = 4096;
/// Most files that one packet of a unix socket can carry (SCM_MAX_FD).
pub(crate) const MAX_FILES: usize = 253;
/// How long to wait for the rest of a message whose first bytes are there.
const REST: Duration = Duration::from_millis(1);
const ANSWER: u32 = 1 << 2;

/// Files that belong to a message; each is closed when nobody needs it any more.
pub(crate) type Files = Vec<Arc<OwnedFd>>;

/// One message, or nothing at all: an answer that is not given.
#[derive(Clone, Debug, Default)]
pub(crate) struct Message {
    pub bytes: Vec<u8>,
    pub files: Files,
}

impl Message {
    /// A message without files.
    pub(crate) fn new(request: u32, body: &[u8]) -> Self {
        Self::with_files(request, body, Files::new())
    }

    pub(crate) fn with_files(request: u32, body: &[u8], files: Files) -> Self {
        const VERSION: u32 = 1;
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        for word in [request, VERSION, body.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(body);
        Self { bytes, files }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn word(&self, at: usize) -> u32 {
        let word = self.bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_ne_bytes(word.unwrap_or_default())
    }

    /// The number of the request.
    pub(crate) fn request(&self) -> u32 {
        self.word(0)
    }

    /// Whether a request of this kind comes with files, by what it says.
    fn has_files(&self) -> bool {
        // In the messages that give an eventfd: there is none.
        const NO_FILE: u32 = 1 << 8;
        let eventfds = [Request::SET_VRING_KICK, Request::SET_VRING_CALL, Request::SET_VRING_ERR];
        let others = [
            Request::SET_MEM_TABLE,
            Request::ADD_MEM_REG,
            Request::SET_LOG_BASE,
            Request::SET_LOG_FD,
            Request::SET_INFLIGHT_FD,
            Request::SET_BACKEND_REQ_FD,
        ];
        let is_one_of = |kinds: &[Request]| kinds.iter().any(|kind| self.request() == *kind as u32);
        is_one_of(&others) || is_one_of(&eventfds) && self.body_word(0) & NO_FILE == 0
    }

    /// Makes this the answer to a message of the same kind.
    pub(crate) fn mark_answer(&mut self) {
        const FLAGS_AT: usize = 4;
        let flags = self.word(FLAGS_AT) | ANSWER;
        self.bytes[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&flags.to_ne_bytes());
    }

    pub(crate) fn body(&self) -> &[u8] {
        self.bytes.get(HEADER..).unwrap_or_default()
    }

    /// Word `n` of the body; 0 where the body is shorter.
    pub(crate) fn body_word(&self, n: usize) -> u32 {
        self.word(HEADER + 4 * n)
    }
}

/// Looks at the next message and leaves it where it is. `None`: the connection has ended.
///
/// Waits for the message if `waits`; otherwise no message is an error of kind `WouldBlock`.
///
/// # Errors
/// The connection's; `InvalidData` for a message that nobody can have meant, or of which a part is
/// all that there will be.
pub(crate) fn peek(stream: impl AsFd, waits: bool) -> io::Result<Option<Message>> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut ended = false;
    loop {
        let mut header = [0; HEADER];
        let (seen, _) = receive(&stream, &mut header, flags(waits) | RecvFlags::PEEK, None)?;
        if seen == 0 {
            return Ok(None);
        }
        if seen == HEADER {
            let size = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]) as usize;
            if size > MAX_BODY {
                return Err(invalid("the body of a message is too long"));
            }
            let mut bytes = vec![0; HEADER + size];
            let mut files = Files::new();
            let look = flags(waits) | RecvFlags::PEEK;
            let (seen, cut) = receive(&stream, &mut bytes, look, Some(&mut files))?;
            if cut {
                return Err(invalid("a message has too many files, or no descriptor is left"));
            }
            if seen == bytes.len() {
                return Ok(Some(Message { bytes, files }));
            }
        }
        if !waits {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if ended {
            return Err(invalid("the connection ended in the middle of a message"));
        }
        // The kernel says that there is something to read; what is missing has to be waited for.
        std::thread::sleep(REST);
        ended = has_ended(&stream)?;
    }
}

/// Whether nothing more will come than what is there to be read.
fn has_ended(stream: impl AsFd) -> io::Result<bool> {
    let mut end = [PollFd::new(&stream, PollFlags::RDHUP)];
    match poll(&mut end, Some(&Timespec::default())) {
        Err(Errno::INTR) => Ok(false),
        looked => Ok(looked? > 0),
    }
}

/// As [`peek`], of a front end, which may have sent more: only files that belong to this kind of
/// message are kept. A look at a message without files shows those of the message behind it (Linux
/// goes on to the next one before it sees that enough was read).
///
/// # Errors
/// As [`peek`].
pub(crate) fn peek_request(stream: impl AsFd, waits: bool) -> io::Result<Option<Message>> {
    let mut seen = peek(stream, waits)?;
    if let Some(message) = &mut seen
        && !message.has_files()
    {
        message.files.clear();
    }
    Ok(seen)
}

/// Takes `length` bytes, which [`peek`] has seen. The files that come with them are closed.
///
/// # Errors
/// The connection's.
pub(crate) fn take(stream: impl AsFd, length: usize) -> io::Result<()> {
    let mut rest = vec![0; length];
    let mut taken = 0;
    while taken < length {
        match receive(&stream, &mut rest[taken..], RecvFlags::DONTWAIT, None)? {
            (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (more, _) => taken += more,
        }
    }
    Ok(())
}

/// Reads at most `bytes.len()` bytes; gives their number, and whether files were lost for want of
/// room. Without `files` those that come are closed.
///
/// # Errors
/// The system's.
pub(crate) fn receive(
    stream: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
    files: Option<&mut Files>,
) -> io::Result<(usize, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let room = if files.is_some() { &mut space[..] } else { &mut [] };
    let mut control = RecvAncillaryBuffer::new(room);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let got = loop {
        match rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(bytes)], &mut control, flags) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    let Some(files) = files else { return Ok((got.bytes, false)) };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received.map(Arc::new));
        }
    }
    Ok((got.bytes, got.flags.contains(ReturnFlags::CTRUNC)))
}

/// Sends all of the message; waits while the other end does not read, if `waits`.
///
/// # Errors
/// The connection's; `WouldBlock` when it is full and this must not wait.
pub(crate) fn send(stream: impl AsFd, message: &Message, waits: bool) -> io::Result<()> {
    let files: Vec<BorrowedFd<'_>> = message.files.iter().map(|file| file.as_fd()).collect();
    let mut sent = send_some(&stream, &message.bytes, &files, waits)?;
    while sent < message.bytes.len() {
        sent += send_some(&stream, &message.bytes[sent..], &[], waits)?;
    }
    Ok(())
}

fn send_some(
    stream: impl AsFd,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
    waits: bool,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many files"));
    }
    let how = if waits { SendFlags::NOSIGNAL } else { SendFlags::NOSIGNAL | SendFlags::DONTWAIT };
    loop {
        match rustix::net::sendmsg(&stream, &[IoSlice::new(bytes)], &mut control, how) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

fn flags(waits: bool) -> RecvFlags {
    if waits { RecvFlags::empty() } else { RecvFlags::DONTWAIT }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn file() -> Arc<OwnedFd> {
        Arc::new(File::open("/dev/null").unwrap().into())
    }

    #[test]
    fn a_message_is_seen_as_often_as_one_looks_and_then_taken() {
        let (near, far) = UnixStream::pair().unwrap();
        let first = Message::with_files(5, b"body", vec![file(), file()]);
        send(&far, &first, true).unwrap();
        send(&far, &Message::with_files(6, b"", vec![file()]), true).unwrap();
        for _ in 0..2 {
            let seen = peek(&near, true).unwrap().unwrap();
            assert_eq!((seen.bytes, seen.files.len()), (first.bytes.clone(), 2));
        }
        take(&near, first.bytes.len()).unwrap();
        let second = peek(&near, true).unwrap().unwrap();
        assert_eq!((second.request(), second.files.len()), (6, 1));
    }

    #[test]
    fn the_files_of_the_message_behind_are_not_taken_for_its_own() {
        let (near, far) = UnixStream::pair().unwrap();
        send(&far, &Message::new(1, b""), true).unwrap();
        send(&far, &Message::with_files(2, b"", vec![file()]), true).unwrap();
        // If this fails the kernel has learned better, and `peek_request` can go.
        assert_eq!(peek(&near, true).unwrap().unwrap().files.len(), 1);
        let seen = peek_request(&near, true).unwrap().unwrap();
        assert_eq!((seen.request(), seen.files.len()), (1, 0));
    }

    #[test]
    fn half_a_message_is_no_message() {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(&Message::new(1, b"12345678").bytes[..14]).unwrap();
        assert_eq!(peek(&near, false).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        far.write_all(b"345678").unwrap();
        assert_eq!(peek(&near, false).unwrap().unwrap().body(), b"12345678");
        drop(far);
        take(&near, HEADER + 8).unwrap();
        assert!(peek(&near, true).unwrap().is_none());
    }

    #[test]
    fn half_a_message_is_not_waited_for_when_the_connection_has_ended() {
        for length in [1, HEADER, HEADER + 7] {
            let (near, mut far) = UnixStream::pair().unwrap();
            far.write_all(&Message::new(1, b"12345678").bytes[..length]).unwrap();
            drop(far);
            assert_eq!(peek(&near, true).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_message_that_is_too_long_is_refused() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut bytes = Message::new(1, b"").bytes;
        bytes[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        far.write_all(&bytes).unwrap();
        assert_eq!(peek(&near, true).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
