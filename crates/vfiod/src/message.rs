//! Messages of vfio-user (QEMU, docs/interop/vfio-user.rst) as bytes and files.
//!
//! ```text
//!   0 id │ 2 command │ 4 bytes of the whole message │ 8 flags │ 12 error │ 16 body
//!                                                     bits 3:0 request 0, reply 1
//!                                                     bit 4 no reply wanted, bit 5 error
//! ```
//!
//! All numbers are little-endian. Files come with the header's first byte. The crate `vfio_user` is not
//! used: its server neither sends requests (DMA_READ, DMA_WRITE) nor takes one while it waits for a
//! reply, allocates what a client names as a length, and knows DMA messages as they were before QEMU
//! 11.1 alone. QEMU reads a header with one call, so each message is sent with one.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Bytes of a header.
pub const HEADER: usize = 16;
/// Most data of a message.
pub const DATA_MOST: usize = 1 << 20;
/// Longest body: data, and what says where it belongs.
const BODY_MOST: usize = DATA_MOST + 64;
/// Most files of a message that are taken; the client is told that it may send eight.
pub(crate) const FILES_MOST: usize = 64;
/// Bytes of a message that [`look`] takes for one: as many as a socket holds at a time, and more than
/// any message that a client has to send.
pub(crate) const LOOK_MOST: usize = 64 << 10;
/// Until the rest of a message is there.
const REST: Duration = Duration::from_micros(50);

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Versions and capabilities.
    Version = 1,
    /// A range of the guest's memory is there.
    DmaMap = 2,
    /// It is not any more.
    DmaUnmap = 3,
    /// Of the device.
    GetInfo = 4,
    /// Of one of its regions.
    GetRegionInfo = 5,
    /// Of one of its interrupts.
    GetIrqInfo = 7,
    /// Eventfds of interrupts.
    SetIrqs = 8,
    /// Of registers.
    RegionRead = 9,
    /// Of registers.
    RegionWrite = 10,
    /// The server reads the guest's memory.
    DmaRead = 11,
    /// The server writes it.
    DmaWrite = 12,
    /// As after power-on.
    Reset = 13,
}

impl Command {
    /// By its number.
    pub fn of(number: u16) -> Option<Self> {
        const ALL: [Command; 12] = [
            Command::Version,
            Command::DmaMap,
            Command::DmaUnmap,
            Command::GetInfo,
            Command::GetRegionInfo,
            Command::GetIrqInfo,
            Command::SetIrqs,
            Command::RegionRead,
            Command::RegionWrite,
            Command::DmaRead,
            Command::DmaWrite,
            Command::Reset,
        ];
        ALL.into_iter().find(|command| *command as u16 == number)
    }
}

const REPLY: u32 = 1;
const TYPE: u32 = 0xf;
const NO_REPLY: u32 = 0x10;
const ERROR: u32 = 0x20;

/// One message.
#[derive(Debug)]
pub struct Message {
    /// Chosen by who asks.
    pub id: u16,
    /// The number of the command.
    pub command: u16,
    /// See above.
    pub flags: u32,
    /// Of a reply: an errno.
    pub error: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// What came along.
    pub files: Vec<OwnedFd>,
}

impl Message {
    /// A request of ours. Without `reply` none is sent.
    pub fn request(id: u16, command: Command, body: Vec<u8>, reply: bool) -> Self {
        let flags = if reply { 0 } else { NO_REPLY };
        Self { id, command: command as u16, flags, error: 0, body, files: Vec::new() }
    }

    /// Whether it answers a request of ours.
    pub fn is_reply(&self) -> bool {
        self.flags & TYPE == REPLY
    }

    /// Whether it wants an answer.
    pub fn wants_reply(&self) -> bool {
        self.flags & NO_REPLY == 0
    }

    /// Whether what it answers has failed.
    pub fn is_error(&self) -> bool {
        self.flags & ERROR != 0
    }

    /// The answer to it: a body, or an errno.
    pub fn answer(&self, result: Result<Vec<u8>, i32>) -> Self {
        let (id, command, files) = (self.id, self.command, Vec::new());
        match result {
            Ok(body) => Self { id, command, flags: REPLY, error: 0, body, files },
            Err(errno) => {
                let error = errno.unsigned_abs();
                Self { id, command, flags: REPLY | ERROR, error, body: Vec::new(), files }
            }
        }
    }

    /// Its bytes on the wire.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        bytes.extend(self.id.to_le_bytes());
        bytes.extend(self.command.to_le_bytes());
        bytes.extend(((HEADER + self.body.len()) as u32).to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.error.to_le_bytes());
        bytes.extend(&self.body);
        bytes
    }
}

