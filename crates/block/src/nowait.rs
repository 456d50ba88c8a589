//! The engine for cached images: a system call that refuses to wait, and io_uring for what would.
//!
//! A read that the page cache can serve is done at once, in the queue's thread; one that has to go
//! to the medium does not hold up those behind it. Writes go into the cache by a plain system call
//! where the file system cannot promise not to wait (ext4 cannot); flushes, discards and durable
//! writes always wait for the medium and go through io_uring.

use std::io;
use std::os::fd::RawFd;

use crate::engine::{Engine, FileEngine, Submission, Target};
use crate::io::Io;
use crate::op::Op;
use crate::rings::Rings;
use crate::uring::UringEngine;

/// preadv2 and pwritev2 with RWF_NOWAIT, and [`UringEngine`] behind them.
pub struct NowaitEngine {
    fd: RawFd,
    behind: UringEngine,
    /// The file system knows RWF_NOWAIT, for reads and for writes.
    reads: bool,
    writes: bool,
}

impl NowaitEngine {
    /// For the image open as `fd`, which the caller keeps open.
    ///
    /// # Errors
    /// The kernel's: io_uring may be switched off.
    pub fn new(fd: RawFd) -> io::Result<Self> {
        Self::with(fd, &Rings::prepare(1)?)
    }

    /// As [`NowaitEngine::new`], with one of these rings.
    ///
    /// # Errors
    /// None is left.
    pub fn with(fd: RawFd, rings: &Rings) -> io::Result<Self> {
        Ok(Self { fd, behind: UringEngine::with(fd, rings)?, reads: true, writes: true })
    }

    /// One system call; `None` if it would have to wait.
    ///
    /// # Safety
    /// As [`Engine::submit`].
    unsafe fn at_once(&mut self, fd: RawFd, io: &Io) -> Option<i32> {
        let segments = io.segments();
        let count = segments.len().min(libc::UIO_MAXIOV as usize) as i32;
        let offset = io.offset as libc::off_t;
        let read = io.op == Op::Read;
        let refuses = if read { self.reads } else { self.writes };
        let flags = if refuses { libc::RWF_NOWAIT } else { 0 };
        // SAFETY: the caller keeps the segments mapped; the kernel checks the addresses.
        let result = unsafe {
            if read {
                libc::preadv2(fd, segments.as_ptr(), count, offset, flags)
            } else {
                libc::pwritev2(fd, segments.as_ptr(), count, offset, flags)
            }
        };
        if result >= 0 {
            return Some(i32::try_from(result).unwrap_or(i32::MAX));
        }
        match io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) {
            libc::EAGAIN if refuses => None,
            libc::EOPNOTSUPP if refuses => {
                *(if read { &mut self.reads } else { &mut self.writes }) = false;
                // SAFETY: as above; this time without the flag.
                unsafe { self.at_once(fd, io) }
            }
            errno => Some(-errno),
        }
    }
}

impl FileEngine for NowaitEngine {
    unsafe fn submit_to(&mut self, target: &Target, token: u64, io: &Io) -> Submission {
        if matches!(io.op, Op::Read | Op::Write { stable: false }) {
            // SAFETY: the caller's promise, handed on; so below.
            if let Some(result) = unsafe { self.at_once(target.fd, io) } {
                return Submission::Done(result);
            }
        }
        // SAFETY: see above.
        unsafe { self.behind.submit_to(target, token, io) }
    }
}

impl Engine for NowaitEngine {
    const CONCURRENT: bool = true;

    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        if matches!(io.op, Op::Read | Op::Write { stable: false }) {
            // SAFETY: the caller's promise, handed on; so below.
            if let Some(result) = unsafe { self.at_once(self.fd, io) } {
                return Submission::Done(result);
            }
        }
        // SAFETY: see above.
        unsafe { self.behind.submit(token, io) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.behind.flush()
    }

    fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        self.behind.reap(into);
    }

    fn in_flight(&self) -> usize {
        self.behind.in_flight()
    }

    fn add_waker(&mut self, fd: RawFd) -> io::Result<()> {
        self.behind.add_waker(fd)
    }

    fn remove_waker(&mut self, fd: RawFd) {
        self.behind.remove_waker(fd);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.behind.wait()
    }
}
