//! The thread that drives one or several lanes.
//!
//! ```text
//!   Warmup ──> Measure ──> Drain ──> (ReadBack) ──> end
//!      └──────────┴──────────┴────────────┴──> Abort: end at once
//! ```
//!
//! The main thread moves the phase and wakes sleepers by their lanes' eventfds. A worker tells it
//! when all its lanes are empty, and waits there until it may read back what it wrote.

use crate::lane::{Lane, Source};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Where the run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Load that is not counted.
    Warmup,
    /// Load that is counted.
    Measure,
    /// No new requests.
    Drain,
    /// Everything written is read once more.
    ReadBack,
    /// Over, whatever is in flight.
    Abort,
}

/// What the main thread and the workers share.
pub struct Control {
    phase: AtomicU8,
    started: Instant,
    /// The same instant by CLOCK_MONOTONIC, which other processes read as well.
    pub started_ns: u64,
    /// Completions so far, updated now and then: that it grows shows a living backend.
    pub progress: AtomicU64,
    gate: Mutex<()>,
    moved: Condvar,
}

fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

impl Default for Control {
    fn default() -> Self {
        Self {
            phase: AtomicU8::new(Phase::Warmup as u8),
            started: Instant::now(),
            started_ns: monotonic_ns(),
            progress: AtomicU64::new(0),
            gate: Mutex::new(()),
            moved: Condvar::new(),
        }
    }
}

impl Control {
    /// The present phase.
    #[inline]
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Warmup,
            1 => Phase::Measure,
            2 => Phase::Drain,
            3 => Phase::ReadBack,
            _ => Phase::Abort,
        }
    }

    /// Moves on. Threads that sleep on a lane have to be woken by the caller.
    pub fn enter(&self, phase: Phase) {
        let _gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        self.phase.fetch_max(phase as u8, Ordering::Release);
        self.moved.notify_all();
    }

    fn wait_beyond(&self, phase: Phase) -> Phase {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        while self.phase() <= phase {
            gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        self.phase()
    }
}

/// How a worker waits for completions.
#[derive(Clone, Copy, Debug)]
pub enum Waiting {
    /// Never sleeps.
    Spin,
    /// Spins for so long, then sleeps.
    Sleep(Duration),
}

/// Runs the lanes to the end. `drained` is called when the load is over and nothing in flight.
///
/// # Errors
/// The ring or a notification failed, which only a broken backend can bring about.
pub fn run(
    lanes: &mut [Lane],
    control: &Control,
    waiting: Waiting,
    drained: impl FnOnce(),
) -> io::Result<()> {
    if lanes.iter().any(Lane::is_paced) {
        wake_in_time();
    }
    for lane in lanes.iter_mut() {
        lane.begin(control.started);
        lane.fill(Source::Load)?;
    }
    let mut phase = Phase::Warmup;
    loop {
        let current = control.phase();
        if current != phase {
            phase = current;
            lanes.iter_mut().for_each(|lane| lane.measure(phase == Phase::Measure));
        }
        if phase == Phase::Abort {
            return Ok(());
        }
        let source = if phase < Phase::Drain { Source::Load } else { Source::Nothing };
        let over =
            |lane: &Lane| phase >= Phase::Drain || phase == Phase::Measure && lane.is_spent();
        if lanes.iter().all(|lane| lane.in_flight() == 0 && over(lane)) {
            break;
        }
        turn(lanes, control, waiting, source, phase)?;
    }
    lanes.iter_mut().for_each(|lane| lane.measure(false));
    drained();
    if control.wait_beyond(Phase::Drain) == Phase::Abort {
        return Ok(());
    }
    for lane in lanes.iter_mut() {
        lane.fill(Source::ReadBack)?;
    }
    while control.phase() != Phase::Abort && lanes.iter().any(|lane| lane.in_flight() > 0) {
        turn(lanes, control, waiting, Source::ReadBack, Phase::ReadBack)?;
    }
    Ok(())
}

/// Takes what is complete on all lanes, or waits for the first completion.
fn turn(
    lanes: &mut [Lane],
    control: &Control,
    waiting: Waiting,
    source: Source,
    phase: Phase,
) -> io::Result<()> {
    let mut spinning_since = None;
    loop {
        let mut completed = 0;
        for lane in lanes.iter_mut() {
            completed += lane.pump(source)?;
            if source == Source::Load {
                lane.arrive()?;
            }
        }
        if completed > 0 {
            control.progress.fetch_add(completed as u64, Ordering::Relaxed);
            return Ok(());
        }
        if control.phase() != phase {
            return Ok(());
        }
        std::hint::spin_loop();
        if let Waiting::Sleep(after) = waiting {
            let since = *spinning_since.get_or_insert_with(Instant::now);
            if after.is_zero() || since.elapsed() >= after {
                return sleep(lanes, source);
            }
        }
    }
}

/// Asks the kernel to end this thread's sleeps when they are over, and not up to 50 µs later.
fn wake_in_time() {
    // SAFETY: takes numbers only, and concerns this thread alone.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

/// Sleeps until the backend or the main thread signals a lane, or a request arrives.
fn sleep(lanes: &mut [Lane], source: Source) -> io::Result<()> {
    if !lanes.iter_mut().all(Lane::prepare_sleep) {
        return Ok(());
    }
    lanes[0].count_sleep();
    let wait = match source {
        Source::Load => lanes.iter().filter_map(Lane::wait).min(),
        Source::ReadBack | Source::Nothing => None,
    };
    if let ([lane], None) = (&*lanes, wait) {
        match lane.call.read() {
            // QEMU makes every descriptor it is given non-blocking, for both ends; `run` undoes
            // that once, and a backend that comes back does it again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other.map(drop),
        }
    }
    let mut fds: Vec<_> = lanes
        .iter()
        .map(|lane| PollFd::from_borrowed_fd(lane.call.as_fd(), PollFlags::IN))
        .collect();
    let timeout = wait.map(|wait| Timespec {
        tv_sec: wait.as_secs() as i64,
        tv_nsec: i64::from(wait.subsec_nanos()),
    });
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    for (lane, fd) in lanes.iter().zip(&fds) {
        if fd.revents().contains(PollFlags::IN) {
            lane.call.read()?;
        }
    }
    Ok(())
}
