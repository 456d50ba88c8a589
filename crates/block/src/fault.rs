//! Errors and delays on demand, around any engine, in builds for tests.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::engine::{Engine, Submission};
use crate::io::Io;
use crate::op::Op;

/// What to do to which requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultRule {
    /// Name of the operation (`read`, `write`, `flush`, `discard`, `write-zeroes`); all if absent.
    pub op: Option<String>,
    /// Errno that the request fails with; absent = it is carried out; 0 = it is not carried out, and
    /// answered as if it was, which a test has to notice.
    pub errno: Option<i32>,
    /// Every n-th request that matches; 0 and 1 mean each.
    pub every: u64,
    /// At most that many requests in all; 0 = no limit.
    pub limit: u64,
    /// Wait before the request is carried out or failed, in the thread of the queue.
    pub delay: Duration,
}

#[derive(Debug, Default)]
struct Armed {
    rule: FaultRule,
    seen: u64,
    hit: u64,
}

/// The switch of all fault engines of one disk. Off at first.
#[derive(Clone, Debug, Default)]
pub struct FaultSwitch {
    on: Arc<AtomicBool>,
    armed: Arc<Mutex<Armed>>,
}

impl FaultSwitch {
    /// Puts `rule` into force, or none; counts start anew.
    pub fn set(&self, rule: Option<FaultRule>) {
        let on = rule.is_some();
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner) =
            Armed { rule: rule.unwrap_or_default(), ..Armed::default() };
        self.on.store(on, Ordering::Release);
    }

    fn strike(&self, op: Op) -> Option<FaultRule> {
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.rule.op.as_deref().is_some_and(|name| name != op.name()) {
            return None;
        }
        armed.seen += 1;
        let due = armed.seen % armed.rule.every.max(1) == 0;
        if !due || (armed.rule.limit > 0 && armed.hit >= armed.rule.limit) {
            return None;
        }
        armed.hit += 1;
        Some(armed.rule.clone())
    }
}

/// An engine that fails and delays requests while its switch is on, and is transparent otherwise.
pub struct FaultEngine<E> {
    inner: E,
    switch: FaultSwitch,
}

impl<E: Engine> FaultEngine<E> {
    /// Around `inner`.
    pub fn new(inner: E, switch: FaultSwitch) -> Self {
        Self { inner, switch }
    }
}

impl<E: Engine> Engine for FaultEngine<E> {
    const CONCURRENT: bool = E::CONCURRENT;

    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        if self.switch.on.load(Ordering::Acquire)
            && let Some(rule) = self.switch.strike(io.op)
        {
            std::thread::sleep(rule.delay);
            if rule.errno == Some(0) {
                return Submission::Done(i32::try_from(io.len).unwrap_or(i32::MAX));
            }
            if let Some(errno) = rule.errno {
                return Submission::Done(-errno);
            }
        }
        // SAFETY: the caller's promise, handed on.
        unsafe { self.inner.submit(token, io) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }

    fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        self.inner.reap(into);
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn add_waker(&mut self, fd: RawFd) -> io::Result<()> {
        self.inner.add_waker(fd)
    }

    fn remove_waker(&mut self, fd: RawFd) {
        self.inner.remove_waker(fd);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.inner.wait()
    }
}
