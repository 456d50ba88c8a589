//! The connection to the front end, which outlives the process that serves.
//!
//! ```text
//!   front end ═══ connection ═══ the process that serves ──"session" socket──► its spares
//!                                   │ Line: serves it       Mirror │             │ Follower
//!                                   └── progress page (shared) ────┴─────────────┘
//! ```
//!
//! A spare holds duplicates of the connection and of all files that came over it, and knows what
//! the front end has said. When the image's lock comes to the spare, it goes on on the same
//! connection: the front end notices nothing, and need not be one that connects again. Where a spare
//! cannot be sure ([`resume`], [`Transcript::can_be_continued`]) it ends the connection, and the
//! front end connects as it would to any new process.
//!
//! The image's descriptor is never passed on: a duplicate would share the lock.

pub(crate) mod follower;
pub(crate) mod mirror;
#[cfg(test)]
mod model;
pub(crate) mod packet;
pub(crate) mod progress;
pub(crate) mod relay;
pub(crate) mod resume;
pub(crate) mod transcript;

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::channel::Channel;
use crate::crash::behind;
use crate::device::Device;
use crate::message::{Message, peek, peek_request, send, take};
use crate::postcopy;
use crate::state::{self, Shared, mark};
use follower::{Follower, Inheritance};
use mirror::{Exchange, Mirror};
use progress::Phase;
use relay::{Steps, give_answer, serve_one};
use resume::{Verdict, Waiting, judge};
use transcript::Transcript;

/// What a pipe takes as a whole or not at all (PIPE_BUF).
const BY_OUTBOX: usize = 4096;

/// Whether an answer can go by way of the outbox; files do not.
fn goes_by_outbox(answer: &Message) -> bool {
    answer.files.is_empty() && answer.bytes.len() <= BY_OUTBOX
}

/// A front end's connection, and the device at its other end.
///
/// The parser (`vhost`) has one end of a pair of sockets of this process; it gets a message when
/// all of the message is there, and what it answers goes on when the spares know of it.
pub(crate) struct Line<'a> {
    stream: UnixStream,
    inner: UnixStream,
    handler: BackendReqHandler<Mutex<Device>>,
    device: Arc<Mutex<Device>>,
    mirror: &'a Mirror,
    /// The number of the request in hand.
    request: u32,
    /// Another connection has begun the postcopy: this one's parser takes the end for an error.
    ends_postcopy: bool,
}

impl<'a> Line<'a> {
    /// # Errors
    /// The system's, when it has no descriptor left.
    pub(crate) fn new(
        stream: UnixStream,
        device: &Arc<Mutex<Device>>,
        mirror: &'a Mirror,
    ) -> io::Result<Self> {
        let (inner, parser) = UnixStream::pair()?;
        let handler = BackendReqHandler::from_stream(parser, Arc::clone(device));
        let device = Arc::clone(device);
        Ok(Self { stream, inner, handler, device, mirror, request: 0, ends_postcopy: false })
    }

    /// Waits for the next message and serves it.
    ///
    /// # Errors
    /// Why the connection has to end.
    pub(crate) fn serve(&mut self) -> Result<(), Error> {
        serve_one(self)
    }

    /// As [`Line::serve`], where a postcopy goes on that this connection has not begun.
    ///
    /// # Errors
    /// Why the connection has to end.
    pub(crate) fn serve_inherited(&mut self) -> Result<(), Error> {
        self.ends_postcopy = true;
        if postcopy::wait_message(&self.stream) {
            return serve_one(self);
        }
        // The end may never be told.
        self.device.lock().unwrap_or_else(PoisonError::into_inner).look_for_end()
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Has the device hear again what the front end has said to another process.
    fn repeat(&mut self, transcript: &Transcript) -> Result<(), Error> {
        // Also tells the parser what it may be asked for.
        let first = Message::new(FrontendReq::GET_FEATURES as u32, &[]);
        for message in std::iter::once(first).chain(transcript.messages()) {
            self.handle(&message).1?;
        }
        Ok(())
    }

    /// What the parser has answered; nothing, mostly.
    fn answer_of_parser(&self) -> Result<Message, Error> {
        match peek(&self.inner, false) {
            Ok(Some(answer)) => {
                take(&self.inner, answer.bytes.len()).map_err(Error::SocketError)?;
                Ok(answer)
            }
            Ok(None) => Err(Error::Disconnected),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Message::default()),
            Err(error) => Err(Error::SocketError(error)),
        }
    }
}

