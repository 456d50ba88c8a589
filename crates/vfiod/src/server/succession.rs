//! What outlives this process, and how the next one goes on.
//!
//! ```text
//!   QEMU ═══ connections ═══ who serves ──packets (`link`): files──► its spare
//!                               └── ledger, page of registers, outbox (shared) ──┘
//! ```
//!
//! A message of QEMU stays in its connection until everything that follows from it is kept or told.
//! Then, in this order, its answer is put into the outbox, it is taken, and the answer goes. So the next
//! process finds at any instant either the message, which it carries out (again: no message does harm
//! twice), or its answer in the outbox, or nothing that anybody waits for.
//!
//! An answer with a file cannot go that way. There is one, which QEMU asks for while it starts.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use semper_device::dirty::{DirtySource, Parsed};
use semper_device::ledger::{Cell, Ledger};
use semper_device::page::Page;
use semper_device::{Bus, Route};
use semper_epoch::{Claim, Id};
use semper_spare::outbox::{self, Outbox};
use serde::{Deserialize, Serialize};

use super::{Phase, Server};
use crate::control::{Dirty, from_hex, to_hex};
use crate::failure::{Failure, system};
use crate::inbox::{Port, Way};
use crate::link::{self, Kind, Packet};
use crate::message::{Command, HEADER, Message, send, take, waiting};
use crate::tenure::Tenure;

/// Marks in the ledger: which answer is in the outbox, and which one is sent without it. The port, the
/// number of the message, and a bit that says that there is one.
const IN_OUTBOX: usize = 0;
const BESIDE: usize = 1;
const SET: u64 = 1 << 63;
/// In which QEMU, which has its answer, asks the next question of its start.
const SOON: Duration = Duration::from_millis(500);

/// The mediator's own state, but for what comes with files. Fields may be added with a default.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    config: String,
    shim: String,
    phase: String,
    captured: Option<Dirty>,
    owns_image: bool,
    claim: Option<(u64, String)>,
    last_id: u16,
}

/// See the module.
pub(crate) struct Succession {
    ledger: Arc<Ledger>,
    outbox: Outbox,
    /// Where QEMU is still to connect.
    listeners: [Option<UnixListener>; 2],
    spare: Option<OwnedFd>,
    ready: bool,
}

/// A copy for who reads, and one for who comes after this process.
fn copy(listener: Option<&UnixListener>) -> io::Result<Option<UnixListener>> {
    listener.map(UnixListener::try_clone).transpose()
}

fn mark(port: Port, id: u16) -> u64 {
    SET | (port as u64) << 16 | u64::from(id)
}

fn marked(mark: u64) -> Option<(Port, u16)> {
    let port = if mark >> 16 & 1 == 0 { Port::Device } else { Port::Shim };
    (mark & SET != 0).then_some((port, mark as u16))
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Waiting => "waiting",
        Phase::Running => "running",
        Phase::Quiesced => "quiesced",
        Phase::Incoming { imported: false } => "incoming",
        Phase::Incoming { imported: true } => "imported",
    }
}

fn phase_of(name: &str) -> Option<Phase> {
    [
        Phase::Waiting,
        Phase::Running,
        Phase::Quiesced,
        Phase::Incoming { imported: false },
        Phase::Incoming { imported: true },
    ]
    .into_iter()
    .find(|phase| phase_name(*phase) == name)
}

