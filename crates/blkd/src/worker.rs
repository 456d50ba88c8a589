//! A thread that owns some of a disk's queues, and one engine.
//!
//! No locks on the data path: whoever wants something of a queue puts an [`Order`] into the
//! thread's mailbox and wakes it.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use semper_block::Engine;

use crate::contention::Contention;
use crate::dirty_log::DirtyLog;
use crate::eventfd::EventFd;
use crate::overlap::Overlaps;
use crate::poll::{PREEMPTED, Poller};
use crate::queue::{Disk, Queue, QueueSetup, StopRequest};
use crate::state::{add, mark, now_ns};
use crate::urgency::{Turns, Urgency};

/// How long to look for requests after a sleep for the medium, in ns: long enough for a driver that
/// looks as well. One that has to be woken is better left to sleep: where each request brings a sleep
/// for the medium, a look saves only half of the wake-ups, and keeps the driver off this processor,
/// where it would be woken for a tenth of the price of another. Measured with O_DIRECT at depth 1:
/// p50 105 µs instead of 71.
const SHORT_LOOK: u64 = 4_000;
/// Looks at the rings between two readings of the clock.
const LOOKS: u32 = 16;

/// What a worker can be asked to do.
pub(crate) enum Order {
    /// Serve a queue from now on.
    Start(Box<QueueSetup>),
    /// Finish what the queue has in flight, show it to the driver, forget the queue, and reply
    /// with its next available index.
    Stop { index: u16, request: StopRequest },
    /// Serve the queue on, if nobody waits any more for its stop.
    GoOn { index: u16 },
    /// The driver is to be woken by this from now on.
    Call { index: u16, call: Option<EventFd> },
    /// Pages that the device writes are to be logged like this from now on.
    Log { index: u16, log: Option<DirtyLog>, reply: Sender<()> },
    /// Say that everything that was changed before this order is seen.
    Report { reply: Sender<()> },
    /// End the thread as soon as it has no queue any more.
    End,
}

struct Mailbox {
    orders: Mutex<VecDeque<Order>>,
    pending: AtomicBool,
    wake: EventFd,
}

/// A worker, from outside.
#[derive(Clone)]
pub(crate) struct Worker {
    mailbox: Arc<Mailbox>,
}

impl Worker {
    /// Starts a thread; the engine is made in it, because io_uring binds itself to its maker.
    ///
    /// # Errors
    /// The engine's, or the system's when it has no thread or descriptor left.
    pub(crate) fn spawn<E: Engine>(
        name: String,
        disk: Arc<Disk>,
        make: impl FnOnce() -> io::Result<E> + Send + 'static,
    ) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox {
            orders: Mutex::default(),
            pending: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let (ready, made) = std::sync::mpsc::channel();
        let theirs = Arc::clone(&mailbox);
        thread::Builder::new().name(name).spawn(move || {
            let engine = make().and_then(|mut engine| {
                engine.add_waker(theirs.wake.fd())?;
                Ok(engine)
            });
            match engine {
                Err(error) => drop(ready.send(Err(error))),
                Ok(engine) => {
                    drop(ready.send(Ok(())));
                    Thread::new(engine, disk, theirs).run();
                }
            }
        })?;
        let gone = |_| io::Error::other("the worker ended at once");
        made.recv().map_err(gone)??;
        Ok(Self { mailbox })
    }

    /// Puts an order into the mailbox.
    pub(crate) fn order(&self, order: Order) {
        self.mailbox.orders.lock().unwrap_or_else(PoisonError::into_inner).push_back(order);
        self.mailbox.pending.store(true, Ordering::Release);
        self.mailbox.wake.signal();
    }
}

struct Thread<E> {
    engine: E,
    disk: Arc<Disk>,
    mailbox: Arc<Mailbox>,
    queues: Vec<Queue>,
    overlaps: Overlaps,
    poller: Poller,
    contention: Contention,
    /// The last sleep was for the medium.
    waited: bool,
    finished: Vec<(u64, i32)>,
    ended: bool,
    /// The last turn started requests that the engine may not have handed to the kernel.
    unflushed: bool,
    /// In a spare, until its guest has been served once.
    urgency: Urgency,
    turns: Turns,
}

impl<E: Engine> Thread<E> {
    fn new(engine: E, disk: Arc<Disk>, mailbox: Arc<Mailbox>) -> Self {
        let poller = Poller::new(disk.poll);
        Self {
            engine,
            disk,
            mailbox,
            queues: Vec::new(),
            overlaps: Overlaps::new(),
            poller,
            contention: Contention::new(),
            waited: false,
            finished: Vec::new(),
            ended: false,
            unflushed: false,
            urgency: Urgency::inherited(),
            turns: Turns::short(),
        }
    }

    fn run(mut self) {
        while !self.is_over() {
            if let Err(error) = self.turn() {
                // Without its engine the process can serve nothing; what is in flight is in the
                // region, and the next process does it again.
                log::error!(
                    "the I/O engine failed, ending for the next process to take over error=\"{error}\""
                );
                std::process::exit(1);
            }
        }
    }

    fn is_over(&self) -> bool {
        self.ended && self.queues.is_empty()
    }

