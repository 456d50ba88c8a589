//! One virtqueue at work: taking requests, doing them, giving them back.
//!
//! ```text
//!   starting ── replay is empty ─────────────► serving ── stop ──► stopping ── idle ──► gone
//!      └─ replaying (takes nothing new until every replayed request is published) ─┘
//!   any of them ── the ring makes no sense ──► broken (finishes what it has, takes nothing)
//! ```

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use semper_block::{Absorbed, Engine, Image, Op, Submission};
use semper_blockmap::Recorder;
use semper_inflight::{Point, TrackedQueue};

use crate::block_map::{self, DiskMap};
use crate::crash::CrashHook;
use crate::dirty_log::DirtyLog;
use crate::eventfd::EventFd;
use crate::flushes;
use crate::overlap::Overlaps;
use crate::request::{
    ID_SIZE, Parsed, Rules, STATUS_IOERR, STATUS_OK, STATUS_UNSUPPORTED, Slot, parse,
};
use crate::snapshots::Snapshots;
use crate::state::{LastError, QueueCounters, Shared, add, mark, now_ns, seconds_of_now};
use crate::tenure::Tenure;

/// Requests taken from one queue before the others get their turn.
const TURN: usize = 64;
/// Completions published at once, and after which an eager queue wakes the driver. Measured with 32
/// requests on tmpfs, driver and device on two processors: 4 to 24 differ by less than 10 %, the
/// whole turn costs a fifth of the throughput.
const BATCH: usize = 16;

/// What all queues of a disk have in common.
pub(crate) struct Disk {
    pub image: Arc<Image>,
    pub serial: [u8; ID_SIZE],
    pub shared: Arc<Shared>,
    /// Which pages of the guest hold which blocks, unless nobody wants to know.
    pub map: Option<Arc<DiskMap>>,
    /// How long a thread may look for requests before it sleeps.
    pub poll: Duration,
    /// Whether the image is this process' own now.
    pub tenure: Tenure,
    /// What stands above it.
    pub snapshots: Arc<Snapshots>,
}

/// Everything that is needed to start a queue.
pub(crate) struct QueueSetup {
    pub index: u16,
    pub tracked: TrackedQueue<CrashHook>,
    pub replay: Vec<u16>,
    pub kick: EventFd,
    pub call: Option<EventFd>,
    pub err: Option<EventFd>,
    pub log: Option<DirtyLog>,
    /// Keeps the memory of the in-flight region mapped.
    pub region: Option<Arc<dyn Send + Sync>>,
}

/// Who waits for a queue to stop, until the queue has, or the wait was given up: who takes the sender
/// out decides which.
pub(crate) type StopRequest = Arc<Mutex<Option<Sender<u16>>>>;

/// A queue that its thread serves.
pub(crate) struct Queue {
    pub index: u16,
    tracked: TrackedQueue<CrashHook>,
    kick: EventFd,
    pub call: Option<EventFd>,
    err: Option<EventFd>,
    slots: Box<[Slot]>,
    replay: VecDeque<u16>,
    replaying: bool,
    /// A request that is parsed and waits for one that overlaps it.
    held: Option<u16>,
    /// That one belongs to another thread, which wakes nobody.
    contends: bool,
    outstanding: usize,
    /// Wakes the driver while more requests are being worked at.
    eager: bool,
    broken: bool,
    stopping: Option<StopRequest>,
    disk: Arc<Disk>,
    recorder: Option<Recorder>,
    log: Option<DirtyLog>,
    /// What a request is about to write; for the log.
    writes: Vec<libc::iovec>,
    /// When the turn began in which requests are being taken; the clock is read once for all.
    turn_ns: u64,
    /// When those were taken that are given back and not shown yet.
    given_back_ns: Vec<u64>,
    _region: Option<Arc<dyn Send + Sync>>,
}

impl Queue {
    pub(crate) fn new(setup: QueueSetup, disk: Arc<Disk>) -> Self {
        let size = usize::from(setup.tracked.ring().size());
        let replaying = !setup.replay.is_empty();
        let counters = &disk.shared.queues[usize::from(setup.index)];
        counters.size.store(size as u64, Ordering::Relaxed);
        counters.running.store(true, Ordering::Relaxed);
        counters.took(setup.tracked.ring().last_avail());
        counters.watch(Some(setup.tracked.ring().watch()));
        if !replaying {
            mark(&disk.shared.timeline.replayed);
        }
        if let Some(log) = &setup.log {
            log.wrote_used(setup.tracked.ring().size());
        }
        Self {
            index: setup.index,
            tracked: setup.tracked,
            kick: setup.kick,
            call: setup.call,
            err: setup.err,
            slots: (0..size).map(|_| Slot::default()).collect(),
            replay: setup.replay.into(),
            replaying,
            held: None,
            contends: false,
            outstanding: 0,
            eager: false,
            broken: false,
            stopping: None,
            recorder: disk.map.as_ref().and_then(|map| map.recorder(setup.index)),
            log: setup.log,
            writes: Vec::new(),
            turn_ns: 0,
            given_back_ns: Vec::with_capacity(TURN),
            disk,
            _region: setup.region,
        }
    }

