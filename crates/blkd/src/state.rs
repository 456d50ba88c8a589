//! What a backend tells about itself: counters, timeline, last error.
//!
//! Each counter has one writer (the queue's thread) and any number of readers, so a relaxed load
//! and store do for an increment.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use semper_histogram::Histogram;
use semper_ring::AvailWatch;
use serde::Serialize;

use crate::flushes::{self, Flushes};
use crate::inflight_map::InflightMap;
use crate::postcopy::Stage;

/// Milestones in a backend's life, as CLOCK_MONOTONIC nanoseconds; 0 = not yet.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    pub process_start: AtomicU64,
    pub spare_ready: AtomicU64,
    pub lock_acquired: AtomicU64,
    pub accepted: AtomicU64,
    pub started: AtomicU64,
    pub replayed: AtomicU64,
    pub first_completion: AtomicU64,
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Seconds since 1970.
pub(crate) fn seconds_of_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Records a milestone if it is the first of its kind.
pub(crate) fn mark(milestone: &AtomicU64) {
    if milestone.load(Ordering::Relaxed) == 0 {
        milestone.store(now_ns(), Ordering::Relaxed);
    }
}

/// What the backend is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Prepared; waits for the image lock.
    Spare,
    /// Owns the image; no front end is connected.
    Listening,
    /// A front end is connected; no queue runs.
    Connected,
    /// At least one queue runs.
    Running,
    /// Told to end; finishes what is in flight.
    Draining,
}

impl Phase {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Phase::Spare => "spare",
            Phase::Listening => "listening",
            Phase::Connected => "connected",
            Phase::Running => "running",
            Phase::Draining => "draining",
        }
    }
}

/// Parts of each power of two in the histogram of a queue, as bits: 1.2 KiB for each queue.
const LATENCY_BITS: u32 = 2;

/// How long requests took.
#[derive(Debug)]
pub(crate) struct Latency(pub Histogram);

impl Default for Latency {
    fn default() -> Self {
        Self(Histogram::new(LATENCY_BITS))
    }
}

/// One queue's counters.
#[derive(Debug, Default)]
pub(crate) struct QueueCounters {
    pub size: AtomicU64,
    pub running: AtomicBool,
    /// The thread that serves it.
    pub thread: AtomicU64,
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub discards: AtomicU64,
    pub errors: AtomicU64,
    pub bytes_read: AtomicU64,
    pub bytes_written: AtomicU64,
    pub in_flight: AtomicU64,
    /// Requests that were given back, with whatever status.
    pub completed: AtomicU64,
    /// The index of the next request to be taken, as of the last turn of the queue's thread.
    taken: AtomicU16,
    /// Where the driver says how many there are; none while the queue takes none.
    driver: Mutex<Option<AvailWatch>>,
    pub replayed: AtomicU64,
    pub wakeups: AtomicU64,
    /// Requests that were found by looking, before the thread slept.
    pub polls: AtomicU64,
    pub calls: AtomicU64,
    /// From the turn in which a request was taken until it was shown to the driver, in ns.
    pub latency: Latency,
}

impl QueueCounters {
    /// From now on requests of this driver are taken; or of none.
    pub(crate) fn watch(&self, driver: Option<AvailWatch>) {
        *self.driver.lock().unwrap_or_else(PoisonError::into_inner) = driver;
    }

    /// The queue's thread has taken all requests below this index.
    pub(crate) fn took(&self, index: u16) {
        self.taken.store(index, Ordering::Relaxed);
    }

    /// Requests that the driver has made available and the queue's thread has not taken.
    pub(crate) fn waiting(&self) -> u64 {
        let driver = self.driver.lock().unwrap_or_else(PoisonError::into_inner);
        let available = driver.as_ref().map(AvailWatch::index);
        available.map_or(0, |index| index.wrapping_sub(self.taken.load(Ordering::Relaxed)).into())
    }
}

/// Adds to a counter of which this thread is the only writer.
#[inline]
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// What failed last on the host's side: a request, or, as "name" and "size", the image itself.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LastError {
    pub op: &'static str,
    pub offset: u64,
    pub length: u64,
    pub errno: i32,
    pub message: String,
    /// Seconds since 1970.
    pub time: f64,
}

