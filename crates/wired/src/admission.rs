//! Who comes to the destination's address: each has a place and little time, and holds up nobody.
//!
//! TLS is agreed on in a thread for each connection. Whoever has shown the certificate of the source
//! is passed on, in the order in which they come; all others are cut off.

use std::collections::VecDeque;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::ServerConfig;

use crate::channel::Channel;
use crate::failure::Failure;
use crate::tls::Identity;

/// Connections that are being looked at. One more, and the oldest has to go: a source that means
/// it needs some milliseconds.
const PLACES: usize = 64;
/// For all of TLS, however it is cut into pieces.
const TIME: Duration = Duration::from_secs(3);
/// How late the end of that time is seen, at most.
const LOOK: Duration = Duration::from_millis(100);

/// One connection that has not shown yet who it is.
struct Visitor {
    socket: TcpStream,
    until: Instant,
    passed: Arc<AtomicBool>,
}

impl Visitor {
    fn is_over(&self) -> bool {
        self.passed.load(Ordering::Acquire)
    }

    fn cut(&self) {
        if !self.is_over() {
            // It may be gone already.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }
}

/// Sources that have shown their certificate; nobody is admitted any more when it goes.
pub(crate) struct Admission {
    sources: Receiver<(Channel, SocketAddr)>,
    over: Arc<AtomicBool>,
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}

impl Admission {
    /// Admits from now on.
    ///
    /// # Errors
    /// The system's, when it has no thread left.
    pub(crate) fn start(
        listener: TcpListener,
        identity: Identity,
        config: Arc<ServerConfig>,
    ) -> Result<Self, Failure> {
        let (admitted, sources) = channel();
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let run = move || accept(&listener, &Arc::new(identity), &config, &admitted, &told);
        listener_thread(run)?;
        Ok(Self { sources, over })
    }

    /// Waits for the next one.
    ///
    /// # Errors
    /// [`Failure::Lost`] when nobody can come any more.
    pub(crate) fn next(&self) -> Result<(Channel, SocketAddr), Failure> {
        let gone = |_| Failure::Lost(std::io::ErrorKind::NotConnected.into());
        self.sources.recv().map_err(gone)
    }
}

fn listener_thread(run: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let spawned = thread::Builder::new().name("admission".into()).spawn(run);
    spawned.map(drop).map_err(Failure::system("start a thread"))
}

fn accept(
    listener: &TcpListener,
    identity: &Arc<Identity>,
    config: &Arc<ServerConfig>,
    admitted: &Sender<(Channel, SocketAddr)>,
    over: &AtomicBool,
) {
    let mut visitors: VecDeque<Visitor> = VecDeque::new();
    while !over.load(Ordering::Acquire) {
        visitors.retain(|visitor| !visitor.is_over());
        while visitors.front().is_some_and(|oldest| oldest.until <= Instant::now()) {
            visitors.pop_front().iter().for_each(Visitor::cut);
        }
        let mut ready = [PollFd::new(listener, PollFlags::IN)];
        let limit = Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
        if !poll(&mut ready, Some(&limit)).is_ok_and(|ready| ready > 0) {
            continue;
        }
        let begun = listener
            .accept()
            .and_then(|(socket, from)| look_at(socket, from, identity, config, admitted));
        match begun {
            Ok(visitor) => visitors.push_back(visitor),
            Err(error) => {
                log::warn!("cannot admit a source error=\"{error}\"");
                thread::sleep(LOOK);
            }
        }
        if visitors.len() > PLACES {
            visitors.pop_front().iter().for_each(Visitor::cut);
        }
    }
    visitors.iter().for_each(Visitor::cut);
}

fn look_at(
    socket: TcpStream,
    from: SocketAddr,
    identity: &Arc<Identity>,
    config: &Arc<ServerConfig>,
    admitted: &Sender<(Channel, SocketAddr)>,
) -> std::io::Result<Visitor> {
    let passed = Arc::new(AtomicBool::new(false));
    let visitor = Visitor {
        socket: socket.try_clone()?,
        until: Instant::now() + TIME,
        passed: Arc::clone(&passed),
    };
    let (identity, config, admitted) = (Arc::clone(identity), Arc::clone(config), admitted.clone());
    let look = move || {
        let channel = Identity::accept(&config).and_then(|tls| Channel::new(socket, tls));
        let checked =
            channel.and_then(|channel| match channel.check(|tls| identity.check_client(tls)) {
                Ok(()) => Ok(channel),
                Err(failure) => {
                    channel.close(Some(&failure));
                    Err(failure)
                }
            });
        passed.store(true, Ordering::Release);
        match checked {
            // Nobody is admitted any more when that fails.
            Ok(channel) => drop(admitted.send((channel, from))),
            Err(error) => log::warn!("refused a source from={from} error=\"{error}\""),
        }
    };
    thread::Builder::new().name("admission".into()).spawn(look)?;
    Ok(visitor)
}