/// In the process that serves.
impl Server {
    /// From now on another process can go on. To be called before anything is done.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn be_followed(&mut self, listeners: [Option<&UnixListener>; 2]) -> io::Result<()> {
        let Some(words) = self.device.ledger_words() else {
            log::info!("no spare can go on with this kind of device kind={}", self.device.kind());
            return Ok(());
        };
        let ledger = Arc::new(Ledger::new(words)?);
        self.device.keep_in(Arc::clone(&ledger));
        let [device, shim] = listeners;
        self.succession = Some(Succession {
            ledger,
            outbox: Outbox::new()?,
            listeners: [copy(device)?, copy(shim)?],
            spare: None,
            ready: false,
        });
        self.keep();
        Ok(())
    }

    /// Puts the mediator's own state where the next process finds it.
    pub(super) fn keep(&self) {
        let Some(succession) = &self.succession else { return };
        let claim = self.tenure.as_ref().map(Tenure::claim);
        let kept = Kept {
            config: to_hex(self.config.used()),
            shim: to_hex(self.shim.config.used()),
            phase: phase_name(self.phase).to_owned(),
            captured: self.captured,
            owns_image: self.tenure.as_ref().is_some_and(Tenure::is_held),
            claim: claim.and_then(|claim| claim.epoch.zip(claim.id)),
            last_id: self.dma.last_id(),
        };
        // Strings, numbers and booleans: nothing that JSON does not have, and short.
        let text = serde_json::to_string(&kept).unwrap_or_default();
        succession.ledger.put(Cell::Mediator, &text);
    }

    /// For people and for the agent.
    pub(super) fn spare(&self) -> &'static str {
        match &self.succession {
            None => "off",
            Some(Succession { spare: None, .. }) => "alone",
            Some(Succession { ready: false, .. }) => "following",
            Some(Succession { ready: true, .. }) => "ready",
        }
    }

    /// A spare is here: it is told everything.
    pub(super) fn admit(&mut self, link: OwnedFd) {
        match self.tell_everything(&link) {
            Ok(()) => {
                log::info!("a spare follows");
                if let Some(succession) = &mut self.succession {
                    (succession.spare, succession.ready) = (Some(link), false);
                }
            }
            Err(error) => {
                log::warn!("a spare cannot follow error=\"{error}\"");
                // It would wait for the rest for ever, and no other one would be admitted.
                let _ = rustix::net::shutdown(&link, rustix::net::Shutdown::Both);
            }
        }
    }

    fn tell_everything(&self, link: &OwnedFd) -> io::Result<()> {
        let succession = self.succession.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: the page, and so its file, lives as long as the server.
        let page = unsafe { BorrowedFd::borrow_raw(self.page.fd()) };
        let [out, into] = succession.outbox.ends();
        let mut files = vec![page, succession.ledger.as_fd(), out.as_fd(), into.as_fd()];
        files.extend(succession.listeners.iter().flatten().map(AsFd::as_fd));
        let which = [0, 1].map(|port| u8::from(succession.listeners[port].is_some()));
        link::send(link, (Kind::Begin, Port::Device, 0), &which, &files)?;
        for port in [Port::Device, Port::Shim] {
            if let Some(stream) = self.stream(port) {
                link::send(link, (Kind::Stream, port, 0), &[], &[stream.as_fd()])?;
            }
        }
        let say = |command: Command, body: &[u8], file: Option<BorrowedFd<'_>>| {
            let files: Vec<_> = file.into_iter().collect();
            link::send(link, (Kind::Message, Port::Device, command as u16), body, &files)
        };
        for (body, file) in self.dma.handed_over() {
            say(Command::DmaMap, body, Some(file))?;
        }
        for (body, file) in self.dma.interrupts.handed_over() {
            say(Command::SetIrqs, &body, file)?;
        }
        link::send(link, (Kind::Complete, Port::Device, 0), &[], &[])
    }

    pub(super) fn spare_is_ready(&mut self) {
        if let Some(succession) = self.succession.as_mut().filter(|it| it.spare.is_some()) {
            succession.ready = true;
            log::info!("a spare is ready");
        }
    }

    pub(super) fn forget_spare(&mut self) {
        if let Some(succession) = &mut self.succession {
            (succession.spare, succession.ready) = (None, false);
        }
    }

    /// An orderly end: nobody is to go on.
    pub(super) fn let_spare_end(&mut self) {
        self.tell((Kind::End, Port::Device, 0), &[], &[]);
    }

    fn tell(&mut self, what: (Kind, Port, u16), body: &[u8], files: &[BorrowedFd<'_>]) {
        let link = self.succession.as_ref().and_then(|succession| succession.spare.as_ref());
        if let Some(Err(error)) = link.map(|link| link::send(link, what, body, files)) {
            self.give_up_spare(&error);
        }
    }

    /// One that was not told something: it ends, and another one is told everything.
    fn give_up_spare(&mut self, error: &io::Error) {
        log::warn!("a spare does not follow any more error=\"{error}\"");
        let link = self.succession.as_ref().and_then(|succession| succession.spare.as_ref());
        if let Some(link) = link {
            // Its end is told by the thread that listens to it.
            let _ = rustix::net::shutdown(link, rustix::net::Shutdown::Both);
        }
        self.forget_spare();
    }

    pub(super) fn tell_of_stream(&mut self, port: Port, stream: &UnixStream) {
        if let Some(succession) = &mut self.succession {
            succession.listeners[port as usize] = None;
        }
        self.tell((Kind::Stream, port, 0), &[], &[stream.as_fd()]);
    }

    /// Files that a message has brought, of which a spare is to have its own.
    pub(super) fn copies_for_spare(
        &mut self,
        port: Port,
        command: Option<Command>,
        files: &[OwnedFd],
    ) -> Vec<OwnedFd> {
        let brings = matches!(command, Some(Command::DmaMap | Command::SetIrqs));
        let followed = self.succession.as_ref().is_some_and(|it| it.spare.is_some());
        if !brings || !followed || port != Port::Device {
            return Vec::new();
        }
        let copies: io::Result<_> = files.iter().map(OwnedFd::try_clone).collect();
        copies.unwrap_or_else(|error| {
            // Without its file a message says something else: that a range of memory is none.
            self.give_up_spare(&error);
            Vec::new()
        })
    }

    /// A message was carried out.
    pub(super) fn tell_of_message(
        &mut self,
        port: Port,
        command: Command,
        body: &[u8],
        files: Vec<OwnedFd>,
    ) {
        match command {
            Command::DmaMap | Command::DmaUnmap | Command::SetIrqs if port == Port::Device => {
                let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                self.tell((Kind::Message, port, command as u16), body, &files);
            }
            Command::RegionWrite | Command::Reset => self.keep(),
            _ => {}
        }
    }

    /// Takes a message whose answer nobody waits for.
    pub(super) fn consume(&self, stream: Option<&UnixStream>, len: usize) {
        if let Some(Err(error)) = stream.map(|stream| take(stream, len)) {
            // Its end is told by the thread that reads.
            log::warn!("a message cannot be taken error=\"{error}\"");
        }
    }

    /// Takes a message and answers it, so that a death in between is no loss.
    pub(super) fn give_answer(
        &self,
        port: Port,
        stream: &UnixStream,
        reply: &Message,
        file: Option<RawFd>,
        len: usize,
    ) -> io::Result<()> {
        // SAFETY: a descriptor of the page's, which lives as long as the server.
        let file = file.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
        let Some(succession) = &self.succession else {
            take(stream, len)?;
            return send(stream, reply, file);
        };
        let bytes = reply.bytes();
        if file.is_none() && bytes.len() <= outbox::MOST {
            succession.ledger.mark(IN_OUTBOX).store(mark(port, reply.id), Ordering::Release);
            succession.outbox.put(&bytes)?;
            take(stream, len)?;
            return succession.outbox.send(stream);
        }
        succession.ledger.mark(BESIDE).store(mark(port, reply.id), Ordering::Release);
        send(stream, reply, file)?;
        take(stream, len)?;
        succession.ledger.mark(BESIDE).store(0, Ordering::Release);
        Ok(())
    }
}