/// Reads numbers out of a body, from its beginning.
#[derive(Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `len` bytes.
    ///
    /// # Errors
    /// EINVAL: there are not so many.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], i32> {
        let (front, rest) = self.0.split_at_checked(len).ok_or(libc::EINVAL)?;
        self.0 = rest;
        Ok(front)
    }

    /// The next four.
    ///
    /// # Errors
    /// EINVAL.
    pub fn word(&mut self) -> Result<u32, i32> {
        self.take(4).map(|bytes| u32::from_le_bytes(std::array::from_fn(|i| bytes[i])))
    }

    /// The next eight.
    ///
    /// # Errors
    /// EINVAL.
    pub fn long(&mut self) -> Result<u64, i32> {
        self.take(8).map(|bytes| u64::from_le_bytes(std::array::from_fn(|i| bytes[i])))
    }
}

fn receive_some(
    stream: &UnixStream,
    into: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    receive_with(stream, into, files, RecvFlags::empty())
}

fn receive_with(
    stream: &UnixStream,
    into: &mut [u8],
    files: &mut Vec<OwnedFd>,
    flags: RecvFlags,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let got = loop {
        match rustix::net::recvmsg(stream, &mut [IoSliceMut::new(into)], &mut control, flags) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) || files.len() > FILES_MOST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more files than a message has"));
    }
    Ok(got.bytes)
}

fn receive_all(
    stream: &UnixStream,
    into: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match receive_some(stream, &mut into[done..], files)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// Waits for the next message; `None` when the other end has ended the connection.
///
/// # Errors
/// The connection's; `InvalidData` when what comes is no message.
pub fn receive(stream: &UnixStream) -> io::Result<Option<Message>> {
    let (mut header, mut files) = ([0; HEADER], Vec::new());
    match receive_all(stream, &mut header, &mut files)? {
        0 => return Ok(None),
        HEADER => {}
        _ => return Err(io::ErrorKind::UnexpectedEof.into()),
    }
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let len = (word(4) as usize).checked_sub(HEADER).filter(|len| *len <= BODY_MOST);
    let Some(len) = len else {
        let told = format!("a message of {} bytes", word(4));
        return Err(io::Error::new(io::ErrorKind::InvalidData, told));
    };
    let mut body = vec![0; len];
    if receive_all(stream, &mut body, &mut files)? < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (id, command, flags, error) = (half(0), half(2), word(8), word(12));
    Ok(Some(Message { id, command, flags, error, body, files }))
}

/// Waits for the next message, and leaves it where it is; `None` when the other end has ended the
/// connection. `room` is used again and again.
///
/// # Errors
/// The connection's; `InvalidData` when what is there is no message.
pub(crate) fn look(stream: &UnixStream, room: &mut Vec<u8>) -> io::Result<Option<Message>> {
    // What is behind the message is seen as well: files are its own only if nothing is. (Linux stops
    // behind a message with files, and goes on behind one without.)
    room.resize(LOOK_MOST + HEADER, 0);
    loop {
        let mut files = Vec::new();
        let seen = look_at(stream, room, &mut files)?;
        if seen == 0 {
            return Ok(None);
        }
        if seen >= HEADER {
            let half = |at: usize| u16::from_le_bytes([room[at], room[at + 1]]);
            let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| room[at + i]));
            let len = word(4) as usize;
            if !(HEADER..=LOOK_MOST).contains(&len) {
                let told = format!("a message of {len} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, told));
            }
            if seen >= len {
                if seen > len {
                    files.clear();
                }
                let (id, command, flags, error) = (half(0), half(2), word(8), word(12));
                let body = room[HEADER..len].to_vec();
                return Ok(Some(Message { id, command, flags, error, body, files }));
            }
        }
        // The kernel says that there is something to read; what is missing has to be waited for.
        if has_ended(stream)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        std::thread::sleep(REST);
    }
}

fn look_at(stream: &UnixStream, room: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    receive_with(stream, room, files, RecvFlags::PEEK)
}

fn has_ended(stream: &UnixStream) -> io::Result<bool> {
    let mut end = [PollFd::new(stream, PollFlags::RDHUP)];
    match poll(&mut end, Some(&Timespec::default())) {
        Err(Errno::INTR) => Ok(false),
        looked => Ok(looked? > 0),
    }
}

/// What is there to be read, without waiting: the number and the length of its first message.
pub(crate) fn waiting(stream: &UnixStream) -> Option<(u16, usize)> {
    let mut header = [0; HEADER];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let seen = receive_with(stream, &mut header, &mut Vec::new(), flags).ok()?;
    let id = u16::from_le_bytes([header[0], header[1]]);
    let len = u32::from_le_bytes(std::array::from_fn(|i| header[4 + i])) as usize;
    (seen == HEADER && len <= LOOK_MOST).then_some((id, len))
}

