//! The io_uring engine: many requests in flight from one thread, one system call for a batch.
//!
//! Two features that would make it a little cheaper are left out on purpose, because they make
//! the *next* process wait. The image lock is free when the last reference to the open file is
//! gone (see `lock`). A registered file is let go only when the kernel has torn down the dead
//! process's ring, 20 to 60 ms after its death; and with deferred task work, requests that end
//! after the death wait for the same tear-down, which looks every 50 ms. Measured from SIGKILL to
//! the lock in the next process, O_DIRECT on ext4 under load, median: 41 ms with both, 7 ms with
//! deferred task work alone, 2 ms with neither. The price is 0.1 to 0.5 µs of processor time for
//! each request.
//!
//! What is in flight at the death still keeps the lock for two ticks of the kernel's clock longer than
//! the medium takes: completions of a task that is gone, and the last reference to a file, wait for one
//! each (8 to 20 ms at 250 Hz). That is right for whatever writes to the medium or to the guest's
//! memory, and needless for a flush, which changes nothing when it comes late: so a flush goes
//! through a file of its own, which has no lock.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::types::Fd;
use io_uring::{opcode, squeue};

use crate::engine::{Engine, FileEngine, Submission, Target};
use crate::io::Io;
use crate::op::Op;
use crate::rings::{Ring, Rings};
use crate::sync::fallocate_mode;

const ENTER_GETEVENTS: u32 = 1;
/// Tokens of wakers have the top bit; the descriptor is below it.
const WAKER: u64 = 1 << 63;
/// Completions of our own cancel requests.
const IGNORED: u64 = u64::MAX;

/// io_uring, used by one thread at a time.
pub struct UringEngine {
    image: Fd,
    /// The image opened once more, for flushes.
    flushed: File,
    ring: Ring,
    in_flight: usize,
    /// Wakers whose poll ended and must be armed again.
    rearm: Vec<RawFd>,
    wakers: Vec<RawFd>,
}

impl UringEngine {
    /// For the image open as `fd`, which the caller keeps open.
    ///
    /// # Errors
    /// The kernel's: io_uring may be switched off.
    pub fn new(fd: RawFd) -> io::Result<Self> {
        Self::with(fd, &Rings::prepare(1)?)
    }

    /// As [`UringEngine::new`], with one of these rings.
    ///
    /// # Errors
    /// None is left; or the image cannot be opened once more.
    pub fn with(fd: RawFd, rings: &Rings) -> io::Result<Self> {
        // Not for writing: fdatasync needs no right to it.
        let flushed = File::open(format!("/proc/self/fd/{fd}"))?;
        let (image, ring) = (Fd(fd), rings.lend()?);
        Ok(Self { image, flushed, ring, in_flight: 0, rearm: Vec::new(), wakers: Vec::new() })
    }

    /// Puts an entry into the submission queue, making room if there is none.
    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the memory that the entry names lives until completion: the caller of
            // `submit` promises it; polls and cancels name none.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
    }

    fn enter(&mut self, want: u32) -> io::Result<()> {
        let pending = self.ring.submission().len() as u32;
        // SAFETY: no argument structure is passed; entries were vouched for when pushed.
        let entered =
            unsafe { self.ring.submitter().enter::<()>(pending, want, ENTER_GETEVENTS, None) };
        match entered {
            Ok(_) => Ok(()),
            // Interrupted, or completions must be taken first: the caller reaps and comes again.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn arm(&mut self, fd: RawFd) -> io::Result<()> {
        let token = WAKER | fd as u64;
        let entry =
            opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).multi(true).build().user_data(token);
        self.push(&entry)
    }

    /// Puts a request into the ring: on `image`, a flush on `flushed`, which is the same file.
    fn queue(&mut self, image: Fd, flushed: Fd, token: u64, io: &Io) -> Submission {
        let segments = io.segments();
        let count = segments.len().min(libc::UIO_MAXIOV as usize) as u32;
        let entry = match (io.op, segments) {
            (Op::Read, [one]) => {
                opcode::Read::new(image, one.iov_base.cast(), bounded(one.iov_len))
                    .offset(io.offset)
                    .build()
            }
            (Op::Read, _) => {
                opcode::Readv::new(image, segments.as_ptr(), count).offset(io.offset).build()
            }
            (Op::Write { stable }, [one]) => {
                opcode::Write::new(image, one.iov_base.cast(), bounded(one.iov_len))
                    .offset(io.offset)
                    .rw_flags(if stable { libc::RWF_DSYNC } else { 0 })
                    .build()
            }
            (Op::Write { stable }, _) => opcode::Writev::new(image, segments.as_ptr(), count)
                .offset(io.offset)
                .rw_flags(if stable { libc::RWF_DSYNC } else { 0 })
                .build(),
            (Op::Flush, _) => {
                opcode::Fsync::new(flushed).flags(io_uring::types::FsyncFlags::DATASYNC).build()
            }
            (Op::Discard | Op::WriteZeroes { .. }, _) => opcode::Fallocate::new(image, io.len)
                .offset(io.offset)
                .mode(fallocate_mode(io.op))
                .build(),
        };
        match self.push(&entry.user_data(token)) {
            Ok(()) => {
                self.in_flight += 1;
                Submission::Queued
            }
            Err(error) => Submission::Done(-error.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}

impl FileEngine for UringEngine {
    unsafe fn submit_to(&mut self, target: &Target, token: u64, io: &Io) -> Submission {
        self.queue(Fd(target.fd), Fd(target.flushed), token, io)
    }
}

impl Engine for UringEngine {
    const CONCURRENT: bool = true;

    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        self.queue(self.image, Fd(self.flushed.as_raw_fd()), token, io)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.in_flight == 0 && self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(0)
    }

    fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        let mut completions = self.ring.completion();
        for entry in &mut completions {
            match entry.user_data() {
                IGNORED => {}
                token if token & WAKER != 0 => {
                    if !io_uring::cqueue::more(entry.flags()) {
                        self.rearm.push((token & !WAKER) as RawFd);
                    }
                }
                token => {
                    self.in_flight -= 1;
                    into.push((token, entry.result()));
                }
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn add_waker(&mut self, fd: RawFd) -> io::Result<()> {
        self.wakers.push(fd);
        self.arm(fd)?;
        self.enter(0)
    }

    fn remove_waker(&mut self, fd: RawFd) {
        self.wakers.retain(|&waker| waker != fd);
        self.rearm.retain(|&waker| waker != fd);
        let entry = opcode::PollRemove::new(WAKER | fd as u64).build().user_data(IGNORED);
        // Nothing to do on failure: the poll holds the eventfd open, and a stray wake is harmless.
        let _ = self.push(&entry).and_then(|()| self.enter(0));
    }

    fn wait(&mut self) -> io::Result<()> {
        while let Some(fd) = self.rearm.pop() {
            if self.wakers.contains(&fd) {
                self.arm(fd)?;
            }
        }
        self.enter(1)
    }
}

/// One transfer's bound in the kernel (MAX_RW_COUNT, page-aligned); the rest is submitted again.
fn bounded(len: usize) -> u32 {
    len.min(0x7fff_f000) as u32
}
