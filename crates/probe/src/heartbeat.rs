//! The heartbeat: an event at a fixed interval, for measuring how long a guest stood still.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde_json::{Value, json};

use crate::clock::now_ns;

/// A timer that the control loop polls.
pub struct Heartbeat {
    timer: OwnedFd,
    seq: u64,
}

impl Heartbeat {
    /// One that does not beat yet.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { timer: timerfd_create(TimerfdClockId::Monotonic, flags)?, seq: 0 })
    }

    /// Beats every `interval_ms` from now on; 0 = stops.
    pub fn set(&mut self, interval_ms: u64) -> io::Result<()> {
        let interval = Timespec {
            tv_sec: (interval_ms / 1000) as i64,
            tv_nsec: (interval_ms % 1000 * 1_000_000) as i64,
        };
        let timer = Itimerspec { it_interval: interval, it_value: interval };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer)?;
        Ok(())
    }

    /// The event, if a beat is due. Beats that were missed are one event, which says how many.
    pub fn due(&mut self) -> Option<Value> {
        let mut beats = [0; 8];
        rustix::io::read(&self.timer, &mut beats).ok()?;
        let missed = u64::from_ne_bytes(beats) - 1;
        self.seq += 1;
        let event =
            json!({"event": "beat", "seq": self.seq, "missed": missed, "monotonic_ns": now_ns()});
        Some(event)
    }
}

impl AsFd for Heartbeat {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
