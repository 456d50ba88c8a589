//! What the process that serves tells its spare, packet by packet, over a socket that keeps their bounds.
//!
//! ```text
//!   0 "SVLK" u32 │ 4 version u16 │ 6 kind u16 │ 8 port u16, command u16 │ 12 body
//! ```
//!
//! | kind | body | files | meaning |
//! |---|---|---|---|
//! | begin | – | page, ledger, both ends of the outbox, the sockets that are listened at | forget everything |
//! | stream | – | the connection | QEMU is connected at this port |
//! | message | that of the message | its own | the message was understood, and will be answered |
//! | complete | – | – | that was all that there was before |
//! | end | – | – | nobody is to go on |
//!
//! Messages are those that bring files, or take what they brought away; everything else is in the
//! ledger. What was sent stays in the spare's socket when its sender dies.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use semper_spare::socket;

use crate::inbox::Port;
use crate::message::{FILES_MOST, LOOK_MOST};

const MAGIC: u32 = u32::from_le_bytes(*b"SVLK");
/// Changes whenever an older process could misunderstand a packet, or what is in the ledger.
const VERSION: u16 = 1;
const HEADER: usize = 12;
/// From the end of a link to the end of the process at its other end.
const CLOSING: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(5);

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Kind {
    Begin = 1,
    Stream = 2,
    Message = 3,
    Complete = 4,
    End = 5,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Packet {
    pub kind: Kind,
    pub port: Port,
    pub command: u16,
    pub body: Vec<u8>,
    pub files: Vec<OwnedFd>,
}

/// Sends a packet, unless that would have to wait: whoever does not read does not stop the guest.
///
/// # Errors
/// The link's.
pub(crate) fn send(
    link: impl AsFd,
    (kind, port, command): (Kind, Port, u16),
    body: &[u8],
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(MAGIC.to_le_bytes());
    for half in [VERSION, kind as u16, port as u16, command] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(body);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let how = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(link, &[IoSlice::new(&bytes)], &mut control, how)?;
    Ok(())
}

/// What these bytes and files say; `None`: they are of another version, or of nobody.
pub(crate) fn decode(bytes: &[u8], files: Vec<OwnedFd>) -> Option<Packet> {
    let half = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let magic = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
    if magic != MAGIC || half(4)? != VERSION {
        return None;
    }
    let kind = match half(6)? {
        1 => Kind::Begin,
        2 => Kind::Stream,
        3 => Kind::Message,
        4 => Kind::Complete,
        5 => Kind::End,
        _ => return None,
    };
    let port = match half(8)? {
        0 => Port::Device,
        1 => Port::Shim,
        _ => return None,
    };
    Some(Packet { kind, port, command: half(10)?, body: bytes.get(HEADER..)?.to_vec(), files })
}

/// The next packet; `None` at the end of the link. No packet is an error of kind `WouldBlock`.
pub(crate) fn receive(link: impl AsFd) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; HEADER + LOOK_MOST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = rustix::net::recvmsg(link, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    let cut = got.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC);
    let packet = if cut { None } else { decode(&bytes[..got.bytes], files) };
    packet.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Nobody serves there yet.
fn is_nobody_there(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// What a spare hears.
#[derive(Debug)]
pub(crate) enum Heard {
    Packet(Packet),
    /// Who served has died: this process goes on.
    Death,
    /// This process is to end.
    Signal,
}

/// A spare's end of the link. Made before the walls, which leave no right to what it needs.
pub(crate) struct Following {
    link: OwnedFd,
    /// A pidfd.
    leader: OwnedFd,
    signals: OwnedFd,
}

impl Following {
    /// Follows whoever serves at `path`, and waits for it for so long. `signals` are blocked.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn connect(
        path: &Path,
        signals: &libc::sigset_t,
        patience: Duration,
    ) -> io::Result<Self> {
        let end = Instant::now() + patience;
        let link = loop {
            match socket::connect(path) {
                Ok(link) => break link,
                Err(error) if is_nobody_there(&error) && Instant::now() < end => {
                    std::thread::sleep(AGAIN);
                }
                Err(error) => return Err(error),
            }
        };
        // Who listens there, which is whoever serves.
        let leader = socket::credentials(&link)?.pid;
        // SAFETY: no memory is passed.
        let leader = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, leader, 0) })?;
        // SAFETY: the set is initialised and lives across the call.
        let signals = unsafe { libc::signalfd(-1, signals, libc::SFD_CLOEXEC) };
        Ok(Self { link, leader, signals: owned(signals.into())? })
    }

    /// Tells who serves that this process could go on.
    ///
    /// # Errors
    /// The link's.
    pub(crate) fn tell_ready(&self) -> io::Result<()> {
        rustix::net::send(&self.link, b"R", SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Waits for what comes next.
    ///
    /// # Errors
    /// The link's; `ConnectionAborted` when who serves lives, and does not tell this process any more.
    pub(crate) fn next(&self) -> io::Result<Heard> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        loop {
            let mut fds = [&self.link, &self.signals].map(|file| PollFd::new(file, PollFlags::IN));
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                looked => looked?,
            };
            if !fds[1].revents().is_empty() {
                return Ok(Heard::Signal);
            }
            match receive(&self.link) {
                Ok(Some(packet)) => return Ok(Heard::Packet(packet)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Ok(None) => {}
                // It has ended with something unread. The kernel says so once, and before what it has sent.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
                Err(error) => return Err(error),
            }
            let mut end = [PollFd::new(&self.leader, PollFlags::IN)];
            let patience = Timespec {
                tv_sec: CLOSING.as_secs() as i64,
                tv_nsec: CLOSING.subsec_nanos().into(),
            };
            return match poll(&mut end, Some(&patience))? {
                0 => Err(io::ErrorKind::ConnectionAborted.into()),
                _ => Ok(Heard::Death),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    use super::*;

    #[test]
    fn a_packet_arrives_as_it_was_and_others_are_refused() {
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let file = File::open("/dev/null").unwrap();
        send(&far, (Kind::Message, Port::Shim, 8), b"body", &[file.as_fd()]).unwrap();
        let got = receive(&near).unwrap().unwrap();
        assert_eq!((got.kind, got.port, got.command), (Kind::Message, Port::Shim, 8));
        assert_eq!((&got.body[..], got.files.len()), (&b"body"[..], 1));
        assert_eq!(receive(&near).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        rustix::net::send(&far, b"SVLK\x02\0\x03\0\0\0\0\0", SendFlags::empty()).unwrap();
        assert_eq!(receive(&near).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(far);
        assert!(receive(&near).unwrap().is_none());
    }

    #[test]
    fn what_was_sent_is_heard_before_the_death_of_who_has_read_nothing() {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        // An event stands for the death: a test that started a process would give it, until that process
        // begins its own program, a copy of what the tests beside it close.
        let leader = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        // SAFETY: the set is initialised, and the descriptor is new.
        let signals = unsafe {
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::signalfd(-1, &none, libc::SFD_CLOEXEC)
        };
        let signals = owned(signals.into()).unwrap();
        let following = Following { link: near, leader, signals };
        following.tell_ready().unwrap();
        send(&far, (Kind::Message, Port::Device, 2), b"late", &[]).unwrap();
        drop(far);
        let heard = following.next().unwrap();
        assert!(matches!(&heard, Heard::Packet(packet) if packet.body == b"late"), "{heard:?}");
        assert!(matches!(following.next(), Ok(Heard::Death)));
    }
}
