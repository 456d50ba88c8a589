//! Stands between the driver library and the backend while they shake hands.
//!
//! The library `virtio-driver` speaks vhost-user like libblkio, which means that it knows no
//! in-flight region, does not notice a closed socket, and does not connect again. The relay adds
//! the three from outside, so that the driver stays the one that others wrote:
//!
//! ```text
//!   virtio-driver ── socket ── relay thread ── socket ── backend
//!         └────────── rings and data in shared memory ──────┘
//! ```
//!
//! Only handshake messages pass through it, no request and no notification: it costs nothing in
//! what is measured.
//!
//! - Where the backend offers INFLIGHT_SHMFD, the relay accepts it, asks for a region before the
//!   first ring is set up, and hands it back, as QEMU does.
//! - When the backend's end closes, `Event::Lost` is sent; or, when asked to, the relay connects
//!   again and repeats the handshake as QEMU would: the same memory, rings, region and eventfds,
//!   with each ring's base at its used index.

mod message;

use message::{Message, request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const PROTOCOL_INFLIGHT_SHMFD: u64 = 1 << 12;

/// How the relay treats the backend.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The backend's socket.
    pub socket: PathBuf,
    /// Queues of the device, for the in-flight region.
    pub queues: u16,
    /// Whether to accept an in-flight region.
    pub inflight: bool,
    /// How long a backend may refuse the connection, and how long it may take for an answer.
    pub patience: Duration,
    /// Whether to connect again after a loss.
    pub reconnect: bool,
}

/// What the relay reports while it runs.
#[derive(Debug)]
pub enum Event {
    /// The in-flight region is in the backend's hands.
    Inflight,
    /// The backend is back after an outage of this length.
    Reconnected(Duration),
    /// The backend is gone for good, for this reason.
    Lost(String),
}

/// A running relay.
pub struct Relay {
    /// Where the driver library connects to.
    pub path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Connects to the backend and starts the thread.
    ///
    /// # Errors
    /// The backend did not accept a connection within the patience.
    pub fn start(settings: Settings, events: Sender<Event>) -> io::Result<Self> {
        let backend = connect(&settings.socket, settings.patience)?;
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let name = format!("semper-load-{}-{number}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        let listener = UnixListener::bind(&path)?;
        let unlink = path.clone();
        let thread = thread::Builder::new().name("relay".into()).spawn(move || {
            let front = listener.accept();
            let _ = std::fs::remove_file(unlink);
            let outcome = front.and_then(|(front, _)| {
                Session { settings, events: events.clone(), backend, log: Vec::new(), asked: false }
                    .run(&front)
            });
            if let Err(error) = outcome {
                let _ = events.send(Event::Lost(error.to_string()));
            }
        })?;
        Ok(Self { path, thread: Some(thread) })
    }

    /// Waits until the driver library has closed its end and the thread has ended.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn connect(socket: &Path, patience: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + patience;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                stream.set_read_timeout(Some(patience))?;
                return Ok(stream);
            }
            // A backend that is being started: not there yet, or bound and not yet listening.
            Err(error)
                if Instant::now() < deadline
                    && matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) =>
            {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
}

struct Session {
    settings: Settings,
    events: Sender<Event>,
    backend: UnixStream,
    /// Everything sent to the backend, in order.
    log: Vec<Message>,
    /// Whether an in-flight region was asked for, or is not wanted.
    asked: bool,
}

impl Session {
    /// Passes messages until the driver library closes its end.
    fn run(&mut self, front: &UnixStream) -> io::Result<()> {
        let mut offered = 0;
        loop {
            if self.wait_readable(front)? {
                let Some(mut message) = Message::receive(front)? else { return Ok(()) };
                match message.request {
                    request::SET_PROTOCOL_FEATURES if self.settings.inflight => {
                        let accepted = message.word(0) | (offered & PROTOCOL_INFLIGHT_SHMFD);
                        message.payload = accepted.to_ne_bytes().to_vec();
                    }
                    request::SET_VRING_NUM if !self.asked => {
                        self.asked = true;
                        if self.settings.inflight && offered & PROTOCOL_INFLIGHT_SHMFD != 0 {
                            self.exchange_inflight(message.half(1) as u16)?;
                        }
                    }
                    _ => {}
                }
                let reply = self.transact(&message)?;
                if message.request == request::GET_PROTOCOL_FEATURES {
                    offered = reply.as_ref().map_or(0, |reply| reply.word(0));
                }
                self.log.push(message);
                if let Some(reply) = reply {
                    reply.send(front)?;
                }
            } else {
                self.reconnect()?;
            }
        }
    }