/// In a spare, and in the process that it becomes.
impl Server {
    /// What who serves has told. Says whether that was all that there was before.
    ///
    /// # Errors
    /// A sentence: this process cannot go on with that.
    pub(crate) fn follow(&mut self, packet: Packet) -> Result<bool, String> {
        let Packet { kind, port, command, body, files } = packet;
        match kind {
            Kind::Begin => self.begin_to_follow(&body, files)?,
            Kind::Stream => {
                let stream = files.into_iter().next().ok_or("a connection is missing")?;
                self.streams[port as usize] = Some(Arc::new(stream.into()));
                if let Some(succession) = &mut self.succession {
                    succession.listeners[port as usize] = None;
                }
            }
            Kind::Message => {
                let command = Command::of(command).ok_or("a message is of another version")?;
                self.serve(port, command, &body, files)
                    .map(drop)
                    .map_err(|errno| format!("a message is refused here, errno {errno}"))?;
            }
            Kind::Complete => return Ok(true),
            Kind::End => {}
        }
        Ok(false)
    }

    fn begin_to_follow(&mut self, which: &[u8], files: Vec<OwnedFd>) -> Result<(), String> {
        let told = |error: io::Error| format!("what was handed over cannot be used: {error}");
        let mut files = files.into_iter();
        let mut next = || files.next().ok_or("a file is missing");
        self.page = Page::of(File::from(next()?), self.window.direct.unwrap_or(0)).map_err(told)?;
        let ledger = Arc::new(Ledger::open(File::from(next()?)).map_err(told)?);
        if self.device.ledger_words() != Some(ledger.words()) {
            return Err("what was kept is of another version".to_owned());
        }
        let outbox = Outbox::of(Arc::new(next()?), Arc::new(next()?));
        let mut listener = |port: usize| match which.get(port) {
            Some(1) => next().map(|file| Some(UnixListener::from(file))),
            _ => Ok(None),
        };
        let listeners = [listener(0)?, listener(1)?];
        self.device.keep_in(Arc::clone(&ledger));
        self.succession = Some(Succession { ledger, outbox, listeners, spare: None, ready: false });
        Ok(())
    }