impl Steps for Line<'_> {
    type Error = Error;

    fn see(&mut self) -> Result<Message, Error> {
        match peek_request(&self.stream, true) {
            Ok(Some(message)) => {
                self.request = message.request();
                behind("see", self.request);
                Ok(message)
            }
            Ok(None) => Err(Error::Disconnected),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(Error::Disconnected)
            }
            Err(error) => Err(Error::SocketError(error)),
        }
    }

    fn begin(&mut self) -> u64 {
        let number = self.mirror.next();
        self.mirror.page().set(number, Phase::Handling);
        behind("begin", self.request);
        number
    }

    fn handle(&mut self, message: &Message) -> (Message, Result<(), Error>) {
        if let Some(channel) = Channel::of(message) {
            self.device.lock().unwrap_or_else(PoisonError::into_inner).set_channel(channel);
        }
        if self.ends_postcopy && message.request() == FrontendReq::POSTCOPY_END as u32 {
            let ended = self.device.lock().unwrap_or_else(PoisonError::into_inner).end_postcopy();
            return match ended {
                Ok(()) => (postcopy::answer_to_end(), Ok(())),
                error => (Message::default(), error),
            };
        }
        if let Err(error) = send(&self.inner, message, true) {
            return (Message::default(), Err(Error::SocketError(error)));
        }
        let handled = self.handler.handle_request();
        behind("handle", self.request);
        match self.answer_of_parser() {
            Ok(answer) => (answer, handled),
            Err(error) => (Message::default(), handled.and(Err(error))),
        }
    }

    fn tell(&mut self, message: &Message, answer: &Message) {
        self.mirror.exchanged(message, answer);
        behind("tell", self.request);
    }

    fn taking(&mut self, number: u64) {
        self.mirror.page().set(number, Phase::Taking);
        behind("taking", self.request);
    }

    fn take(&mut self, message: &Message) -> Result<(), Error> {
        take(&self.stream, message.bytes.len()).map_err(Error::SocketError)?;
        behind("take", self.request);
        Ok(())
    }

    fn answering(&mut self, number: u64, answer: &Message) -> Result<(), Error> {
        let mut phase = Phase::Sending;
        if goes_by_outbox(answer) {
            self.mirror.outbox().put(&answer.bytes).map_err(Error::SocketError)?;
            behind("put", self.request);
            phase = Phase::Answering;
        }
        self.mirror.page().set(number, phase);
        behind("answering", self.request);
        Ok(())
    }

    fn answer(&mut self, answer: &Message) -> Result<(), Error> {
        let sent = if goes_by_outbox(answer) {
            self.mirror.outbox().send(&self.stream)
        } else {
            send(&self.stream, answer, true)
        };
        sent.map_err(Error::SocketError)?;
        behind("answer", self.request);
        Ok(())
    }

    fn done(&mut self, number: u64) {
        self.mirror.page().set(number, Phase::Idle);
    }
}

/// How a process stands to the session of its disk.
#[derive(Default)]
pub(crate) struct Session {
    socket: Option<PathBuf>,
    follower: Option<Arc<Follower>>,
    mirror: OnceLock<Arc<Mirror>>,
    inheritance: Mutex<Option<Inheritance>>,
}

impl Session {
    /// With the socket at which spares follow; `follower` in a spare.
    pub(crate) fn new(socket: PathBuf, follower: Option<Arc<Follower>>) -> Self {
        Self { socket: Some(socket), follower, ..Self::default() }
    }

    /// Whether spares follow.
    pub(crate) fn is_on(&self) -> bool {
        self.socket.is_some()
    }

    /// Serves from now on, with a mirror that nobody was told of; to be called with the image's
    /// lock held, if there is to be one.
    pub(crate) fn serve(&self, mirror: Mirror) -> Arc<Mirror> {
        let inheritance = self.follower.as_ref().and_then(|follower| follower.inherit());
        if let Some(it) = &inheritance {
            mirror.go_on_from(it.known.clone());
        }
        *self.inheritance.lock().unwrap_or_else(PoisonError::into_inner) = inheritance;
        Arc::clone(self.mirror.get_or_init(|| Arc::new(mirror)))
    }

    /// Lets spares follow.
    pub(crate) fn listen(&self, mirror: &Arc<Mirror>) {
        if let Some(socket) = &self.socket
            && let Err(error) = mirror.listen(socket)
        {
            log::error!("no spare can follow socket={} error=\"{error}\"", socket.display());
        }
    }

