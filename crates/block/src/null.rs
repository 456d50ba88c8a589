//! The engine that does nothing: the floor under every measurement of the data path.

use std::io;
use std::os::fd::RawFd;

use crate::engine::{Engine, FileEngine, Submission, Target};
use crate::io::Io;
use crate::sleeper::Sleeper;

/// Every request succeeds at once; reads leave the guest's memory as it is.
pub struct NullEngine {
    sleeper: Sleeper,
}

impl NullEngine {
    /// # Errors
    /// The kernel's, when it has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { sleeper: Sleeper::new()? })
    }
}

impl FileEngine for NullEngine {
    unsafe fn submit_to(&mut self, _target: &Target, token: u64, io: &Io) -> Submission {
        // SAFETY: the caller's promise, handed on.
        unsafe { self.submit(token, io) }
    }
}

impl Engine for NullEngine {
    const CONCURRENT: bool = false;

    unsafe fn submit(&mut self, _token: u64, io: &Io) -> Submission {
        Submission::Done(i32::try_from(io.len).unwrap_or(i32::MAX))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, _into: &mut Vec<(u64, i32)>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn add_waker(&mut self, fd: RawFd) -> io::Result<()> {
        self.sleeper.add(fd)
    }

    fn remove_waker(&mut self, fd: RawFd) {
        self.sleeper.remove(fd);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.sleeper.sleep()
    }
}
