//! The session of the process that serves: what its front end has said, and who is told.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use semper_spare::outbox::Outbox;
use semper_spare::socket;

use super::packet::{Kind, Packet, pack};
use super::progress::{Page, Phase};
use super::transcript::Transcript;
use crate::message::Message;

/// How long to leave alone a socket that cannot be accepted from.
const PAUSE: Duration = Duration::from_millis(100);

/// A request of the front end, and what it was answered: nothing, mostly.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exchange {
    pub request: Message,
    pub answer: Message,
}

/// Everything that the next process has to know of a front end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// Counts messages, connections and disconnections.
    pub sequence: u64,
    pub connection: Option<Arc<OwnedFd>>,
    pub transcript: Transcript,
    /// What the last message was, if it was one of this connection.
    pub last: Option<Exchange>,
}

impl Known {
    /// Follows one packet. The same code brings the state of the process that serves up to date.
    pub(crate) fn follow(&mut self, packet: Packet) {
        let Packet { kind, sequence, mut parts } = packet;
        self.sequence = sequence;
        match kind {
            Kind::Begin => *self = Self { sequence, ..Self::default() },
            Kind::Connected => {
                let connection = parts.pop().and_then(|mut part| part.files.pop());
                *self = Self { sequence, connection, ..Self::default() };
            }
            Kind::Disconnected => *self = Self { sequence, ..Self::default() },
            Kind::Said => {
                for message in &parts {
                    self.transcript.note(message, &Message::default());
                }
            }
            Kind::Exchange | Kind::Last => {
                let answer = parts.pop().unwrap_or_default();
                let request = parts.pop().unwrap_or_default();
                if kind == Kind::Exchange {
                    self.transcript.note(&request, &answer);
                }
                self.last = Some(Exchange { request, answer });
            }
            Kind::Complete => {}
        }
    }

    /// Everything, for whoever knows nothing. `page` shows how far the next message is, `outbox`
    /// whether its answer has gone.
    fn packets(&self, page: &Page, outbox: &Outbox) -> Vec<Packet> {
        let sequence = self.sequence;
        let files = std::iter::once(page.file()).chain(outbox.ends().map(Arc::clone)).collect();
        let mut packets = vec![Packet::with_files(Kind::Begin, sequence, files)];
        if let Some(connection) = &self.connection {
            let files = vec![Arc::clone(connection)];
            packets.push(Packet::with_files(Kind::Connected, sequence, files));
            packets.extend(pack(sequence, self.transcript.everything()));
        }
        if let Some(Exchange { request, answer }) = self.last.clone() {
            packets.push(Packet::new(Kind::Last, sequence, vec![request, answer]));
        }
        packets.push(Packet::new(Kind::Complete, sequence, Vec::new()));
        packets
    }
}

struct State {
    known: Known,
    /// The spares that listen.
    links: Vec<OwnedFd>,
}

/// See the module.
pub(crate) struct Mirror {
    state: Mutex<State>,
    page: Page,
    outbox: Outbox,
}

impl Mirror {
    /// Of a front end that has not come yet.
    ///
    /// # Errors
    /// The system's, when it has no memory or descriptor left.
    pub(crate) fn new() -> io::Result<Self> {
        let page = Page::new()?;
        page.set(0, Phase::Idle);
        let state = Mutex::new(State { known: Known::default(), links: Vec::new() });
        Ok(Self { state, page, outbox: Outbox::new()? })
    }

    /// Goes on from what is known. Nobody is told yet.
    pub(super) fn go_on_from(&self, known: Known) {
        self.page.set(known.sequence, Phase::Idle);
        self.state().known = known;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn page(&self) -> &Page {
        &self.page
    }

    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// How many spares know everything.
    pub(crate) fn followers(&self) -> usize {
        self.prune();
        self.state().links.len()
    }

    /// The number that the next message will have.
    pub(crate) fn next(&self) -> u64 {
        self.state().known.sequence + 1
    }

    fn tell(&self, kind: Kind, parts: Vec<Message>) {
        let mut state = self.state();
        let packet = Packet::new(kind, state.known.sequence + 1, parts);
        // A spare that does not read is let go: it comes again, and is told everything.
        state.links.retain(|link| match packet.send(link) {
            Ok(()) => true,
            Err(error) => {
                log::warn!("a spare does not follow any more error=\"{error}\"");
                false
            }
        });
        state.known.follow(packet);
        if kind != Kind::Exchange {
            self.page.set(state.known.sequence, Phase::Idle);
        }
    }

    /// A front end has connected.
    ///
    /// # Errors
    /// The system's, when it has no descriptor left.
    pub(crate) fn connected(&self, stream: &UnixStream) -> io::Result<()> {
        let file = Arc::new(stream.as_fd().try_clone_to_owned()?);
        self.tell(Kind::Connected, vec![Message { bytes: Vec::new(), files: vec![file] }]);
        Ok(())
    }

    /// It is gone, or is about to be sent away.
    pub(crate) fn disconnected(&self) {
        self.tell(Kind::Disconnected, Vec::new());
    }

    /// A message was carried out, and will be taken and answered.
    pub(crate) fn exchanged(&self, request: &Message, answer: &Message) {
        self.tell(Kind::Exchange, vec![request.clone(), answer.clone()]);
    }

    fn admit(&self, link: OwnedFd) -> io::Result<()> {
        let mut state = self.state();
        for packet in state.known.packets(&self.page, &self.outbox) {
            packet.send(&link)?;
        }
        state.links.push(link);
        Ok(())
    }

    /// Lets go of spares that have ended.
    fn prune(&self) {
        self.state().links.retain(|link| {
            let mut ended = [PollFd::new(link, PollFlags::IN)];
            // A spare says nothing: what there is to read is its end.
            poll(&mut ended, Some(&rustix::event::Timespec::default())).is_ok_and(|n| n == 0)
        });
    }

    /// Tells every spare that comes to the socket at `path`, from a thread of its own.
    ///
    /// # Errors
    /// The system's; the disk can be served, and a spare will take over by a new connection.
    pub(crate) fn listen(self: &Arc<Self>, path: &Path) -> io::Result<()> {
        let listener = socket::listen(path, 4)?;
        let mirror = Arc::clone(self);
        let serve = move || {
            loop {
                let link = socket::accept(&listener);
                mirror.prune();
                let admitted = link.and_then(|link| mirror.admit(link));
                match admitted {
                    Ok(()) => log::info!("a spare follows"),
                    Err(error) => {
                        log::warn!("a spare cannot follow error=\"{error}\"");
                        std::thread::sleep(PAUSE);
                    }
                }
            }
        };
        std::thread::Builder::new().name("session".into()).spawn(serve).map(drop)
    }
}
