//! The control loop: one thread that polls the link, the kernel's log, the heartbeat and the jobs.
//!
//! Nothing in here blocks. What may block (single requests, binding, verification) runs as a *job* on
//! a thread of its own, which sends its answer back through a channel and wakes the loop.

use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::commands::{self, Outcome};
use crate::jobs::{Asker, Jobs};
use crate::link::Link;
use crate::protocol::{Answer, Request, reply};
use crate::subject::{Probe, Role};
use crate::wakeup::Wakeup;

/// How often the loop looks whether the host connected, or a deadline passed.
const TICK: Duration = Duration::from_millis(20);

/// The loop, and what it serves.
pub struct Control {
    probe: Probe,
    /// Called at every turn of the loop.
    housekeeping: fn(),
    answers: Receiver<(Asker, Answer)>,
    wakeup: Wakeup,
    connection: u64,
}

impl Control {
    /// A probe with no link yet.
    pub fn new(role: Role, nonce: u128, housekeeping: fn()) -> io::Result<Self> {
        let wakeup = Wakeup::new()?;
        let (jobs, answers) = Jobs::new(wakeup.clone());
        let probe = Probe::new(role, nonce, jobs, &wakeup)?;
        Ok(Self { probe, housekeeping, answers, wakeup, connection: 0 })
    }

    fn greeting(&self) -> Value {
        let mut hello = self.probe.hello();
        hello["event"] = json!("hello");
        hello
    }

    /// Serves the link for as long as it lasts. A virtio-serial port outlives the host's end: it
    /// hangs up and comes back, and each time the host is greeted. A socket that hangs up is over.
    pub fn serve(&mut self, link: &mut Link) -> io::Result<()> {
        let mut connected = false;
        loop {
            let state = self.wait(link, connected)?;
            (self.housekeeping)();
            if let Some(log) = &mut self.probe.kernel_log {
                log.drain();
            }
            let gone = state.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
            if gone && connected {
                connected = false;
                link.forget();
            } else if !gone && !connected {
                connected = true;
                self.connection += 1;
                link.forget();
                link.queue_newline();
                link.queue(&self.greeting());
            }
            if gone && self.probe.role == Role::Host {
                return Ok(());
            }
            if connected && !self.turn(link)? {
                return Ok(());
            }
        }
    }

    /// One turn with the host there; false if it turned out to be gone for good.
    fn turn(&mut self, link: &mut Link) -> io::Result<bool> {
        match link.read_lines() {
            Ok(Some(lines)) => lines.iter().for_each(|line| self.handle(line, link)),
            // A port whose host has just gone; the next poll says so.
            _ if self.probe.role == Role::Guest => {}
            Ok(None) => return Ok(false),
            Err(error) => return Err(error),
        }
        self.probe.tend();
        for (asker, answer) in self.answers.try_iter() {
            if asker.connection == self.connection {
                link.queue(&reply(&asker.id, answer));
            }
        }
        if let Some(beat) = self.probe.heartbeat.due() {
            if !link.is_behind() {
                link.queue(&beat);
            }
        }
        match link.flush() {
            Err(_) if self.probe.role == Role::Guest => Ok(true),
            other => other.map(|()| true),
        }
    }

    fn handle(&mut self, line: &[u8], link: &mut Link) {
        let mut request = match Request::parse(line) {
            Ok(request) => request,
            Err((id, failure)) => return link.queue(&reply(&id, Err(failure))),
        };
        let asker = Asker { id: request.id.clone(), connection: self.connection };
        if let Outcome::Now(answer) = commands::carry_out(&mut self.probe, &mut request, asker) {
            link.queue(&reply(&request.id, answer));
        }
    }

    /// Waits until there is something to do, and says how the link is.
    fn wait(&mut self, link: &Link, connected: bool) -> io::Result<PollFlags> {
        let mut interest = PollFlags::IN;
        if link.is_piled() {
            interest |= PollFlags::OUT;
        }
        let mut fds = vec![
            PollFd::new(&self.wakeup, PollFlags::IN),
            PollFd::new(&self.probe.heartbeat, PollFlags::IN),
        ];
        if let Some(log) = &self.probe.kernel_log {
            fds.push(PollFd::new(log, PollFlags::IN));
        }
        // A port that hung up is readable all the time: look at it once a tick instead.
        if connected {
            fds.push(PollFd::from_borrowed_fd(link.as_fd(), interest));
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: TICK.as_nanos() as i64 };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.wakeup.clear();
        let mut fds = [PollFd::from_borrowed_fd(link.as_fd(), interest)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        Ok(fds[0].revents())
    }
}