    pub(crate) fn kick_fd(&self) -> i32 {
        self.kick.fd()
    }

    /// Logs what the device writes from now on; requests in flight included.
    pub(crate) fn set_log(&mut self, log: Option<DirtyLog>) {
        self.log = log;
        self.log_used();
    }

    fn log_used(&self) {
        if let Some(log) = &self.log {
            log.wrote_used(self.tracked.ring().size());
        }
    }

    fn log_segments(&self, segments: &[libc::iovec]) {
        if let Some(log) = &self.log {
            segments.iter().for_each(|s| log.wrote_at(s.iov_base.cast(), s.iov_len));
        }
    }

    /// Asks the queue to finish what it has; the sender gets the next available index.
    pub(crate) fn stop(&mut self, request: StopRequest) {
        self.stopping = Some(request);
    }

    /// Goes on if nobody waits any more for the queue to stop.
    pub(crate) fn go_on(&mut self) {
        let waits = |request: &StopRequest| {
            request.lock().unwrap_or_else(PoisonError::into_inner).is_some()
        };
        self.stopping = self.stopping.take().filter(waits);
    }

    /// Answers a stop once nothing is left; true when the queue is to be forgotten.
    pub(crate) fn try_finish(&mut self) -> bool {
        let idle = self.outstanding == 0 && self.replay.is_empty() && self.held.is_none();
        let Some(request) = self.stopping.take_if(|_| idle) else { return false };
        let waiting = request.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(reply) = waiting else { return false };
        self.publish();
        self.counters().watch(None);
        self.counters().running.store(false, Ordering::Relaxed);
        // The device that asked may be gone with its connection.
        let _ = reply.send(self.tracked.ring().last_avail());
        true
    }

    /// Asks the driver for kicks before the thread sleeps; true if there is work already.
    pub(crate) fn prepare_sleep(&mut self) -> bool {
        if self.contends {
            return true;
        }
        let takes = !self.broken && !self.replaying && self.stopping.is_none();
        if !takes || self.held.is_some() {
            return false;
        }
        let work = self.tracked.ring_mut().enable_kicks();
        self.log_used();
        work
    }

    /// Whether the driver has made requests available that would be taken.
    pub(crate) fn has_work(&self) -> bool {
        !self.broken && self.stopping.is_none() && self.tracked.ring().has_available()
    }

    /// Takes and starts requests; true if there was anything to do. `eager`: driver and device
    /// have a processor each, so that the driver is better woken as soon as there is something
    /// for it.
    pub(crate) fn advance<E: Engine>(
        &mut self,
        engine: &mut E,
        overlaps: &mut Overlaps,
        eager: bool,
    ) -> bool {
        self.eager = eager;
        self.turn_ns = 0;
        let mut busy = false;
        if let Some(head) = self.held.take() {
            self.contends = false;
            if !self.enter(head, engine, overlaps) {
                return false;
            }
            busy = true;
        }
        busy |= self.advance_replay(engine, overlaps);
        if self.replaying || self.broken || self.stopping.is_some() {
            return busy;
        }
        self.tracked.ring_mut().disable_kicks();
        self.log_used();
        for _ in 0..TURN {
            let head = match self.tracked.pop() {
                Ok(Some(head)) => head,
                Ok(None) => break,
                Err(error) => {
                    self.break_off(&error);
                    break;
                }
            };
            busy = true;
            self.outstanding += 1;
            if !self.start(head, engine, overlaps) {
                break;
            }
        }
        busy
    }

    fn advance_replay<E: Engine>(&mut self, engine: &mut E, overlaps: &mut Overlaps) -> bool {
        if !self.replaying {
            return false;
        }
        let mut busy = false;
        while let Some(head) = self.replay.pop_front() {
            busy = true;
            self.tracked.passed(Point::ReplaySubmit);
            add(&self.counters().replayed, 1);
            self.outstanding += 1;
            if !self.start(head, engine, overlaps) {
                return busy;
            }
        }
        if self.outstanding == 0 && self.held.is_none() {
            self.publish();
            self.replaying = false;
            mark(&self.disk.shared.timeline.replayed);
            busy = true;
        }
        busy
    }