/// Everything that is shared between the threads of a backend.
#[derive(Debug)]
pub(crate) struct Shared {
    phase: AtomicU8,
    pub timeline: Timeline,
    pub queues: Vec<QueueCounters>,
    pub connections: AtomicU64,
    /// This process went on with the connection of another.
    pub resumed: AtomicBool,
    pub protocol_errors: AtomicU64,
    pub guest_errors: AtomicU64,
    pub host_errors: AtomicU64,
    /// The guest's cache is write-through, by its choice or because it cannot flush.
    pub write_through: AtomicBool,
    pub tracked: AtomicBool,
    /// Whether flushes have failed.
    pub flushes: Flushes,
    arrival: AtomicU8,
    last_error: Mutex<Option<LastError>>,
}

impl Shared {
    pub(crate) fn new(num_queues: u16) -> Self {
        Self {
            phase: AtomicU8::new(Phase::Listening as u8),
            timeline: Timeline::default(),
            queues: (0..num_queues).map(|_| QueueCounters::default()).collect(),
            connections: AtomicU64::new(0),
            resumed: AtomicBool::new(false),
            protocol_errors: AtomicU64::new(0),
            guest_errors: AtomicU64::new(0),
            host_errors: AtomicU64::new(0),
            write_through: AtomicBool::new(false),
            tracked: AtomicBool::new(false),
            flushes: Flushes::default(),
            arrival: AtomicU8::new(Stage::Complete as u8),
            last_error: Mutex::new(None),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            x if x == Phase::Spare as u8 => Phase::Spare,
            x if x == Phase::Listening as u8 => Phase::Listening,
            x if x == Phase::Connected as u8 => Phase::Connected,
            x if x == Phase::Running as u8 => Phase::Running,
            _ => Phase::Draining,
        }
    }

    /// Moves on, unless the backend is about to end: that is final.
    pub(crate) fn set_phase(&self, phase: Phase) {
        if self.phase() != Phase::Draining {
            self.phase.store(phase as u8, Ordering::Release);
        }
    }

    /// How far the guest's memory has come.
    pub(crate) fn arrival(&self) -> Stage {
        Stage::ALL[usize::from(self.arrival.load(Ordering::Acquire))]
    }

    pub(crate) fn set_arrival(&self, stage: Stage) {
        self.arrival.store(stage as u8, Ordering::Release);
    }

    pub(crate) fn last_error(&self) -> Option<LastError> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records a failed request, and logs it unless the log would drown: each of the first ten,
    /// then each power of two.
    pub(crate) fn report_host_error(&self, error: LastError) {
        let n = self.host_errors.fetch_add(1, Ordering::Relaxed) + 1;
        if n <= 10 || n.is_power_of_two() {
            log::error!(
                "{} failed offset={} length={} error=\"{}\" errors_so_far={n}",
                error.op,
                error.offset,
                error.length,
                error.message
            );
        }
        self.note_error(error);
    }

    /// The region that outlives this process from now on may know of a flush that has failed.
    pub(crate) fn follow_flushes(&self, map: &Arc<InflightMap>) {
        if self.flushes.attach(map) {
            let said = flushes::explain("Input/output error");
            self.report_image_error("flush", (0, 0), libc::EIO, said);
        }
    }

    /// Records that something is wrong with the image itself, from byte `offset` on.
    pub(crate) fn report_image_error(
        &self,
        op: &'static str,
        (offset, length): (u64, u64),
        errno: i32,
        message: String,
    ) {
        log::error!("{message}");
        self.note_error(LastError { op, offset, length, errno, message, time: seconds_of_now() });
    }

    fn note_error(&self, error: LastError) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// Counts a message that made no sense, and logs it with the same restraint.
    pub(crate) fn report_protocol_error(&self, error: &dyn std::fmt::Display) {
        let n = self.protocol_errors.fetch_add(1, Ordering::Relaxed) + 1;
        if n <= 10 || n.is_power_of_two() {
            log::error!("dropping the front end error=\"{error}\" so_far={n}");
        }
    }

    /// Counts something that a guest got wrong, and logs it with the same restraint.
    pub(crate) fn report_guest_error(&self, queue: u16, what: &dyn std::fmt::Display) {
        let n = self.guest_errors.fetch_add(1, Ordering::Relaxed) + 1;
        if n <= 10 || n.is_power_of_two() {
            log::warn!("the guest broke the rules queue={queue} error=\"{what}\" so_far={n}");
        }
    }
}
