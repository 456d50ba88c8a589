//! The session as a spare knows it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use semper_spare::outbox::Outbox;

use super::mirror::Known;
use super::packet::{Kind, Packet};
use super::progress::{Page, Progress};
use crate::message::Files;
use crate::state::{Shared, mark};

/// Between two attempts to reach the process that serves: first, and at most.
const SOON: Duration = Duration::from_millis(10);
const LATER: Duration = Duration::from_secs(1);
/// At most, if that process is there and does not tell everything: it may be of another version.
const RARELY: Duration = Duration::from_secs(60);
/// A spare that has found nobody to follow for so long is as ready as it can be: who serves may be
/// of a release that knows no sessions, or have no descriptor left for it.
const ENOUGH: Duration = Duration::from_secs(2);
/// How long a process whose image is free may take to close its sockets. Microseconds, if it has
/// ended; never, if it lives and has given the image away.
const CLOSING: Duration = Duration::from_millis(200);

/// What a spare has learned.
#[derive(Default)]
struct State {
    link: Option<Arc<OwnedFd>>,
    known: Known,
    page: Option<Page>,
    outbox: Option<Outbox>,
    /// Everything that was there before the link has been told.
    complete: bool,
    /// The spare serves by now.
    over: bool,
}

/// Where the process that served stood when it ended.
pub(crate) struct Inheritance {
    pub known: Known,
    pub progress: Progress,
    pub outbox: Outbox,
}

/// Follows whoever serves, until the spare serves itself.
#[derive(Default)]
pub(crate) struct Follower {
    state: Mutex<State>,
}

impl State {
    /// Takes in what has come; false at the end of the link.
    fn absorb(&mut self) -> bool {
        let Some(link) = self.link.clone() else { return false };
        loop {
            match Packet::receive(&link) {
                Ok(Some(packet)) => self.follow(packet),
                Ok(None) => return false,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) => {
                    // Of another version, perhaps: then the front end connects anew.
                    log::warn!("the session cannot be followed error=\"{error}\"");
                    self.forget();
                    return false;
                }
            }
        }
    }

    fn follow(&mut self, mut packet: Packet) {
        match packet.kind {
            Kind::Begin => {
                let mut files = packet.parts.pop().unwrap_or_default().files.into_iter();
                self.page = files.next().and_then(|file| Page::map(file).ok());
                let ends: Option<[_; 2]> = files.collect::<Files>().try_into().ok();
                self.outbox = ends.map(|[out, into]| Outbox::of(out, into));
                self.complete = false;
            }
            Kind::Complete => self.complete = true,
            _ => {}
        }
        self.known.follow(packet);
    }

    fn forget(&mut self) {
        *self = Self { over: self.over, ..Self::default() };
    }
}

impl Follower {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this process could go on at once.
    pub(crate) fn follows(&self) -> bool {
        let state = self.state();
        state.complete && state.link.is_some()
    }

    /// Follows the process that `connect` finds from a thread of its own. Everything else is
    /// prepared: once the spare follows, it is ready.
    ///
    /// # Errors
    /// The system's, when it has no thread left.
    pub(crate) fn start(
        connect: impl Fn() -> io::Result<OwnedFd> + Send + 'static,
        shared: &Arc<Shared>,
    ) -> io::Result<Arc<Self>> {
        let shared = Arc::clone(shared);
        let follower = Arc::new(Self::default());
        let ours = Arc::clone(&follower);
        let run = move || {
            let (mut pause, begin) = (SOON, Instant::now());
            while !ours.state().over {
                let told = connect().map(|link| ours.listen(&Arc::new(link), &shared));
                pause = match told {
                    Ok(true) => SOON,
                    Ok(false) => (pause * 2).min(RARELY),
                    Err(_) => (pause * 2).min(LATER),
                };
                if begin.elapsed() > ENOUGH && !ours.state().over {
                    mark(&shared.timeline.spare_ready);
                }
                std::thread::sleep(pause);
            }
        };
        std::thread::Builder::new().name("session".into()).spawn(run)?;
        Ok(follower)
    }

    /// What was known stays known at the end of the link, which may be the end of who served. Says
    /// whether everything was told.
    fn listen(&self, link: &Arc<OwnedFd>, shared: &Shared) -> bool {
        let mut state = self.state();
        if state.over {
            return false;
        }
        state.forget();
        state.link = Some(Arc::clone(link));
        drop(state);
        let enough = Timespec { tv_sec: ENOUGH.as_secs() as i64, tv_nsec: 0 };
        let mut limit = Some(&enough);
        loop {
            let mut readable = [PollFd::new(link, PollFlags::IN)];
            let Ok(told) = poll(&mut readable, limit) else { continue };
            let mut state = self.state();
            if state.over || told > 0 && !state.absorb() {
                return state.complete;
            }
            if state.complete || told == 0 {
                mark(&shared.timeline.spare_ready);
                limit = None;
            }
        }
    }

    /// Ends the following; to be called with the image's lock held.
    ///
    /// `None` when nobody was followed, or when whoever was followed lives: then the front end is
    /// still theirs.
    pub(crate) fn inherit(&self) -> Option<Inheritance> {
        let mut state = self.state();
        state.over = true;
        let link = state.link.take()?;
        state.link = Some(Arc::clone(&link));
        let end = Instant::now() + CLOSING;
        while state.absorb() {
            if Instant::now() > end {
                log::warn!("the process that had the image lives, and keeps its front end");
                state.forget();
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let State { known, page, outbox, complete, .. } = std::mem::take(&mut *state);
        state.over = true;
        let Some((page, outbox)) = page.zip(outbox).filter(|_| complete) else {
            // Other spares may have it as well.
            if let Some(connection) = &known.connection {
                let _ = shutdown(connection, Shutdown::Both);
            }
            return None;
        };
        let progress = page.get();
        // A second spare, which knows what this one knows, must not go on from here after this one.
        page.end();
        Some(Inheritance { known, progress, outbox })
    }
}
