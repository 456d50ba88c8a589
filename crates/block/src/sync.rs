//! The synchronous engine: one system call for each request, in the queue's own thread.
//!
//! The fastest there is where the data is in memory already (tmpfs, page cache); where it is not,
//! each request waits for the one before it.

use std::io;
use std::os::fd::RawFd;

use crate::engine::{Engine, FileEngine, Submission, Target};
use crate::io::Io;
use crate::op::Op;
use crate::sleeper::Sleeper;

/// preadv, pwritev, fdatasync, fallocate.
pub struct SyncEngine {
    fd: RawFd,
    sleeper: Sleeper,
}

impl SyncEngine {
    /// For the image open as `fd`, which the caller keeps open.
    ///
    /// # Errors
    /// The kernel's, when it has no descriptor left.
    pub fn new(fd: RawFd) -> io::Result<Self> {
        Ok(Self { fd, sleeper: Sleeper::new()? })
    }
}

/// FALLOC_FL_* for a request; the size of the file never changes.
pub(crate) fn fallocate_mode(op: Op) -> i32 {
    match op {
        Op::WriteZeroes { unmap: false } => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        _ => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
    }
}

/// One system call on `fd`.
///
/// # Safety
/// As [`Engine::submit`].
#[inline]
unsafe fn call(fd: RawFd, io: &Io) -> Submission {
    let segments = io.segments();
    let count = segments.len().min(libc::UIO_MAXIOV as usize) as i32;
    let offset = io.offset as libc::off_t;
    // SAFETY: the caller keeps the segments mapped; the kernel checks the addresses and
    // answers EFAULT for those that are not.
    let result = unsafe {
        match (io.op, segments) {
            (Op::Read, [one]) => libc::pread(fd, one.iov_base, one.iov_len, offset),
            (Op::Read, _) => libc::preadv(fd, segments.as_ptr(), count, offset),
            (Op::Write { stable: false }, [one]) => {
                libc::pwrite(fd, one.iov_base, one.iov_len, offset)
            }
            (Op::Write { stable }, _) => {
                let flags = if stable { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(fd, segments.as_ptr(), count, offset, flags)
            }
            (Op::Flush, _) => libc::fdatasync(fd) as isize,
            (Op::Discard | Op::WriteZeroes { .. }, _) => {
                let len = io.len as libc::off_t;
                libc::fallocate(fd, fallocate_mode(io.op), offset, len) as isize
            }
        }
    };
    if result < 0 {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        return Submission::Done(-errno);
    }
    Submission::Done(i32::try_from(result).unwrap_or(i32::MAX))
}

impl FileEngine for SyncEngine {
    unsafe fn submit_to(&mut self, target: &Target, _token: u64, io: &Io) -> Submission {
        let fd = if io.op == Op::Flush { target.flushed } else { target.fd };
        // SAFETY: the caller's promise, handed on.
        unsafe { call(fd, io) }
    }
}

impl Engine for SyncEngine {
    const CONCURRENT: bool = false;

    unsafe fn submit(&mut self, _token: u64, io: &Io) -> Submission {
        // SAFETY: the caller's promise, handed on.
        unsafe { call(self.fd, io) }
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