    /// Goes on where the process before stood. `None`: the front end has been sent away, if there
    /// was one, and will connect again.
    pub(crate) fn go_on<'a>(
        &self,
        shared: &Shared,
        device: &Arc<Mutex<Device>>,
        mirror: &'a Arc<Mirror>,
    ) -> Option<Line<'a>> {
        let inheritance = self.inheritance.lock().unwrap_or_else(PoisonError::into_inner).take();
        let line = inheritance.and_then(|it| go_on(&it, shared, device, mirror));
        if line.is_none() {
            mirror.disconnected();
        }
        line
    }

    /// For people and for the agent.
    pub(crate) fn name(&self) -> &'static str {
        if !self.is_on() {
            return "off";
        }
        match (self.mirror.get(), &self.follower) {
            (Some(mirror), _) if mirror.followers() > 0 => "followed",
            (Some(_), _) => "alone",
            (None, Some(follower)) if follower.follows() => "following",
            (None, _) => "seeking",
        }
    }
}

fn go_on<'a>(
    inheritance: &Inheritance,
    shared: &Shared,
    device: &Arc<Mutex<Device>>,
    mirror: &'a Mirror,
) -> Option<Line<'a>> {
    let connection = inheritance.known.connection.as_ref()?;
    let stream = UnixStream::from(connection.try_clone().ok()?);
    mark(&shared.timeline.accepted);
    shared.set_phase(state::Phase::Connected);
    // Before a queue runs: whoever sees an answer to the guest may ask.
    shared.resumed.store(true, Ordering::Relaxed);
    let line = stream.try_clone().map_err(|error| error.to_string()).and_then(|stream| {
        let line = Line::new(stream, device, mirror).map_err(|error| error.to_string())?;
        // The front end is told of a change, and of nothing else: QEMU before 8.0 asks back at once,
        // also while it waits for another answer.
        *device.lock().unwrap_or_else(PoisonError::into_inner).capacity_told() =
            inheritance.known.transcript.capacity();
        catch_up(line, inheritance)
    });
    match line {
        Ok(line) => Some(line),
        Err(cause) => {
            log::info!("the front end has to connect again because=\"{cause}\"");
            // It may be gone already.
            let _ = stream.shutdown(Shutdown::Both);
            shared.resumed.store(false, Ordering::Relaxed);
            device.lock().unwrap_or_else(PoisonError::into_inner).disconnect();
            shared.set_phase(state::Phase::Listening);
            None
        }
    }
}

fn catch_up<'a>(mut line: Line<'a>, inheritance: &Inheritance) -> Result<Line<'a>, String> {
    let Inheritance { known, progress, outbox } = inheritance;
    known.transcript.can_be_continued()?;
    let waiting = waiting(&line.stream, known.last.as_ref()).map_err(|error| error.to_string())?;
    let unsent = outbox.is_empty().map_or(true, |empty| !empty);
    let verdict = judge(*progress, known.sequence, known.last.as_ref(), waiting, unsent);
    let Exchange { request, answer } = known.last.clone().unwrap_or_default();
    // Before the rest: the front end waits for its answer with all its devices.
    match verdict {
        Verdict::GoOn => {}
        Verdict::GiveUp(cause) => return Err(cause.to_owned()),
        Verdict::Doubt if has_unread(&line.stream) => {}
        Verdict::Doubt => {
            return Err("nobody can tell whether an answer has arrived".to_owned());
        }
        Verdict::Send => outbox.send(&line.stream).map_err(|error| error.to_string())?,
        Verdict::Take => line
            .take(&request)
            .and_then(|()| give_answer(&mut line, known.sequence, &answer))
            .map_err(|error| error.to_string())?,
        Verdict::Answer => {
            give_answer(&mut line, known.sequence, &answer).map_err(|error| error.to_string())?;
        }
    }
    line.repeat(&known.transcript).map_err(|error| format!("what it has said: {error}"))?;
    log::info!("goes on with the front end messages={} verdict={verdict:?}", known.sequence);
    Ok(line)
}

fn waiting(stream: &UnixStream, last: Option<&Exchange>) -> io::Result<Waiting> {
    match peek_request(stream, false) {
        // Its end comes by itself.
        Ok(None) => Ok(Waiting::Other),
        Ok(Some(message)) => {
            let same = last.is_some_and(|last| last.request.bytes == message.bytes);
            Ok(if same { Waiting::Same } else { Waiting::Other })
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Waiting::Nothing),
        Err(error) => Err(error),
    }
}

/// Whether the front end has not read everything that it was sent.
fn has_unread(stream: &UnixStream) -> bool {
    let mut unread: libc::c_int = 0;
    // SAFETY: the kernel writes one int.
    let asked = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
    asked == 0 && unread > 0
}
