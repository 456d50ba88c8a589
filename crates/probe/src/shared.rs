//! What the lanes of one run share: where they write, what they know, and the accounts of what they did.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::Serialize;

use crate::clock::now_ns;
use crate::config::Config;
use crate::device::Device;
use crate::judge::{Expectation, Wrong, describe, judge};
use crate::ledger::{Entry, Ledger};
use crate::stamp::{Identity, SECTOR};
use crate::timeline::{Gaps, Timeline};
use crate::wakeup::Wakeup;
use semper_histogram::Histogram;

const ERRORS_KEPT: usize = 20;
const DETAILS_KEPT: usize = 10;
/// The kind of a request.
#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// A block is read.
    Read,
    /// A block is written.
    Write,
    /// The device is flushed.
    Flush,
    /// The device is opened again.
    Open,
}

/// A request that failed.
#[derive(Clone, Debug, Serialize)]
pub struct IoError {
    op: Op,
    block: u64,
    /// 0 = a short transfer.
    errno: i32,
    monotonic_ns: u64,
}

/// A block that was wrong.
#[derive(Clone, Debug, Serialize)]
pub struct WrongBlock {
    kind: &'static str,
    block: u64,
    offset: u64,
    writer: u32,
    acked: u32,
    attempted: u32,
    found: String,
    monotonic_ns: u64,
}

/// Wrong blocks by kind, and the first few of them.
#[derive(Clone, Debug, Default)]
pub struct WrongTally {
    /// Lost, torn, misplaced, foreign.
    pub counts: [u64; 4],
    /// The first ten.
    pub details: Vec<WrongBlock>,
}

/// What one lane tells the rest; written by the lane alone.
#[derive(Debug, Default)]
pub struct LaneState {
    /// When the request in flight was issued; 0 = none is.
    pub issued_ns: AtomicU64,
    /// The lane ended.
    pub ended: AtomicBool,
    /// Completed writes.
    pub writes: AtomicU64,
    /// Completed reads.
    pub reads: AtomicU64,
    /// Reads whose contents were judged.
    pub verified: AtomicU64,
    /// Completed flushes.
    pub flushes: AtomicU64,
    /// Requests that came back later than `hang_s`.
    pub late: AtomicU64,
}

/// What the lanes of one run share.
#[derive(Debug)]
pub struct Shared {
    /// Checked arguments.
    pub config: Config,
    /// Where they write.
    pub device: Device,
    /// Goes into every stamp.
    pub identity: Identity,
    /// What is known about each block.
    pub ledger: Arc<Ledger>,
    /// When the run began, before any resumption.
    pub started_ns: u64,
    /// Completions in bins.
    pub timeline: Timeline,
    /// Intervals without completions.
    pub gaps: Gaps,
    /// Latencies of completed requests.
    pub latency: Histogram,
    /// Lanes end when they see it.
    pub stop: AtomicBool,
    /// The stop's deadline passed: whoever is still out is hung.
    pub overdue: AtomicBool,
    /// The final verification reads: nobody may write.
    pub verifying: AtomicBool,
    /// One for each lane started, in this run and in those that it resumed.
    pub lanes: Mutex<Vec<Arc<LaneState>>>,
    /// How many failed.
    pub error_count: AtomicU64,
    /// The lanes that run now.
    pub active: AtomicU32,
    errors: Mutex<VecDeque<IoError>>,
    wrong: Mutex<WrongTally>,
    wakeup: Wakeup,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a thread that panics ends the probe")
}

impl Shared {
    /// Of a run that has no lanes yet.
    pub fn new(
        config: Config,
        device: Device,
        identity: Identity,
        ledger: Arc<Ledger>,
        wakeup: Wakeup,
    ) -> Self {
        Self {
            identity,
            device,
            ledger,
            config,
            started_ns: now_ns(),
            timeline: Timeline::default(),
            gaps: Gaps::default(),
            latency: Histogram::default(),
            stop: AtomicBool::new(true),
            overdue: AtomicBool::new(false),
            verifying: AtomicBool::new(false),
            lanes: Mutex::default(),
            error_count: AtomicU64::new(0),
            active: AtomicU32::new(0),
            errors: Mutex::default(),
            wrong: Mutex::default(),
            wakeup,
        }
    }

