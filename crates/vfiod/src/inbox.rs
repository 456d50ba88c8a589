//! What the device's thread is told, from all others: one queue, and an eventfd that wakes it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use semper_control::Answer;
use semper_spare::socket;

use crate::control::Request;
use crate::message::{Message, look};

/// Messages that may wait; who sends more waits as well.
const WAITING: usize = 256;

/// Which connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Port {
    Device = 0,
    Shim = 1,
}

/// Where a port's client comes from.
pub(crate) enum Way {
    /// It is still to connect.
    Listener(UnixListener),
    /// It is connected.
    Stream(Arc<UnixStream>),
}

/// What happened.
pub(crate) enum Event {
    Connected(Port, Arc<UnixStream>, Sender<()>),
    /// It stays in the connection until it is taken; who read it waits to be told to go on, by the
    /// sender that came with the connection.
    Message(Port, Message),
    /// QEMU has ended the connection, or what came was no message.
    Gone(Port),
    Control(Request, Sender<Answer>),
    /// A spare follows.
    Spare(OwnedFd),
    /// It could go on.
    SpareReady,
    /// It does not follow any more.
    SpareGone,
    /// A signal asks for an orderly end.
    End,
}

/// Puts events into the queue.
#[derive(Clone)]
pub(crate) struct Teller {
    events: SyncSender<Event>,
    waker: Arc<File>,
}

/// The queue's other end.
pub(crate) struct Inbox {
    events: Receiver<Event>,
    waker: Arc<File>,
}

/// A queue.
///
/// # Errors
/// The system's, when there is no descriptor left.
pub(crate) fn inbox() -> io::Result<(Teller, Inbox)> {
    // SAFETY: no preconditions; the result is checked and then owned.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let waker = Arc::new(unsafe { File::from_raw_fd(fd) });
    let (sender, events) = sync_channel(WAITING);
    Ok((Teller { events: sender, waker: Arc::clone(&waker) }, Inbox { events, waker }))
}

impl Teller {
    /// Tells; false when nobody listens any more.
    pub(crate) fn tell(&self, event: Event) -> bool {
        let told = self.events.send(event).is_ok();
        // A full counter wakes as well.
        let _ = (&*self.waker).write(&1u64.to_ne_bytes());
        told
    }

    /// Asks for the answer to a line of the control socket.
    pub(crate) fn ask(&self, request: Request) -> Option<Answer> {
        let (sender, answer) = channel();
        self.tell(Event::Control(request, sender)).then(|| answer.recv().ok()).flatten()
    }

    /// Accepts the one client of a port, and tells of all its messages, in a thread.
    ///
    /// # Errors
    /// The system's, when there is no thread left.
    pub(crate) fn read(self, port: Port, way: Way) -> io::Result<()> {
        let name = match port {
            Port::Device => "device",
            Port::Shim => "shim",
        };
        let run = move || self.serve(port, way);
        std::thread::Builder::new().name(name.into()).spawn(run).map(drop)
    }

    /// Tells of spares that come, one at a time, in a thread.
    ///
    /// # Errors
    /// The system's, when there is no thread left.
    pub(crate) fn admit_spares(self, listener: OwnedFd) -> io::Result<()> {
        let run = move || {
            loop {
                let admitted = socket::accept(&listener)
                    .and_then(|link| link.as_fd().try_clone_to_owned().map(|copy| (link, copy)));
                let (link, copy) = match admitted {
                    Ok(links) => links,
                    Err(error) => {
                        log::warn!("a spare cannot follow error=\"{error}\"");
                        std::thread::sleep(Duration::from_millis(100));
                        continue;
                    }
                };
                if !self.tell(Event::Spare(copy)) {
                    return;
                }
                // One byte says that it is ready; then comes its end.
                let mut link = File::from(link);
                while link.read(&mut [0]).is_ok_and(|len| len > 0) {
                    self.tell(Event::SpareReady);
                }
                self.tell(Event::SpareGone);
            }
        };
        std::thread::Builder::new().name("spares".into()).spawn(run).map(drop)
    }

    fn serve(&self, port: Port, way: Way) {
        let stream = match way {
            Way::Stream(stream) => stream,
            Way::Listener(listener) => loop {
                match listener.accept() {
                    Ok((stream, _)) => break Arc::new(stream),
                    Err(error) => {
                        log::warn!("cannot accept a client error=\"{error}\"");
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
            },
        };
        let (go, may_go) = channel();
        if !self.tell(Event::Connected(port, Arc::clone(&stream), go)) {
            return;
        }
        let mut room = Vec::new();
        loop {
            match look(&stream, &mut room) {
                Ok(Some(message)) => {
                    if !self.tell(Event::Message(port, message)) || may_go.recv().is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    log::warn!("the connection is given up port={port:?} error=\"{error}\"");
                    break;
                }
            }
        }
        self.tell(Event::Gone(port));
    }
}

impl Inbox {
    /// The next event, if there is one.
    pub(crate) fn next(&self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// Sleeps until there is an event, or the device wakes it by an eventfd of its own, but no longer than
    /// that.
    pub(crate) fn sleep(&self, most: Option<Duration>, device: Option<BorrowedFd<'_>>) {
        let most = most.map(|most| Timespec {
            tv_sec: most.as_secs() as i64,
            tv_nsec: i64::from(most.subsec_nanos()),
        });
        let fds = [Some(self.waker.as_fd()), device].into_iter().flatten();
        let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        // An interrupted sleep is a short one.
        let woken = poll(&mut fds, most.as_ref()).unwrap_or(0) > 0;
        if woken && !fds[0].revents().is_empty() {
            let _ = (&*self.waker).read(&mut [0; 8]);
        }
    }
}
