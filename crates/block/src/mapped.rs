//! The memory-mapped engine: requests are copied to and from a mapping of the image.
//!
//! Where the image is in memory already, no system call is left in the path of a request. What
//! must be got right for it:
//!
//! * A page that cannot be had (truncated image, full tmpfs, failing medium) must fail one request
//!   and not the process: `copy` stops there, and the system call that is then made for the rest
//!   names the error.
//! * Touching a hole of a file on tmpfs allocates it, and touching a page that is not in memory
//!   holds up everything behind it. Requests go through the mapping only where the page cache is
//!   known to have the page; [`Present`] keeps account. What it has not goes through another
//!   engine: one that may sleep on tmpfs, which has no medium, and one that does not elsewhere.
//! * No request finds out itself what the page cache has: that takes as long as tens of requests,
//!   and a guest that starts, or whose backend was replaced, would ask for all of it at once.
//!   [`Search`] does it beside them, and until it has, requests take the other engine.
//! * A write through a mapping learns of a full disk only when it is written back, too late for the
//!   guest. So only tmpfs is written through it, which has no write-back.
//!
//! A layer that is new has no page but those that requests have brought, and no search has to find them
//! first. What is written for the first time takes a system call (on tmpfs 2.0 µs for a hole, of which the most
//! is the page; 2.8 by touching it).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use crate::copy::{copy, prepare};
use crate::engine::{Engine, FileEngine, Submission, Target};
use crate::image::Image;
use crate::io::Io;
use crate::op::Op;
use crate::present::{PAGE_SHIFT, Present};
use crate::search::{Range, Search};

/// Copies between two looks at how many of them had to wait.
const PATIENCE: u32 = 256;

/// A mapping of an image, shared by the threads that serve it.
pub struct Mapping {
    range: Arc<Range>,
    /// None where the kernel does not tell what the page cache has.
    search: Option<Search>,
}

/// What is known of the pages of a file that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// They are searched for.
    Nothing,
    /// There is none yet. Those that come do so with requests.
    NoPage,
}

