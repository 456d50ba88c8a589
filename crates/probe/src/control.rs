//! The control loop: one thread that polls the link, the kernel's log, the heartbeat and the jobs.
//!
//! Nothing in here blocks. What may block (single requests, binding, verification) runs as a *job* on
//! a thread of its own, which sends its answer back through a channel and wakes the loop.

use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::clock::now_ns;
use crate::commands;
use crate::heartbeat::Heartbeat;
use crate::kmsg::{KernelLog, Tally};
use crate::link::Link;
use crate::protocol::{Answer, Failure, Request, reply};
use crate::runs::Runs;
use crate::wakeup::Wakeup;

/// How often the loop looks whether the host connected, or a deadline passed.
const TICK: Duration = Duration::from_millis(20);

/// Where the probe runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// PID 1 of a guest: everything is allowed.
    Guest,
    /// A process on a host, for tests: the machine itself is left alone.
    Host,
}

/// Whom an answer goes to.
#[derive(Clone, Debug)]
pub struct Asker {
    id: Value,
    /// Which connection of the host asked; an answer to an earlier one is dropped.
    connection: u64,
}

/// What a command came to, for now.
pub enum Outcome {
    /// The answer.
    Now(Answer),
    /// A job has taken the asker, and will answer.
    Later,
}

/// Gives jobs a thread and takes their answers.
pub struct Jobs {
    sender: Sender<(Asker, Answer)>,
    wakeup: Wakeup,
}

impl Jobs {
    /// Runs `work` on a thread; its result is the answer.
    pub fn spawn(&self, asker: Asker, work: impl FnOnce() -> Answer + Send + 'static) {
        let (sender, wakeup) = (self.sender.clone(), self.wakeup.clone());
        let answer_to = asker.clone();
        let started = thread::Builder::new().name("job".to_owned()).spawn(move || {
            // The loop outlives every job, or the probe is gone anyway.
            let _ = sender.send((asker, work()));
            wakeup.wake();
        });
        if let Err(error) = started {
            self.answer(answer_to, Err(Failure::failed(format!("cannot start a job: {error}"))));
        }
    }

    /// Answers without a thread, from within the loop.
    pub fn answer(&self, asker: Asker, answer: Answer) {
        let _ = self.sender.send((asker, answer));
        self.wakeup.wake();
    }
}

/// Everything that the commands act on.
pub struct Control {
    /// Where the probe runs.
    pub role: Role,
    /// Drawn at boot.
    pub nonce: u128,
    /// The writers.
    pub runs: Runs,
    /// The kernel's log, where it may be read.
    pub kernel_log: Option<KernelLog>,
    /// The beat.
    pub heartbeat: Heartbeat,
    /// Work that may block.
    pub jobs: Jobs,
    /// Called at every turn of the loop.
    pub housekeeping: fn(),
    answers: Receiver<(Asker, Answer)>,
    wakeup: Wakeup,
    connection: u64,
}

impl Control {
    /// A probe with no link yet.
    pub fn new(role: Role, nonce: u128, housekeeping: fn()) -> io::Result<Self> {
        let wakeup = Wakeup::new()?;
        let (sender, answers) = channel();
        let tally = Tally::default();
        Ok(Self {
            role,
            nonce,
            runs: Runs::new(nonce, wakeup.clone(), tally.clone()),
            kernel_log: KernelLog::open(tally).ok(),
            heartbeat: Heartbeat::new()?,
            jobs: Jobs { sender, wakeup: wakeup.clone() },
            housekeeping,
            answers,
            wakeup,
            connection: 0,
        })
    }

    /// What the probe says of itself.
    pub fn hello(&self) -> Value {
        json!({
            "nonce": format!("{:032x}", self.nonce),
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": rustix::system::uname().release().to_string_lossy(),
            "monotonic_ns": now_ns(),
        })
    }

    fn greeting(&self) -> Value {
        let mut hello = self.hello();
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
            if let Some(log) = &mut self.kernel_log {
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
            if gone && self.role == Role::Host {
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
            _ if self.role == Role::Guest => {}
            Ok(None) => return Ok(false),
            Err(error) => return Err(error),
        }
        self.runs.tend(&self.jobs);
        for (asker, answer) in self.answers.try_iter() {
            if asker.connection == self.connection {
                link.queue(&reply(&asker.id, answer));
            }
        }
        if let Some(beat) = self.heartbeat.due() {
            if !link.is_behind() {
                link.queue(&beat);
            }
        }
        match link.flush() {
            Err(_) if self.role == Role::Guest => Ok(true),
            other => other.map(|()| true),
        }
    }

    fn handle(&mut self, line: &[u8], link: &mut Link) {
        let mut request = match Request::parse(line) {
            Ok(request) => request,
            Err((id, failure)) => return link.queue(&reply(&id, Err(failure))),
        };
        let asker = Asker { id: request.id.clone(), connection: self.connection };
        if let Outcome::Now(answer) = commands::carry_out(self, &mut request, asker) {
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
            PollFd::new(&self.heartbeat, PollFlags::IN),
        ];
        if let Some(log) = &self.kernel_log {
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
