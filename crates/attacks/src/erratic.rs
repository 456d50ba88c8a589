//! An engine that is as awkward as its contract allows.

use std::io;
use std::os::fd::RawFd;

use semper_block::{Engine, Io, NullEngine, Submission};

/// Touches no data. Gives requests back late and in the wrong order; some are short, end early, or
/// fail; a few have to be tried again.
pub(crate) struct Erratic {
    sleeper: NullEngine,
    queued: Vec<(u64, u64)>,
    turn: u64,
}

impl Erratic {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { sleeper: NullEngine::new()?, queued: Vec::new(), turn: 0 })
    }

    fn result(&mut self, len: u64) -> i32 {
        self.turn = self.turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let whole = i32::try_from(len).unwrap_or(i32::MAX);
        match self.turn >> 60 {
            0 => -libc::EIO,
            1 => -libc::EOPNOTSUPP,
            2 => -libc::EINTR,
            3 => 0,
            4 => whole / 2,
            5 => whole.min(1),
            _ => whole,
        }
    }
}

impl Engine for Erratic {
    const CONCURRENT: bool = true;

    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        if self.turn & 7 == 7 {
            return Submission::Done(self.result(io.len));
        }
        self.queued.push((token, io.len));
        Submission::Queued
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        // The last first, and only half of them.
        for _ in 0..self.queued.len().div_ceil(2) {
            if let Some((token, len)) = self.queued.pop() {
                into.push((token, self.result(len)));
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.queued.len()
    }

    fn add_waker(&mut self, fd: RawFd) -> io::Result<()> {
        self.sleeper.add_waker(fd)
    }

    fn remove_waker(&mut self, fd: RawFd) {
        self.sleeper.remove_waker(fd);
    }

    fn wait(&mut self) -> io::Result<()> {
        if self.queued.is_empty() { self.sleeper.wait() } else { Ok(()) }
    }
}