impl Mapping {
    /// Maps `image`, which the caller keeps open.
    ///
    /// # Errors
    /// The kernel's, when it does not map the file.
    pub fn new(image: &Image) -> io::Result<Arc<Self>> {
        let (fd, size) = (image.fd(), image.file_size());
        let (lasting, searched) = (image.on_tmpfs(), may_write(fd));
        if lasting && !searched {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Self::make(fd, size, image.read_only(), (lasting, searched, Known::Nothing))
    }

    /// Maps `size` bytes of a layer, which is open as `fd` and which the caller keeps open. `lasting`: it is
    /// on tmpfs.
    ///
    /// # Errors
    /// The kernel's, when it does not map the file.
    pub fn of(
        fd: RawFd,
        size: u64,
        read_only: bool,
        (lasting, known): (bool, Known),
    ) -> io::Result<Arc<Self>> {
        Self::make(fd, size, read_only, (lasting, may_write(fd), known))
    }

    fn make(
        fd: RawFd,
        size: u64,
        read_only: bool,
        (lasting, searched, known): (bool, bool, Known),
    ) -> io::Result<Arc<Self>> {
        prepare()?;
        // Opened anew: a mapping refers to its file, and with the image's own the image's lock
        // would be held until the mapping is taken apart, which takes the kernel a while.
        let file = std::fs::File::options()
            .read(true)
            .write(!read_only)
            .open(format!("/proc/self/fd/{fd}"))?;
        let len = size >> PAGE_SHIFT << PAGE_SHIFT;
        let present = Present::new(len, known != Known::Nothing)?;
        let protection =
            if read_only { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            let fd = file.as_raw_fd();
            libc::mmap(std::ptr::null_mut(), mapped_len(len), protection, flags, fd, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The guest's data has no business in a core file of this process.
        // SAFETY: the advice changes what a core file holds, and no memory.
        unsafe { libc::madvise(base, len as usize, libc::MADV_DONTDUMP) };
        let base = base.cast();
        let range = Arc::new(Range { base, present, lasting });
        let mut mapping = Self { range, search: None };
        if searched {
            mapping.search = Some(Search::start(Arc::clone(&mapping.range), file)?);
        }
        Ok(Arc::new(mapping))
    }

    fn covers(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.range.present.len())
    }

    /// Whether the range can be copied at once, as far as known.
    #[inline]
    fn ready(&self, offset: u64, len: u64) -> bool {
        let Some(search) = &self.search else { return false };
        if !self.covers(offset, len) {
            return false;
        }
        let (ready, asked) = self.range.present.has(offset, len);
        if asked {
            search.wake();
        }
        ready
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The thread looks at the range until it has ended.
        self.search = None;
        // SAFETY: what mmap returned; engines that point into it hold a reference.
        unsafe { libc::munmap(self.range.base.cast(), mapped_len(self.range.present.len())) };
    }
}

/// At least a page, which is never touched in an image that has none.
fn mapped_len(len: u64) -> usize {
    len.max(1 << PAGE_SHIFT) as usize
}

/// Whether this process may write a file. To those who may not, mincore says that everything is there.
fn may_write(fd: RawFd) -> bool {
    let path = format!("/proc/self/fd/{fd}\0");
    // SAFETY: the path is a C string that lives across the call.
    unsafe {
        libc::faccessat(libc::AT_FDCWD, path.as_ptr().cast(), libc::W_OK, libc::AT_EACCESS) == 0
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
    doubt: Doubt,
}

/// Whether copies wait for the medium after all.
struct Doubt {
    /// Requests until the next look at `waits`.
    patience: u32,
    waits: i64,
}

impl Doubt {
    /// The page cache gives pages back when memory is short, without a word. Copies that had to
    /// wait show it; then nothing is taken for granted any more.
    fn copied(&mut self, present: &Present) {
        self.patience -= 1;
        if self.patience > 0 {
            return;
        }
        self.patience = PATIENCE;
        let waits = waits();
        if std::mem::replace(&mut self.waits, waits) != waits {
            // To find it all again takes a while.
            self.patience = 64 * PATIENCE;
            present.forget();
        }
    }
}

impl Mapping {
    /// Copies the segments; gives the bytes moved.
    ///
    /// # Safety
    /// The segments are mapped, and the range of the image is inside the mapping.
    unsafe fn carry(&self, io: &Io) -> u64 {
        // SAFETY: the caller checked that the range is inside.
        let mut at = unsafe { self.range.base.add(io.offset as usize) };
        let mut moved = 0;
        for segment in io.segments() {
            let (memory, len) = (segment.iov_base.cast::<u8>(), segment.iov_len);
            // SAFETY: both are mapped for `len` bytes; `Mapping::make` called `prepare`.
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

    /// Whether to copy.
    fn copies(&self, io: &Io) -> bool {
        match io.op {
            Op::Read => self.ready(io.offset, io.len),
            Op::Write { .. } => self.range.lasting && self.ready(io.offset, io.len),
            Op::Discard | Op::WriteZeroes { .. } | Op::Flush => false,
        }
    }

    /// Copies, or has `rest` do it, and keeps account of what is there.
    ///
    /// # Safety
    /// As [`Engine::submit`].
    unsafe fn serve(
        &self,
        doubt: &mut Doubt,
        io: &Io,
        rest: impl FnOnce() -> Submission,
    ) -> Submission {
        let (present, lasting) = (&self.range.present, self.range.lasting);
        if self.copies(io) {
            // SAFETY: the caller keeps the segments mapped; the range was just checked.
            let moved = unsafe { self.carry(io) };
            if !lasting {
                doubt.copied(present);
            }
            if moved > 0 {
                return Submission::Done(i32::try_from(moved).unwrap_or(i32::MAX));
            }
        }
        let frees = matches!(io.op, Op::Discard | Op::WriteZeroes { .. });
        if frees {
            present.remove(io.offset, io.len);
        }
        let submission = rest();
        match (submission, io.op) {
            (Submission::Done(_), _) if frees => present.remove(io.offset, io.len),
            // On tmpfs a read leaves a hole a hole.
            (Submission::Done(_), Op::Read) if lasting => {}
            (Submission::Done(moved), Op::Read | Op::Write { .. }) => {
                let moved = u64::try_from(moved).unwrap_or(0);
                if self.covers(io.offset, moved) {
                    present.add(io.offset, moved);
                }
            }
            _ => {}
        }
        submission
    }
}

impl<R: Engine> MappedEngine<R> {
    /// Copies to and from `mapping`; `rest` serves the same image.
    pub fn new(mapping: Arc<Mapping>, rest: R) -> Self {
        Self { mapping, rest, doubt: Doubt { patience: PATIENCE, waits: waits() } }
    }
}

impl<R: FileEngine> FileEngine for MappedEngine<R> {
    unsafe fn submit_to(&mut self, target: &Target, token: u64, io: &Io) -> Submission {
        let Self { rest, doubt, .. } = self;
        // SAFETY: the caller's promise, handed on; so below.
        let mut behind = || unsafe { rest.submit_to(target, token, io) };
        match &target.mapping {
            // SAFETY: see above.
            Some(mapping) => unsafe { mapping.serve(doubt, io, behind) },
            None => behind(),
        }
    }
}

impl<R: Engine> Engine for MappedEngine<R> {
    const CONCURRENT: bool = R::CONCURRENT;

    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
        let Self { mapping, rest, doubt } = self;
        // SAFETY: the caller's promise, handed on; so below.
        let behind = || unsafe { rest.submit(token, io) };
        // SAFETY: see above.
        unsafe { mapping.serve(doubt, io, behind) }
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
