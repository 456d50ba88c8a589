//! The memory-mapped engine: requests are copied to and from a mapping of the image.
//!
//! Where the image is in memory already, no system call is left in the path of a request. What
//! must be got right for it:
//!
//! * A page that cannot be had (truncated image, full tmpfs, failing medium) must fail one request
//!   and not the process: `copy` stops there, and the system call that is then made for the rest
//!   names the error.
//! * Touching a hole of a file on tmpfs allocates it, and touching a page that is not in memory
//!   holds up everything behind it. Reads go through the mapping only where the page cache is known
//!   to have the page; [`Present`] keeps account. What it has not goes through another engine: one
//!   that may sleep on tmpfs, which has no medium, and one that does not elsewhere.
//! * A write through a mapping learns of a full disk only when it is written back, too late for the
//!   guest. So only tmpfs is written through it, which has no write-back.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::copy::{copy, prepare};
use crate::engine::{Engine, Submission};
use crate::image::Image;
use crate::io::{Io, Op};

const PAGE_SHIFT: u32 = 12;
/// The page cache is asked for pieces of the file of this size.
const PIECE_SHIFT: u32 = 21;
/// Copies between two looks at how many of them had to wait.
const PATIENCE: u32 = 256;

/// A mapping of an image, shared by the threads that serve it.
pub struct Mapping {
    base: *mut u8,
    /// Bytes that are mapped: the whole pages of the file.
    len: u64,
    present: Present,
    /// On tmpfs, where pages stay until they are discarded, and writes are copied as well.
    lasting: bool,
}