/// Whether nothing is there that was sent and not taken.
pub(crate) fn is_quiet(stream: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    loop {
        match rustix::net::recv(stream, &mut [0; 1], flags) {
            Err(Errno::INTR) => {}
            Ok((seen, _)) => return seen == 0,
            // A connection that has failed brings nothing any more.
            Err(_) => return true,
        }
    }
}

/// Takes so many bytes, which [`look`] has seen; files that come with them are closed.
///
/// # Errors
/// The connection's.
pub(crate) fn take(stream: &UnixStream, len: usize) -> io::Result<()> {
    let (mut rest, mut taken) = (vec![0; len], 0);
    while taken < len {
        match receive_some(stream, &mut rest[taken..], &mut Vec::new())? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => taken += more,
        }
    }
    Ok(())
}

/// Sends a message; waits while the other end does not read. Files that it has are not sent, but
/// `file`.
///
/// # Errors
/// The connection's.
pub fn send(
    stream: &UnixStream,
    message: &Message,
    file: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = message.bytes();
    let files: Vec<_> = file.into_iter().collect();
    let mut sent = 0;
    while sent < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&files));
        }
        let part = [IoSlice::new(&bytes[sent..])];
        match rustix::net::sendmsg(stream, &part, &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            result => sent += result?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_message_arrives_as_it_was_sent_with_its_file() {
        let (near, far) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let sent = Message::request(7, Command::DmaWrite, vec![1, 2, 3], false);
        send(&far, &sent, Some(file.as_fd())).unwrap();
        send(&far, &Message::request(8, Command::Reset, Vec::new(), true), None).unwrap();
        drop(far);
        let got = receive(&near).unwrap().unwrap();
        assert_eq!((got.id, got.command, got.body.clone()), (7, 12, vec![1, 2, 3]));
        assert!(!got.wants_reply() && !got.is_reply() && got.files.len() == 1);
        let got = receive(&near).unwrap().unwrap();
        assert!(got.wants_reply() && got.files.is_empty() && got.id == 8);
        assert!(receive(&near).unwrap().is_none());
    }

    #[test]
    fn a_message_that_is_too_long_or_too_short_or_cut_off_is_none() {
        for (len, rest) in [(15u32, 0), (BODY_MOST as u32 + 17, 0), (u32::MAX, 0), (20, 3)] {
            let (near, mut far) = UnixStream::pair().unwrap();
            let mut bytes = vec![0; HEADER];
            bytes[4..8].copy_from_slice(&len.to_le_bytes());
            bytes.extend(vec![0; rest]);
            far.write_all(&bytes).unwrap();
            drop(far);
            assert!(receive(&near).is_err(), "{len}");
        }
    }

    #[test]
    fn a_message_is_seen_as_often_as_one_looks_with_its_own_files_alone() {
        let (near, far) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let map = |id| Message::request(id, Command::DmaMap, vec![id as u8; 20], true);
        for id in [1, 2, 3] {
            // The first one has none, as a range has that is not to be written.
            send(&far, &map(id), Some(file.as_fd()).filter(|_| id > 1)).unwrap();
        }
        let mut room = Vec::new();
        for id in [1, 2, 3] {
            for _ in 0..2 {
                let seen = look(&near, &mut room).unwrap().unwrap();
                assert_eq!((seen.id, seen.body), (id, vec![id as u8; 20]));
                assert_eq!(seen.files.len(), usize::from(id > 1), "{id}");
            }
            assert_eq!(waiting(&near), Some((id, HEADER + 20)));
            take(&near, HEADER + 20).unwrap();
        }
        assert_eq!(waiting(&near), None);
        drop(far);
        assert!(look(&near, &mut room).unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_not_waited_for() {
        for (len, ends) in [(15u32, false), (LOOK_MOST as u32 + 1, false), (20, true)] {
            let (near, mut far) = UnixStream::pair().unwrap();
            let mut bytes = vec![0; HEADER];
            bytes[4..8].copy_from_slice(&len.to_le_bytes());
            far.write_all(&bytes).unwrap();
            let kept = Some(far).filter(|_| !ends);
            assert!(look(&near, &mut Vec::new()).is_err(), "{len}");
            drop(kept);
        }
    }

    #[test]
    fn fields_end_where_the_body_does() {
        let mut fields = Fields(&[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!((fields.word(), fields.long()), (Ok(1), Ok(2)));
        assert_eq!((fields.word(), fields.take(1)), (Err(libc::EINVAL), Ok(&[9][..])));
    }
}
