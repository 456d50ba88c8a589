//! The thread that finds out which pages of a mapped image are in memory, beside those that serve.
//!
//! Requests ask ([`Present::has`]); this thread looks at each piece of 2 MiB that was asked for (40 to
//! 70 µs), puts what is there into the page table (90 µs), and says so. Until then requests go by
//! system calls, which cost less than a fault for each page or for a few (see `touch`). It steps
//! back: lower priority, a pause after each round of questions, and pauses of up to a second when
//! nothing is found, as in a sparse image. A disk that nobody uses costs nothing: the thread sleeps
//! until it is asked.
//!
//! It has no files but one of its own: whoever waits for the image's lock need not wait for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

use crate::copy::copy;
use crate::present::{PAGE_SHIFT, PIECE_PAGES, PIECE_SHIFT, Present, State};

const PAGE: usize = 1 << PAGE_SHIFT;
const PIECE: u64 = 1 << PIECE_SHIFT;

/// After a round of questions.
const PAUSE: Duration = Duration::from_millis(1);
/// At most, while nothing is found.
const LONG_PAUSE: Duration = Duration::from_secs(1);
/// Below the threads that serve, and above those that nobody waits for.
const NICE: libc::c_int = 10;
/// What the kernel maps around a page that is touched.
const AROUND: usize = 64 << 10;

/// An image, mapped.
pub(crate) struct Range {
    /// Of `present.len()` bytes.
    pub base: *mut u8,
    pub present: Present,
    /// On tmpfs: what is a hole is found without a look at each page.
    pub lasting: bool,
}

// SAFETY: an address range; its users copy bytes that may change at any time.
unsafe impl Send for Range {}
// SAFETY: as above; `Present` is atomic.
unsafe impl Sync for Range {}

struct Signals {
    /// It sleeps until it is asked.
    idle: AtomicBool,
    end: AtomicBool,
}

/// The thread, from outside. Dropping it ends the thread, which does not touch the range any more.
pub(crate) struct Search {
    signals: Arc<Signals>,
    thread: Thread,
    handle: Option<JoinHandle<()>>,
}

impl Search {
    /// Starts it. `file` is the one that is mapped, and not the one that holds the image's lock.
    ///
    /// # Errors
    /// The system's, when it has no thread left.
    pub(crate) fn start(range: Arc<Range>, file: File) -> io::Result<Self> {
        let signals =
            Arc::new(Signals { idle: AtomicBool::new(false), end: AtomicBool::new(false) });
        let (theirs, fd) = (Arc::clone(&signals), file.as_raw_fd());
        let (ready, apart) = channel();
        let handle = thread::Builder::new().name("search".into()).spawn(move || {
            let _ = ready.send(keep_only(fd));
            step_back();
            Searcher { range, fd, signals: theirs }.run();
        })?;
        if apart.recv() != Ok(true) {
            // The thread shares our table of files, for as long as the process lives.
            std::mem::forget(file);
        }
        let thread = handle.thread().clone();
        Ok(Self { signals, thread, handle: Some(handle) })
    }

    /// Something was asked.
    #[inline]
    pub(crate) fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.signals.idle.load(Ordering::Relaxed)
            && self.signals.idle.swap(false, Ordering::Relaxed)
        {
            self.thread.unpark();
        }
    }
}

impl Drop for Search {
    fn drop(&mut self) {
        self.signals.end.store(true, Ordering::Relaxed);
        self.thread.unpark();
        let _ = self.handle.take().map(JoinHandle::join);
    }
}

/// Gives the calling thread a table of files of its own, with this one alone; false if that cannot
/// be done.
fn keep_only(fd: RawFd) -> bool {
    const UNSHARE: libc::c_uint = 1 << 1; // CLOSE_RANGE_UNSHARE
    let fd = fd.unsigned_abs();
    // SAFETY: no memory is passed. The first call makes the table this thread's own before any file
    // is closed, so that no other thread loses one.
    unsafe {
        if libc::syscall(libc::SYS_close_range, fd + 1, libc::c_uint::MAX, UNSHARE) != 0 {
            return false;
        }
        fd == 0 || libc::syscall(libc::SYS_close_range, 0, fd - 1, 0) == 0
    }
}