    /// Parses the request at `head` and starts it; false if it has to wait for another.
    fn start<E: Engine>(&mut self, head: u16, engine: &mut E, overlaps: &mut Overlaps) -> bool {
        if self.turn_ns == 0 {
            self.turn_ns = now_ns();
        }
        self.slots[usize::from(head)].taken_ns = self.turn_ns;
        let rules = Rules {
            image: &self.disk.image,
            serial: &self.disk.serial,
            write_through: self.disk.shared.write_through.load(Ordering::Relaxed),
        };
        let parsed = parse(&self.tracked, head, &mut self.slots[usize::from(head)], rules);
        match parsed {
            Ok(Parsed::Io) => self.enter(head, engine, overlaps),
            Ok(Parsed::Answer { status, written }) => {
                if status == STATUS_UNSUPPORTED || status == STATUS_IOERR {
                    add(&self.counters().errors, 1);
                }
                if written > 0 {
                    self.log_segments(self.slots[usize::from(head)].io.guest_segments());
                }
                self.answer(head, status, written);
                true
            }
            Ok(Parsed::Unanswerable) => {
                self.guest_error(&"a request without room for its status byte");
                self.give_back(head, 0);
                true
            }
            Err(error) => {
                self.guest_error(&error);
                self.answer(head, STATUS_IOERR, 0);
                true
            }
        }
    }

    /// Submits the parsed request at `head` unless one in flight overlaps it.
    fn enter<E: Engine>(&mut self, head: u16, engine: &mut E, overlaps: &mut Overlaps) -> bool {
        let slot = &self.slots[usize::from(head)];
        let (offset, len) = self.disk.image.whole_blocks(slot.offset, slot.len);
        let op = slot.io.asked();
        if E::CONCURRENT && !overlaps.try_enter(op, offset, len) {
            self.held = Some(head);
            return false;
        }
        if !self.disk.image.try_enter(op, slot.offset, slot.len) {
            if E::CONCURRENT {
                overlaps.leave(op, offset, len);
            }
            (self.held, self.contends) = (Some(head), true);
            std::thread::yield_now();
            return false;
        }
        let slot = &mut self.slots[usize::from(head)];
        if let Some(recorder) = &self.recorder {
            let (access, range) = (block_map::access(slot.io.asked()), (slot.offset, slot.len));
            recorder.start(&mut slot.note, access, range, slot.io.guest_segments());
        }
        self.submit(head, engine, overlaps);
        true
    }

    fn submit<E: Engine>(&mut self, head: u16, engine: &mut E, overlaps: &mut Overlaps) {
        let token = (u64::from(self.index) << 16) | u64::from(head);
        loop {
            let io = &self.slots[usize::from(head)].io;
            // SAFETY: the slot stays where it is (a boxed slice that is dropped only when nothing
            // is outstanding), and the queue keeps guest memory mapped as long.
            let submission = unsafe { engine.submit(token, io) };
            self.tracked.passed(Point::IoSubmitted);
            let Submission::Done(result) = submission else { return };
            if !self.finish_part(head, result, overlaps, E::CONCURRENT) {
                return;
            }
        }
    }

    /// The engine has given `head` back.
    pub(crate) fn complete<E: Engine>(
        &mut self,
        head: u16,
        result: i32,
        engine: &mut E,
        overlaps: &mut Overlaps,
    ) {
        if self.finish_part(head, result, overlaps, E::CONCURRENT) {
            self.submit(head, engine, overlaps);
        }
    }

    /// Takes a result into account; true if the rest of the request must be submitted.
    fn finish_part(
        &mut self,
        head: u16,
        result: i32,
        overlaps: &mut Overlaps,
        concurrent: bool,
    ) -> bool {
        let slot = &mut self.slots[usize::from(head)];
        let logs = self.log.is_some() && slot.io.asked() == Op::Read;
        if logs {
            // As they were when this part was submitted; afterwards they have moved on.
            self.writes.clear();
            self.writes.extend_from_slice(slot.io.guest_segments());
        }
        let outcome = slot.io.absorb(result, &self.disk.image);
        if logs {
            self.log_segments(&self.writes);
        }
        let slot = &mut self.slots[usize::from(head)];
        if outcome == Absorbed::More {
            return true;
        }
        self.tracked.passed(Point::IoDone);
        let (op, offset, len) = (slot.io.asked(), slot.offset, slot.len);
        self.disk.image.leave(op, offset, len);
        if let Some(recorder) = &self.recorder {
            recorder.finish(&mut slot.note, outcome == Absorbed::Finished);
        }
        if concurrent {
            let (start, whole) = self.disk.image.whole_blocks(offset, len);
            overlaps.leave(op, start, whole);
        }
        let io = &self.slots[usize::from(head)].io;
        if let Absorbed::Failed(errno) = outcome {
            let loses = io.tells_of_loss(errno);
            self.host_error(op, (offset, len), errno, loses);
            self.answer(head, STATUS_IOERR, 0);
            return false;
        }
        if io.is_durable() && self.disk.shared.flushes.has_failed() {
            self.host_error(op, (offset, len), libc::EIO, true);
            self.answer(head, STATUS_IOERR, 0);
            return false;
        }
        self.count(op, len);
        let written = if op == Op::Read { u32::try_from(len).unwrap_or(u32::MAX - 1) } else { 0 };
        self.answer(head, STATUS_OK, written);
        false
    }