    fn turn(&mut self) -> io::Result<()> {
        self.obey()?;
        let mut busy = false;
        let eager = self.poller.pays();
        for queue in &mut self.queues {
            busy |= queue.advance(&mut self.engine, &mut self.overlaps, eager);
        }
        // Requests wait for one more turn: if it finds no others, going to sleep hands them to the
        // kernel by the same system call.
        if busy && self.unflushed {
            self.engine.flush()?;
        }
        self.unflushed = busy;
        busy |= self.collect();
        self.publish();
        if self.urgency.is_raised() && self.queues.iter().any(Queue::has_served) {
            self.urgency.lower();
        }
        if busy || self.is_over() || self.look() {
            return Ok(());
        }
        // Every queue must be asked, even if the first has work: each then has kicks enabled.
        let work = self.queues.iter_mut().fold(false, |work, queue| work | queue.prepare_sleep());
        if work || self.mailbox.pending.load(Ordering::Acquire) {
            return Ok(());
        }
        if !self.urgency.is_raised() && !self.queues.is_empty() {
            self.turns.suit(self.contention.is_present(now_ns()));
        }
        self.waited = self.engine.in_flight() > 0;
        self.engine.wait()?;
        for queue in &self.queues {
            add(&queue.counters().wakeups, 1);
        }
        Ok(())
    }

    /// Looks for new requests for a while before a sleep, if that has paid lately; true if there
    /// is something to do.
    fn look(&mut self) -> bool {
        if self.engine.in_flight() > 0 || self.queues.is_empty() {
            return false;
        }
        let window = self.poller.window(if self.waited { SHORT_LOOK } else { u64::MAX });
        if window == 0 {
            return false;
        }
        let start = now_ns();
        // Looking would take the time from whoever waits for a processor: the guest, perhaps.
        if self.contention.is_present(start) {
            return false;
        }
        let mut before = start;
        loop {
            for _ in 0..LOOKS {
                if let Some(queue) = self.queues.iter().find(|queue| queue.has_work()) {
                    add(&queue.counters().polls, 1);
                    self.poller.hit(now_ns() - start);
                    return true;
                }
                std::hint::spin_loop();
            }
            if self.mailbox.pending.load(Ordering::Acquire) {
                return true;
            }
            let now = now_ns();
            if now - before > PREEMPTED {
                self.poller.preempted();
                return false;
            }
            if now - start >= window {
                self.poller.miss(now - start);
                return false;
            }
            before = now;
        }
    }

    fn collect(&mut self) -> bool {
        self.engine.reap(&mut self.finished);
        let any = !self.finished.is_empty();
        for (token, result) in self.finished.drain(..) {
            let (index, head) = ((token >> 16) as u16, token as u16);
            if let Some(queue) = self.queues.iter_mut().find(|queue| queue.index == index) {
                queue.complete(head, result, &mut self.engine, &mut self.overlaps);
            }
        }
        any
    }

    fn publish(&mut self) {
        let engine = &mut self.engine;
        self.queues.retain_mut(|queue| {
            queue.publish();
            let gone = queue.try_finish();
            if gone {
                engine.remove_waker(queue.kick_fd());
            }
            !gone
        });
    }

    fn obey(&mut self) -> io::Result<()> {
        if !self.mailbox.pending.load(Ordering::Acquire) {
            return Ok(());
        }
        self.mailbox.pending.store(false, Ordering::Release);
        let orders = std::mem::take(
            &mut *self.mailbox.orders.lock().unwrap_or_else(PoisonError::into_inner),
        );
        for order in orders {
            self.carry_out(order)?;
        }
        Ok(())
    }

    fn carry_out(&mut self, order: Order) -> io::Result<()> {
        match order {
            Order::Start(setup) => {
                let queue = Queue::new(*setup, Arc::clone(&self.disk));
                if let Err(error) = self.engine.add_waker(queue.kick_fd()) {
                    self.disk.shared.report_protocol_error(&format_args!(
                        "the kick descriptor of queue {} is no eventfd: {error}",
                        queue.index
                    ));
                }
                mark(&self.disk.shared.timeline.started);
                self.queues.push(queue);
            }
            Order::Stop { index, request } => {
                match self.queues.iter_mut().find(|q| q.index == index) {
                    Some(queue) => queue.stop(request),
                    // This tells the device that the queue never ran.
                    None => drop(request.lock().unwrap_or_else(PoisonError::into_inner).take()),
                }
            }
            Order::GoOn { index } => {
                if let Some(queue) = self.queues.iter_mut().find(|q| q.index == index) {
                    queue.go_on();
                }
            }
            Order::Call { index, call } => {
                if let Some(queue) = self.queues.iter_mut().find(|q| q.index == index) {
                    queue.call = call;
                    // Whatever was signalled through the old one may have gone nowhere.
                    queue.notify();
                }
            }
            Order::Log { index, log, reply } => {
                if let Some(queue) = self.queues.iter_mut().find(|q| q.index == index) {
                    queue.set_log(log);
                }
                // The device that asked waits for it, unless it is gone.
                let _ = reply.send(());
            }
            Order::Report { reply } => {
                // The device that asked waits for it, unless it is gone.
                let _ = reply.send(());
            }
            Order::End => self.ended = true,
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "model.rs"]
pub(crate) mod model;
