//! The main thread's part of a run: moves the phases, takes the figures at their borders, and
//! gives up on a backend that is gone or hangs.

use crate::PROGRAM;
use crate::options::Options;
use crate::processor::Usage;
use crate::relay;
use crate::worker::{Control, Phase};
use semper_program::{Status, Told};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use virtio_driver::EventFd;

/// What the other threads report.
pub enum Event {
    /// From the relay.
    Relay(relay::Event),
    /// A worker has nothing in flight any more.
    Drained,
    /// A worker is at its end.
    Ended,
    /// A worker cannot go on.
    Failed(String),
}

/// The measured interval.
#[derive(Default)]
pub struct Interval {
    /// Its length; zero if the backend did not live to see it.
    pub length: Duration,
    /// What this process used in it.
    pub own: Usage,
    /// What the backend used in it, if it was asked for and lived.
    pub backend: Option<Usage>,
}

/// Watches one run.
pub struct Watch<'a> {
    options: &'a Options,
    control: &'a Control,
    calls: Vec<Arc<EventFd>>,
    inbox: &'a Receiver<Event>,
    workers: usize,
    drained: usize,
    ended: usize,
    progress: (u64, Instant),
    /// Whether the backend had an in-flight region.
    pub inflight: bool,
    /// Outages that ended with a new connection.
    pub outages: Vec<Duration>,
    /// Why the run ended early.
    pub lost: Option<String>,
}

impl<'a> Watch<'a> {
    /// Watches `workers` threads that sleep on `calls`.
    pub fn new(
        options: &'a Options,
        control: &'a Control,
        calls: Vec<Arc<EventFd>>,
        inbox: &'a Receiver<Event>,
        workers: usize,
    ) -> Self {
        Self {
            options,
            control,
            calls,
            inbox,
            workers,
            drained: 0,
            ended: 0,
            progress: (0, Instant::now()),
            inflight: false,
            outages: Vec::new(),
            lost: None,
        }
    }

    /// Moves the workers through all phases and waits for their end.
    pub fn phases(&mut self) -> Interval {
        let interval = self.measure();
        let drained = interval.length > Duration::ZERO && self.wait_until(None, Self::is_drained);
        if drained && self.options.verify {
            self.enter(Phase::ReadBack);
            self.wait_until(None, |watch| watch.ended == watch.workers);
        }
        self.enter(Phase::Abort);
        let deadline = Instant::now() + Duration::from_secs_f64(self.options.patience);
        while self.ended < self.workers {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(event) => self.handle(event),
                Err(_) => self.leave(),
            }
        }
        interval
    }

    /// Ends the process: a worker does not come back. The driver library's free list can turn into
    /// a circle when a backend completes a request twice.
    fn leave(&self) -> ! {
        let cause = self.lost.as_deref().unwrap_or("the run is over");
        let told = format!("{cause}; a thread is caught in a broken ring");
        PROGRAM.exit(&Told(Status::Unusable, told))
    }

    fn measure(&mut self) -> Interval {
        let after = |seconds: f64| Some(Instant::now() + Duration::from_secs_f64(seconds));
        if !self.wait_until(after(self.options.warmup), |_| false) {
            return Interval::default();
        }
        let before = self.usage();
        let start = Instant::now();
        self.enter(Phase::Measure);
        let whole = match self.options.count {
            Some(_) => self.wait_until(None, Self::is_drained),
            None => self.wait_until(after(self.options.seconds), |_| false),
        };
        let length = start.elapsed();
        let used = self.usage();
        self.enter(Phase::Drain);
        if !whole {
            return Interval::default();
        }
        Interval {
            length,
            own: used.0.since(&before.0),
            backend: used.1.zip(before.1).map(|(used, before)| used.since(&before)),
        }
    }

    fn is_drained(&self) -> bool {
        self.drained == self.workers
    }

    fn usage(&self) -> (Usage, Option<Usage>) {
        let own = Usage::of(std::process::id()).unwrap_or_default();
        (own, self.options.pid.and_then(|pid| Usage::of(pid).ok()))
    }

    /// Moves on and wakes every sleeper, so that it sees the new phase.
    fn enter(&self, phase: Phase) {
        self.control.enter(phase);
        if phase >= Phase::Drain {
            for call in &self.calls {
                let _ = call.write(1);
            }
        }
    }

    /// Handles events until the deadline, the condition, or the loss of the backend. False: it is
    /// lost, and the workers were told to end.
    fn wait_until(&mut self, deadline: Option<Instant>, done: impl Fn(&Self) -> bool) -> bool {
        let tick = Duration::from_millis(100);
        let patience = Duration::from_secs_f64(self.options.patience);
        self.progress.1 = Instant::now();
        while self.lost.is_none() && !done(self) {
            let now = Instant::now();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            if let Ok(event) = self.inbox.recv_timeout(left.unwrap_or(tick).min(tick)) {
                self.handle(event);
            }
            let progress = self.control.progress.load(Ordering::Relaxed);
            if progress != self.progress.0 {
                self.progress = (progress, Instant::now());
            } else if self.progress.1.elapsed() > patience {
                self.give_up(format!("no completion for {} s", self.options.patience));
            }
        }
        self.lost.is_none()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Drained => self.drained += 1,
            Event::Ended => self.ended += 1,
            Event::Failed(cause) => {
                self.ended += 1;
                self.give_up(cause);
            }
            Event::Relay(relay::Event::Inflight) => self.inflight = true,
            Event::Relay(relay::Event::Reconnected(outage)) => self.outages.push(outage),
            Event::Relay(relay::Event::Lost(cause)) => self.give_up(cause),
        }
    }

    fn give_up(&mut self, cause: String) {
        self.lost.get_or_insert(cause);
        self.enter(Phase::Abort);
    }
}