// SAFETY: an address range; its users copy bytes that may change at any time.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Present` is atomic.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `image`, which the caller keeps open.
    ///
    /// # Errors
    /// The kernel's, when it does not map the file.
    pub fn new(image: &Image) -> io::Result<Arc<Self>> {
        prepare()?;
        // To those who may not write a file, mincore says that everything is there.
        if image.on_tmpfs() && !may_write(image.fd()) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        // Opened anew: a mapping refers to its file, and with the image's own the image's lock
        // would be held until the mapping is taken apart, which takes the kernel a while.
        let file = std::fs::File::options()
            .read(true)
            .write(!image.read_only())
            .open(format!("/proc/self/fd/{}", image.fd()))?;
        let len = image.file_size() >> PAGE_SHIFT << PAGE_SHIFT;
        let protection =
            if image.read_only() { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            // At least a page, which is never touched in an image that has none.
            let bytes = len.max(1 << PAGE_SHIFT) as usize;
            libc::mmap(std::ptr::null_mut(), bytes, protection, flags, file.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let lasting = image.on_tmpfs();
        let populate = if lasting && !image.read_only() {
            libc::MADV_POPULATE_WRITE
        } else {
            libc::MADV_POPULATE_READ
        };
        let present = Present::new(len, populate);
        Ok(Arc::new(Self { base: base.cast(), len, present, lasting }))
    }

    fn covers(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Whether the range can be read at once, as far as known.
    fn readable(&self, offset: u64, len: u64) -> bool {
        self.covers(offset, len) && self.present.covers(self.base, offset, len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what mmap returned; engines that point into it hold a reference.
        unsafe { libc::munmap(self.base.cast(), self.len.max(1 << PAGE_SHIFT) as usize) };
    }
}

/// Which pages of a file the page cache has. A bit that is set wrongly costs a page of memory on
/// tmpfs, and elsewhere a wait for the medium; one that is missing costs a system call.
struct Present {
    /// The advice that fills the page table.
    populate: libc::c_int,
    pages: Box<[AtomicU64]>,
    searched: Box<[AtomicU64]>,
    len: u64,
}

fn bits(count: u64) -> Box<[AtomicU64]> {
    // Zeros that were never touched cost nothing, so they are asked for as such.
    let words = vec![0u64; count.div_ceil(64) as usize].into_boxed_slice();
    // SAFETY: AtomicU64 has the layout of u64, and the box is its only owner.
    unsafe { Box::from_raw(Box::into_raw(words) as *mut [AtomicU64]) }
}

fn is_set(bits: &[AtomicU64], n: u64) -> bool {
    bits[(n / 64) as usize].load(Ordering::Relaxed) & (1 << (n % 64)) != 0
}

fn set(bits: &[AtomicU64], n: u64) {
    if !is_set(bits, n) {
        bits[(n / 64) as usize].fetch_or(1 << (n % 64), Ordering::Relaxed);
    }
}

fn clear(bits: &[AtomicU64], n: u64) {
    bits[(n / 64) as usize].fetch_and(!(1 << (n % 64)), Ordering::Relaxed);
}

fn may_write(fd: RawFd) -> bool {
    let path = format!("/proc/self/fd/{fd}\0");
    // SAFETY: the path is a C string that lives across the call.
    unsafe {
        libc::faccessat(libc::AT_FDCWD, path.as_ptr().cast(), libc::W_OK, libc::AT_EACCESS) == 0
    }
}

fn pages(offset: u64, len: u64) -> std::ops::Range<u64> {
    (offset >> PAGE_SHIFT)..((offset + len + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT)
}

impl Present {
    fn new(len: u64, populate: libc::c_int) -> Self {
        let pieces = (len >> PIECE_SHIFT) + 1;
        Self { populate, pages: bits(len >> PAGE_SHIFT), searched: bits(pieces), len }
    }

    /// Whether the whole range is there, as far as known.
    fn covers(&self, base: *mut u8, offset: u64, len: u64) -> bool {
        let known = || pages(offset, len).all(|page| is_set(&self.pages, page));
        known() || (self.search(base, offset, len) && known())
    }

    /// Looks at the pieces of the range that were never looked at, and puts those that are all
    /// there into the page table; false if there are none.
    fn search(&self, base: *mut u8, offset: u64, len: u64) -> bool {
        let mut any = false;
        for piece in (offset >> PIECE_SHIFT)..=((offset + len - 1) >> PIECE_SHIFT) {
            if is_set(&self.searched, piece) {
                continue;
            }
            // Before the search: a page that is discarded meanwhile is searched for in vain, or
            // costs a page.
            set(&self.searched, piece);
            any = true;
            let start = piece << PIECE_SHIFT;
            let bytes = (self.len - start).min(1 << PIECE_SHIFT);
            let mut present = [0u8; 1 << (PIECE_SHIFT - PAGE_SHIFT)];
            // Not SEEK_HOLE, which walks to the end of the data: 5 ms for each GiB.
            // SAFETY: the range is inside the mapping, and there is a byte for each of its pages.
            let status = unsafe {
                let at = base.add(start as usize);
                libc::mincore(at.cast(), bytes as usize, present.as_mut_ptr())
            };
            if status != 0 {
                continue;
            }
            let (first, count) = (start >> PAGE_SHIFT, (bytes >> PAGE_SHIFT) as usize);
            let found = (0..count).filter(|n| present[*n] & 1 != 0);
            let full = found.inspect(|n| set(&self.pages, first + *n as u64)).count() == count;
            if full {
                // One call instead of a fault for each page. Advice: whether it was taken shows
                // in the time only.
                // SAFETY: as above; pages of a shared mapping are put in place, none changes.
                unsafe {
                    libc::madvise(base.add(start as usize).cast(), bytes as usize, self.populate)
                };
            }
        }
        any
    }

    fn add(&self, offset: u64, len: u64) {
        pages(offset, len).for_each(|page| set(&self.pages, page));
    }

    /// Takes nothing for granted any more, and looks at each piece again.
    fn forget(&self) {
        for bits in [&self.pages, &self.searched] {
            let some = bits.iter().filter(|word| word.load(Ordering::Relaxed) != 0);
            some.for_each(|word| word.store(0, Ordering::Relaxed));
        }
    }

    fn remove(&self, offset: u64, len: u64) {
        let end = (offset.saturating_add(len)).min(self.len);
        let range = offset.min(end)..end;
        pages(range.start, range.end - range.start).for_each(|page| clear(&self.pages, page));
    }
}

/// How many page faults of this thread have waited for a medium.
fn waits() -> i64 {
    // SAFETY: rusage is plain data, and the call fills it.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &mut usage);
        usage.ru_majflt
    }
}

/// Copies what it can, and leaves the rest to another engine.
pub struct MappedEngine<R> {
    mapping: Arc<Mapping>,
    rest: R,
    /// Requests until the next look at `waits`.
    patience: u32,
    waits: i64,
}

impl<R: Engine> MappedEngine<R> {
    /// Copies to and from `mapping`; `rest` serves the same image.
    pub fn new(mapping: Arc<Mapping>, rest: R) -> Self {
        Self { mapping, rest, patience: PATIENCE, waits: waits() }
    }

    /// Copies the segments; gives the bytes moved.
    ///
    /// # Safety
    /// The segments are mapped, and the range of the image is inside the mapping.
    unsafe fn carry(&self, io: &Io) -> u64 {
        // SAFETY: the caller checked that the range is inside.
        let mut at = unsafe { self.mapping.base.add(io.offset as usize) };
        let mut moved = 0;
        for segment in io.segments() {
            let (memory, len) = (segment.iov_base.cast::<u8>(), segment.iov_len);
            // SAFETY: both are mapped for `len` bytes; `Mapping::new` called `prepare`.
            let copied = unsafe {
                match io.op {
                    Op::Read => copy(memory, at, len),
                    _ => copy(at, memory, len),
                }
            };
            moved += copied as u64;
            if copied < len {
                break;
            }
            // SAFETY: the sum of the segments is inside.
            at = unsafe { at.add(len) };
        }
        moved
    }

    /// Whether to copy; keeps account of what a request that is not copied does to the pages.
    fn copies(&mut self, io: &Io) -> bool {
        let mapping = &self.mapping;
        match io.op {
            Op::Read => mapping.readable(io.offset, io.len),
            Op::Write { .. } if mapping.lasting && mapping.covers(io.offset, io.len) => {
                // For the page table; a hole is written through the mapping as well.
                let _ = mapping.readable(io.offset, io.len);
                true
            }
            Op::Discard | Op::WriteZeroes { .. } => {
                mapping.present.remove(io.offset, io.len);
                false
            }
            Op::Write { .. } | Op::Flush => false,
        }
    }

    /// The page cache gives pages back when memory is short, without a word. Copies that had to
    /// wait show it; then nothing is taken for granted any more.
    fn doubt(&mut self) {
        self.patience -= 1;
        if self.patience > 0 {
            return;
        }
        self.patience = PATIENCE;
        let waits = waits();
        if std::mem::replace(&mut self.waits, waits) != waits {
            // To forget takes a while, too, when the image is large.
            self.patience = 64 * PATIENCE;
            self.mapping.present.forget();
        }
    }
}

impl<R: Engine> Engine for MappedEngine<R> {
    const CONCURRENT: bool = R::CONCURRENT;

    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        if self.copies(io) {
            // SAFETY: the caller keeps the segments mapped; the range was just checked.
            let moved = unsafe { self.carry(io) };
            if !self.mapping.lasting {
                self.doubt();
            }
            if moved > 0 {
                if io.op != Op::Read {
                    self.mapping.present.add(io.offset, moved);
                }
                return Submission::Done(i32::try_from(moved).unwrap_or(i32::MAX));
            }
        }
        // SAFETY: the caller's promise, handed on.
        let submission = unsafe { self.rest.submit(token, io) };
        let mapping = &self.mapping;
        if let (Submission::Done(moved), Op::Read | Op::Write { .. }) = (submission, io.op)
            && !mapping.lasting
            && let Ok(moved) = u64::try_from(moved)
            && mapping.covers(io.offset, moved)
        {
            mapping.present.add(io.offset, moved);
        }
        submission
    }

    fn flush(&mut self) -> io::Result<()> {
        self.rest.flush()
    }

    fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        self.rest.reap(into);
    }

    fn in_flight(&self) -> usize {
        self.rest.in_flight()
    }

    fn add_waker(&mut self, fd: RawFd) -> io::Result<()> {
        self.rest.add_waker(fd)
    }

    fn remove_waker(&mut self, fd: RawFd) {
        self.rest.remove_waker(fd);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.rest.wait()
    }
}