    /// Writes the status byte, if the chain has a place for it, and gives the chain back.
    fn answer(&mut self, head: u16, status: u8, written: u32) {
        let at = self.slots[usize::from(head)].status;
        if at.is_null() {
            self.give_back(head, 0);
            return;
        }
        // SAFETY: `parse` found the byte inside a writable segment of mapped guest memory.
        unsafe { at.write_volatile(status) };
        if let Some(log) = &self.log {
            log.wrote_at(at, 1);
        }
        self.tracked.passed(Point::StatusStored);
        self.give_back(head, written + 1);
    }

    fn give_back(&mut self, head: u16, written: u32) {
        self.given_back_ns.push(self.slots[usize::from(head)].taken_ns);
        self.tracked.complete(head, written);
        self.outstanding -= 1;
        if self.tracked.staged() >= BATCH {
            self.show();
            if self.eager && self.tracked.needs_call() {
                self.notify();
            }
        }
    }

    /// Shows finished requests to the driver, without a notification.
    fn show(&mut self) {
        add(&self.counters().completed, self.tracked.staged() as u64);
        self.tracked.publish();
        let now = now_ns();
        for taken in self.given_back_ns.drain(..) {
            self.disk.shared.queues[usize::from(self.index)]
                .latency
                .0
                .record_alone(now.saturating_sub(taken));
        }
        self.log_used();
        mark(&self.disk.shared.timeline.first_completion);
        if self.replaying {
            self.tracked.passed(Point::ReplayPublished);
        }
    }

    /// Shows finished requests to the driver, and wakes it if it wants that.
    pub(crate) fn publish(&mut self) {
        if self.tracked.staged() > 0 {
            self.show();
        }
        self.counters().in_flight.store(self.outstanding as u64, Ordering::Relaxed);
        self.counters().took(self.tracked.ring().last_avail());
        if self.tracked.needs_call() {
            self.notify();
        }
    }

    /// Whether the driver was given something back, and nothing of an earlier process is left.
    pub(crate) fn has_served(&self) -> bool {
        !self.replaying && self.counters().completed.load(Ordering::Relaxed) > 0
    }

    /// Wakes the driver whatever it wants.
    pub(crate) fn notify(&self) {
        if let Some(call) = &self.call {
            call.signal();
            add(&self.counters().calls, 1);
        }
    }

    fn break_off(&mut self, error: &dyn std::fmt::Display) {
        self.broken = true;
        self.counters().watch(None);
        self.guest_error(error);
        if let Some(err) = &self.err {
            err.signal();
        }
    }

    fn guest_error(&self, error: &dyn std::fmt::Display) {
        add(&self.counters().errors, 1);
        self.disk.shared.report_guest_error(self.index, error);
    }

    /// `loses`: data that was taken before may be lost with it.
    fn host_error(&self, op: Op, (offset, length): (u64, u64), errno: i32, loses: bool) {
        add(&self.counters().errors, 1);
        let mut message = std::io::Error::from_raw_os_error(errno).to_string();
        if loses {
            message = flushes::explain(&message);
            self.disk.shared.flushes.fail(&message);
        }
        let error =
            LastError { op: op.name(), offset, length, errno, message, time: seconds_of_now() };
        self.disk.shared.report_host_error(error);
    }

    fn count(&self, op: Op, len: u64) {
        let counters = self.counters();
        match op {
            Op::Read => {
                add(&counters.reads, 1);
                add(&counters.bytes_read, len);
            }
            Op::Write { .. } => {
                add(&counters.writes, 1);
                add(&counters.bytes_written, len);
            }
            Op::Flush => add(&counters.flushes, 1),
            Op::Discard | Op::WriteZeroes { .. } => add(&counters.discards, 1),
        }
    }

    pub(crate) fn counters(&self) -> &QueueCounters {
        &self.disk.shared.queues[usize::from(self.index)]
    }
}