    /// The state of one more lane that runs.
    pub fn enlist(&self) -> Arc<LaneState> {
        let state = Arc::new(LaneState::default());
        locked(&self.lanes).push(Arc::clone(&state));
        self.active.fetch_add(1, Ordering::AcqRel);
        state
    }

    /// Where block `index` of the span is on the device, in bytes.
    pub fn offset_of(&self, index: usize) -> u64 {
        self.config.offset_bytes + index as u64 * u64::from(self.config.block_size)
    }

    /// What block `index` of the span may hold, given what the ledger says.
    pub fn expectation(&self, index: usize, entry: Entry) -> Expectation {
        Expectation {
            identity: self.identity,
            first_sector: self.offset_of(index) / SECTOR as u64,
            run: self.ledger.run,
            writer: (index as u64 % u64::from(self.config.lanes())) as u32,
            acked: entry.acked,
            attempted: entry.attempted,
            allowed: entry.allowed,
        }
    }

    /// Judges a block that was read, and counts it if it is wrong and not counted yet.
    pub fn check(&self, index: usize, bytes: &[u8], expect: &Expectation) -> Option<Wrong> {
        let wrong = judge(bytes, expect)?;
        if self.ledger.report(index) {
            let mut tally = locked(&self.wrong);
            let (slot, kind) = match wrong {
                Wrong::Lost => (0, "lost"),
                Wrong::Torn => (1, "torn"),
                Wrong::Misplaced => (2, "misplaced"),
                Wrong::Foreign => (3, "foreign"),
            };
            tally.counts[slot] += 1;
            if tally.details.len() < DETAILS_KEPT {
                let offset = expect.first_sector * SECTOR as u64;
                tally.details.push(WrongBlock {
                    kind,
                    block: offset / u64::from(self.config.block_size),
                    offset,
                    writer: expect.writer,
                    acked: expect.acked,
                    attempted: expect.attempted,
                    found: describe(bytes),
                    monotonic_ns: now_ns(),
                });
            }
        }
        Some(wrong)
    }

    /// Notes a request that failed.
    pub fn failed(&self, op: Op, index: usize, errno: i32) {
        self.error_count.fetch_add(1, Ordering::Relaxed);
        let mut errors = locked(&self.errors);
        if errors.len() == ERRORS_KEPT {
            errors.pop_front();
        }
        let block = self.config.offset_bytes / u64::from(self.config.block_size) + index as u64;
        errors.push_back(IoError { op, block, errno, monotonic_ns: now_ns() });
    }

    /// The newest failed requests.
    pub fn errors(&self) -> Vec<IoError> {
        locked(&self.errors).iter().cloned().collect()
    }

    /// The wrong blocks so far.
    pub fn wrong(&self) -> WrongTally {
        locked(&self.wrong).clone()
    }

    /// Requests that are out for too long; after the stop's deadline, lanes that did not come back.
    pub fn hung(&self, now_ns: u64) -> u64 {
        if self.overdue.load(Ordering::Acquire) {
            return u64::from(self.active.load(Ordering::Acquire));
        }
        let hung = |lane: &&Arc<LaneState>| {
            let issued = lane.issued_ns.load(Ordering::Acquire);
            issued != 0 && now_ns.saturating_sub(issued) > self.config.hang_ns()
        };
        locked(&self.lanes).iter().filter(hung).count() as u64
    }

    /// Called by a lane as its last act.
    pub fn lane_ended(&self, lane: &LaneState) {
        lane.ended.store(true, Ordering::Release);
        if self.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Only now: a stall that goes on while the run stops still counts.
            self.gaps.stop();
        }
        self.wakeup.wake();
    }
}