    /// True: the driver library has something to say. False: the backend is gone.
    fn wait_readable(&self, front: &UnixStream) -> io::Result<bool> {
        loop {
            let mut fds = [
                PollFd::new(front, PollFlags::IN),
                PollFd::new(&self.backend, PollFlags::IN | PollFlags::RDHUP),
            ];
            match poll(&mut fds, None::<&Timespec>) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if !fds[0].revents().is_empty() {
                return Ok(true);
            }
            if !fds[1].revents().is_empty() {
                return Ok(false);
            }
        }
    }

    /// Sends a request to the backend and waits for the answer, if there is one.
    fn transact(&self, message: &Message) -> io::Result<Option<Message>> {
        message.send(&self.backend)?;
        if !message.expects_reply() {
            return Ok(None);
        }
        match Message::receive(&self.backend) {
            Ok(Some(reply)) => Ok(Some(reply)),
            Ok(None) => Err(io::Error::other("the backend closed the connection")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::other(
                format!("the backend does not answer request {}", message.request),
            )),
            Err(error) => Err(error),
        }
    }

    /// GET_INFLIGHT_FD and SET_INFLIGHT_FD: {size u64, offset u64, queues u16, queue size u16}.
    fn exchange_inflight(&mut self, queue_size: u16) -> io::Result<()> {
        let mut payload = vec![0; 24];
        payload[16..18].copy_from_slice(&self.settings.queues.to_ne_bytes());
        payload[18..20].copy_from_slice(&queue_size.to_ne_bytes());
        let get = Message::new(request::GET_INFLIGHT_FD, payload.clone(), Vec::new());
        let region = self
            .transact(&get)?
            .filter(|reply| reply.fds.len() == 1)
            .ok_or_else(|| io::Error::other("the backend gave no in-flight region"))?;
        // Size and offset are the backend's; the rest is ours, as in QEMU.
        payload[..16].copy_from_slice(region.payload.get(..16).ok_or(io::ErrorKind::InvalidData)?);
        let set = Message::new(request::SET_INFLIGHT_FD, payload, region.fds);
        let answer = self.transact(&set)?;
        if answer.is_some_and(|answer| answer.word(0) != 0) {
            return Err(io::Error::other("the backend refused its own in-flight region"));
        }
        // Only the setting is repeated after a loss: the region is ours to keep.
        self.log.push(set);
        let _ = self.events.send(Event::Inflight);
        Ok(())
    }

    fn reconnect(&mut self) -> io::Result<()> {
        if !self.settings.reconnect {
            return Err(io::Error::other("the backend closed the connection"));
        }
        let lost = Instant::now();
        let deadline = lost + self.settings.patience;
        loop {
            self.backend = connect(&self.settings.socket, self.settings.patience)?;
            match self.repeat() {
                Ok(()) => break,
                // It may die during the handshake as well.
                Err(_) if Instant::now() < deadline => {}
                Err(error) => return Err(error),
            }
        }
        let _ = self.events.send(Event::Reconnected(lost.elapsed()));
        Ok(())
    }

    fn repeat(&self) -> io::Result<()> {
        for message in &self.log {
            if message.request == request::SET_VRING_BASE {
                let index = message.half(0);
                let base = u32::from(self.used_index(index)?);
                let payload = [index.to_ne_bytes(), base.to_ne_bytes()].concat();
                self.transact(&Message::new(request::SET_VRING_BASE, payload, Vec::new()))?;
            } else {
                self.transact(message)?;
            }
        }
        Ok(())
    }

    /// Reads `used.idx` of a ring through the memory that the driver library registered.
    fn used_index(&self, queue: u32) -> io::Result<u16> {
        // SET_VRING_ADDR: {index u32, flags u32, descriptors u64, used u64, available u64, log u64}
        let used = self
            .log
            .iter()
            .rfind(|message| message.request == request::SET_VRING_ADDR && message.half(0) == queue)
            .map(|message| message.word(2))
            .ok_or_else(|| io::Error::other("a ring has no address"))?;
        // ADD_MEM_REG: {padding u64, guest address u64, size u64, user address u64, offset u64}
        let region = self.log.iter().find(|message| {
            message.request == request::ADD_MEM_REG
                && used.checked_sub(message.word(3)).is_some_and(|at| at < message.word(2))
        });
        let region = region.ok_or_else(|| io::Error::other("a ring lies in no region"))?;
        let offset = used - region.word(3) + region.word(4) + 2;
        let mut index = [0; 2];
        let fd = region.fds.first().ok_or_else(|| io::Error::other("a region has no memory"))?;
        rustix::io::pread(fd.as_fd(), &mut index, offset)?;
        Ok(u16::from_le_bytes(index))
    }
}