    /// Goes on where the process that this one has followed has died. Gives how QEMU comes to each port.
    ///
    /// # Errors
    /// [`Failure`]: nobody goes on.
    pub(crate) fn take_over(&mut self) -> Result<[Option<Way>; 2], Failure> {
        let lost = |what: String| Failure::Succession(what);
        let succession = self.succession.as_ref();
        let ledger = succession.map(|it| Arc::clone(&it.ledger));
        let ledger = ledger.ok_or_else(|| lost("nothing was handed over".to_owned()))?;
        let kept: Kept = ledger
            .get(Cell::Mediator)
            .and_then(|text| serde_json::from_str(&text).ok())
            .ok_or_else(|| lost("what was kept is of another version".to_owned()))?;
        // QEMU waits for it with all that it has.
        self.end_answers(&ledger).map_err(system("answer QEMU"))?;
        let hex = |text: &str| from_hex(text).unwrap_or_default();
        self.config.take_used(&hex(&kept.config));
        self.shim.config.take_used(&hex(&kept.shim));
        self.dma.master = self.config.is_master();
        self.phase = phase_of(&kept.phase).ok_or_else(|| lost("an unknown phase".to_owned()))?;
        if let Some(stream) = self.stream(Port::Device).map(Arc::clone) {
            self.dma.connect(stream);
        }
        self.dma.go_on_behind(kept.last_id);
        if let Some(tenure) = &mut self.tenure {
            let claim =
                kept.claim.and_then(|(epoch, id)| Id::from_hex(&id).map(|id| Claim { epoch, id }));
            tenure.inherit(kept.owns_image, claim).map_err(lost)?;
            if kept.owns_image {
                tenure.take()?;
            }
        }
        self.device.hold(true);
        self.device.recover(&self.page).map_err(lost)?;
        if let Some(dirty) = kept.captured {
            let tracks = dirty != Dirty::None;
            let source = tracks.then(|| Box::<Parsed>::default() as Box<dyn DirtySource>);
            self.dma.track(source);
            let mediated = dirty == Dirty::Mediated;
            self.dma.take_route(if mediated { Route::Mediated } else { Route::Direct });
            if dirty == Dirty::Touch {
                // Which pages the dead process has noted is not known here.
                let memory = Arc::clone(self.dma.memory());
                memory.specs().for_each(|spec| self.dma.wrote(spec.guest_addr, spec.size));
            }
            self.capture.set(true);
            self.captured = kept.captured;
            // Rounds begin anew: which of them has arrived is not known here.
            self.note_registers();
        }
        if matches!(self.phase, Phase::Waiting | Phase::Running) {
            self.device.hold(false);
            // Which of the interrupts was made, nobody knows.
            self.dma.quiet = false;
            for vector in self.device.owed() {
                self.dma.interrupt(vector);
            }
        } else {
            self.dma.quiet = true;
        }
        self.resumed = true;
        self.keep();
        let mut ways = [None, None];
        for port in [Port::Device, Port::Shim] {
            let listener = self.succession.as_ref().map(|it| &it.listeners[port as usize]);
            ways[port as usize] = match (self.stream(port), listener) {
                (Some(stream), _) => Some(Way::Stream(Arc::clone(stream))),
                (None, Some(listener)) => {
                    copy(listener.as_ref()).map_err(system("listen for QEMU"))?.map(Way::Listener)
                }
                (None, None) => None,
            };
        }
        Ok(ways)
    }

    /// Sends the answer that the dead process has left, if there is one.
    fn end_answers(&self, ledger: &Ledger) -> io::Result<()> {
        let Some(succession) = &self.succession else { return Ok(()) };
        let find = |index: usize| {
            let (port, id) = marked(ledger.mark(index).load(Ordering::Acquire))?;
            self.stream(port).map(|stream| (stream, id))
        };
        let unsent = !succession.outbox.is_empty()?;
        if let Some((stream, id)) = find(IN_OUTBOX).filter(|_| unsent) {
            // It was not taken yet; the answer to another message is not there before that.
            if let Some((there, len)) = first(stream)
                && there == id
            {
                take(stream, len)?;
            }
            succession.outbox.send(stream)?;
        }
        if let Some((stream, id)) = find(BESIDE) {
            // QEMU asks for more at once if it has its answer, and else it waits for one.
            let begun = Instant::now();
            while begun.elapsed() < SOON
                && let Some((there, len)) = first(stream)
                && there == id
            {
                if rustix::io::ioctl_fionread(stream)? > len as u64 {
                    take(stream, len)?;
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            ledger.mark(BESIDE).store(0, Ordering::Release);
        }
        Ok(())
    }
}

/// The number and the length of the request that waits in a connection.
fn first(stream: &UnixStream) -> Option<(u16, usize)> {
    waiting(stream).map(|(id, len)| (id, HEADER.max(len)))
}