struct Searcher {
    range: Arc<Range>,
    fd: RawFd,
    signals: Arc<Signals>,
}

impl Searcher {
    fn run(self) {
        let mut pause = PAUSE;
        while !self.signals.end.load(Ordering::Relaxed) {
            let (pieces, pages) = self.answer();
            if pieces > 0 {
                let pays = pages * 8 >= pieces * PIECE_PAGES;
                pause = if pays { PAUSE } else { (pause * 2).min(LONG_PAUSE) };
                thread::park_timeout(pause);
            } else {
                self.wait();
            }
        }
    }

    /// Answers what was asked; the pieces looked at, and the pages found.
    fn answer(&self) -> (usize, usize) {
        let (mut pieces, mut pages) = (0, 0);
        for piece in self.range.present.questions() {
            pieces += 1;
            pages += self.range.present.answer(piece, || {
                let found = self.search(piece)?;
                self.touch(piece, &found);
                Some(found)
            });
        }
        (pieces, pages)
    }

    fn extent(&self, piece: u64) -> (u64, usize) {
        let start = piece << PIECE_SHIFT;
        (start, self.range.present.len().saturating_sub(start).min(PIECE) as usize)
    }

    /// Which pages are there; `None` if the piece has none, as far as can be told.
    fn search(&self, piece: u64) -> Option<Vec<bool>> {
        let (start, bytes) = self.extent(piece);
        if self.range.lasting {
            // Only SEEK_DATA, which stops at the first page. SEEK_HOLE walks to the end of the
            // data: 5 ms for each GiB.
            let from = libc::off_t::try_from(start).unwrap_or(libc::off_t::MAX);
            // SAFETY: no memory is passed.
            let data = unsafe { libc::lseek(self.fd, from, libc::SEEK_DATA) };
            if u64::try_from(data).is_ok_and(|data| data >= start + bytes as u64) {
                return None;
            }
            if data < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) {
                return None;
            }
        }
        let mut found = [0u8; PIECE_PAGES];
        // SAFETY: the range is inside the mapping, and there is a byte for each of its pages.
        let status = unsafe {
            let at = self.range.base.add(start as usize);
            libc::mincore(at.cast(), bytes, found.as_mut_ptr())
        };
        let pages = &found[..bytes / PAGE];
        (status == 0).then(|| pages.iter().map(|page| page & 1 != 0).collect())
    }

    /// Has the kernel put what was found into the page table. Not by MADV_POPULATE_*, which goes from
    /// page to page (143 to 460 µs for a piece), and would fill what is discarded meanwhile: a touch
    /// brings what is there around it (90 µs), and fills one page of sixteen.
    fn touch(&self, piece: u64, found: &[bool]) {
        let (start, _) = self.extent(piece);
        for (group, pages) in found.chunks(AROUND / PAGE).enumerate() {
            let Some(page) = pages.iter().position(|there| *there) else { continue };
            // A discard of what was just found.
            if self.range.present.state(piece) == State::Unknown {
                return;
            }
            let mut byte = 0u8;
            let offset = start as usize + group * AROUND + page * PAGE;
            // SAFETY: the page is inside the mapping, and `Mapping::new` called `prepare`.
            unsafe { copy(&mut byte, self.range.base.add(offset), 1) };
        }
    }

    /// Sleeps until something is asked.
    fn wait(&self) {
        self.signals.idle.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let asked = self.range.present.is_asked() || self.signals.end.load(Ordering::Relaxed);
        if !asked {
            thread::park();
        }
        self.signals.idle.store(false, Ordering::Relaxed);
    }
}

/// Behind everybody else, also where whoever started this thread comes before them.
fn step_back() {
    let ordinary = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure lives across the call. On Linux both calls concern the calling thread.
    unsafe {
        libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const ordinary);
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
    }
}
