//! The connection to the other end: whole frames over TLS, in both directions at once.
//!
//! One thread receives, any thread sends. The socket is never read or written with the TLS state
//! locked, so neither direction can hold up the other.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::Connection;
use semper_wire::format::{self, FRAME_HEADER, Frame, Kind};

use crate::failure::Failure;

/// Plain bytes that are encrypted at once.
const PIECE: usize = 64 << 10;
/// For everything before the stream.
const SETUP: Duration = Duration::from_secs(10);
/// So long a write waits before it looks whether it still has to.
const WRITE: Duration = Duration::from_secs(1);
/// A peer that does not acknowledge for so long is gone, in milliseconds.
const SILENCE_MS: u32 = 30_000;

pub(crate) struct Channel {
    socket: TcpStream,
    tls: Mutex<Connection>,
    /// Encrypted bytes; held while they are written, which keeps them in order.
    outgoing: Mutex<Vec<u8>>,
    /// The peer may take as long as it likes: between setting up and closing.
    patient: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
}

/// The receiving side: what came and is not yet a frame.
pub(crate) struct Inbox {
    plain: Vec<u8>,
    used: usize,
    raw: Vec<u8>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Channel {
    /// Completes the TLS handshake. Until [`Channel::established`] nothing waits for long.
    pub(crate) fn new(socket: TcpStream, mut tls: Connection) -> Result<Self, Failure> {
        let options = || {
            socket.set_nodelay(true)?;
            socket.set_read_timeout(Some(SETUP))?;
            socket.set_write_timeout(Some(SETUP))?;
            rustix::net::sockopt::set_socket_keepalive(&socket, true)?;
            rustix::net::sockopt::set_tcp_keepidle(&socket, Duration::from_secs(5))?;
            rustix::net::sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(5))?;
            rustix::net::sockopt::set_tcp_user_timeout(&socket, SILENCE_MS)?;
            io::Result::Ok(())
        };
        options().map_err(Failure::system("set up the connection"))?;
        tls.set_buffer_limit(None);
        while tls.is_handshaking() {
            tls.complete_io(&mut &socket).map_err(|error| Failure::Tls(error.to_string()))?;
        }
        Ok(Self {
            socket,
            tls: Mutex::new(tls),
            outgoing: Mutex::default(),
            patient: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        })
    }

    /// The peer is who it should be and speaks our language: from now on it may take its time.
    pub(crate) fn established(&self) -> Result<(), Failure> {
        let timeouts = || {
            self.socket.set_read_timeout(None)?;
            self.socket.set_write_timeout(Some(WRITE))
        };
        self.patient.store(true, Ordering::Relaxed);
        timeouts().map_err(Failure::Lost)
    }

    pub(crate) fn check(
        &self,
        check: impl FnOnce(&Connection) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        check(&locked(&self.tls))
    }

    /// Bytes on the wire: sent and received.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }

    /// Sends a frame.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<(), Failure> {
        let mut outgoing = locked(&self.outgoing);
        for piece in frame.chunks(PIECE) {
            outgoing.clear();
            {
                let mut tls = locked(&self.tls);
                tls.writer().write_all(piece).map_err(Failure::Lost)?;
                while tls.wants_write() {
                    tls.write_tls(&mut *outgoing).map_err(Failure::Lost)?;
                }
            }
            self.write(&outgoing).map_err(Failure::Lost)?;
            self.sent.fetch_add(outgoing.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// A peer that is slow is waited for, until this end gives up.
    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match (&self.socket).write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && self.may_wait() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn may_wait(&self) -> bool {
        self.patient.load(Ordering::Relaxed)
    }

    /// Waits for the next frame and lends it to `take`; false when the peer has closed the
    /// connection between two frames.
    pub(crate) fn receive<T>(
        &self,
        inbox: &mut Inbox,
        take: impl FnOnce(&Frame<'_>) -> Result<T, Failure>,
    ) -> Result<Option<T>, Failure> {
        loop {
            if let Some((frame, length)) = format::first_frame(&inbox.plain[inbox.used..])? {
                let result = take(&frame)?;
                inbox.used += length;
                return Ok(Some(result));
            }
            inbox.plain.drain(..inbox.used);
            inbox.used = 0;
            let got = match (&self.socket).read(&mut inbox.raw) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                got => got.map_err(Failure::Lost)?,
            };
            if got == 0 {
                return match inbox.plain.len() {
                    0 => Ok(None),
                    _ => Err(Failure::Lost(ErrorKind::UnexpectedEof.into())),
                };
            }
            self.received.fetch_add(got as u64, Ordering::Relaxed);
            let Inbox { plain, raw, .. } = inbox;
            self.decrypt(&raw[..got], plain).map_err(Failure::Lost)?;
        }
    }

    fn decrypt(&self, mut raw: &[u8], plain: &mut Vec<u8>) -> io::Result<()> {
        let mut tls = locked(&self.tls);
        while !raw.is_empty() {
            tls.read_tls(&mut raw)?;
            let state = tls.process_new_packets().map_err(io::Error::other)?;
            let length = plain.len();
            plain.resize(length + state.plaintext_bytes_to_read(), 0);
            tls.reader().read_exact(&mut plain[length..])?;
            if state.peer_has_closed() {
                break;
            }
        }
        Ok(())
    }

    /// Says farewell, as well as it still goes, and closes.
    pub(crate) fn close(&self, why: Option<&Failure>) {
        self.patient.store(false, Ordering::Relaxed);
        if let Some(why) = why {
            // What the peer said need not be told to the peer.
            if !matches!(why, Failure::Lost(_) | Failure::Peer(semper_wire::WireError::Aborted(_)))
            {
                let _ = self.socket.set_write_timeout(Some(WRITE));
                let _ = self.send(&format::abort(&why.to_string()));
            }
        }
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self { plain: Vec::with_capacity(FRAME_HEADER), used: 0, raw: vec![0; 256 << 10] }
    }
}

/// The payload of the one frame that may come now.
pub(crate) fn expect(frame: &Frame<'_>, kind: Kind) -> Result<Vec<u8>, Failure> {
    match frame.kind {
        Some(found) if found == kind => Ok(frame.payload.to_vec()),
        Some(Kind::Abort) => Err(format::parse_abort(frame.payload).into()),
        _ => Err(semper_wire::WireError::Protocol("a frame out of turn").into()),
    }
}
