//! One request on its way through an engine.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::image::Image;

/// Bytes of all buffers together that stand in for unaligned ones. A guest may have a queue full of
/// unaligned requests, and each may name the same memory a thousand times.
const BOUNCE_BUDGET: u64 = 256 << 20;

/// How much of the budget is in use.
static BOUNCED: AtomicU64 = AtomicU64::new(0);

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Disk to memory.
    Read,
    /// Memory to disk; with `stable`, done only when it would survive a power cut.
    Write {
        /// The cache is write-through.
        stable: bool,
    },
    /// Everything that was done before is on stable storage.
    Flush,
    /// The range's content is of no interest any more.
    Discard,
    /// The range reads as zeros.
    WriteZeroes {
        /// The space may be given back.
        unmap: bool,
    },
}

/// A request: operation, range, and segments of memory. Reused from request to request, so that
/// a queue at work allocates nothing.
#[derive(Debug)]
pub struct Io {
    /// What to do.
    pub op: Op,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes left to do.
    pub len: u64,
    /// Segments left to do; their lengths add up to `len` for reads and writes.
    pub iov: Vec<libc::iovec>,
    /// Segments before this one are finished.
    first: usize,
    bounce: Option<Bounce>,
}

// SAFETY: the pointers lead into guest memory or into the bounce buffer, which move with it.
unsafe impl Send for Io {}

/// What the result of a system call means for the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absorbed {
    /// The request is done.
    Finished,
    /// The request failed with this errno.
    Failed(i32),
    /// A part is done; submit it again for the rest.
    More,
}

impl Default for Io {
    fn default() -> Self {
        Self { op: Op::Flush, offset: 0, len: 0, iov: Vec::new(), first: 0, bounce: None }
    }
}

impl Io {
    /// Empties the request for its next use; keeps its memory.
    pub fn reset(&mut self, op: Op) {
        self.op = op;
        self.offset = 0;
        self.len = 0;
        self.iov.clear();
        self.first = 0;
        self.bounce = None;
    }

    /// The segments that are left.
    pub fn segments(&self) -> &[libc::iovec] {
        &self.iov[self.first.min(self.iov.len())..]
    }

    /// The guest's own segments, whatever stands in for them. Only before the first submission.
    pub fn guest_segments(&self) -> &[libc::iovec] {
        self.bounce.as_ref().map_or(&self.iov, |bounce| &bounce.guest)
    }

    /// Goes through a buffer of our own where the image wants aligned memory and the guest's is
    /// not. Call once, before the first submission. False if all such buffers of this process
    /// together would be unreasonably large.
    #[must_use]
    pub fn align_for(&mut self, image: &Image) -> bool {
        let mask = image.memory_alignment() - 1;
        let moves = matches!(self.op, Op::Read | Op::Write { .. });
        if mask == 0 || !moves {
            return true;
        }
        let bits = self.iov.iter().fold(0, |bits, s| bits | s.iov_base.addr() | s.iov_len);
        if bits & mask == 0 {
            return true;
        }
        let reserve = |used: u64| used.checked_add(self.len).filter(|sum| *sum <= BOUNCE_BUDGET);
        if BOUNCED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve).is_err() {
            return false;
        }
        let mut bounce = Bounce::new(self.len as usize, std::mem::take(&mut self.iov));
        if matches!(self.op, Op::Write { .. }) {
            bounce.gather();
        }
        self.iov.push(bounce.iovec());
        self.bounce = Some(bounce);
        true
    }

    /// Takes a system call's result into account.
    pub fn absorb(&mut self, result: i32, image: &Image) -> Absorbed {
        if result < 0 {
            return self.absorb_error(-result, image);
        }
        if !matches!(self.op, Op::Read | Op::Write { .. }) {
            return Absorbed::Finished;
        }
        let moved = u64::from(result.unsigned_abs()).min(self.len);
        self.advance(moved);
        if self.len == 0 {
            return self.finish();
        }
        // The end of the file. A file whose size is no multiple of the sector ends inside its
        // last sector, and the rest reads as zeros. (Nothing to ask for: direct I/O would not
        // start there.)
        if self.op == Op::Read && self.offset >= image.file_size() {
            self.zero_rest();
            return self.finish();
        }
        // Nothing moved: the image was truncated under us.
        if moved > 0 { Absorbed::More } else { self.fail(libc::EIO) }
    }

    fn absorb_error(&mut self, errno: i32, image: &Image) -> Absorbed {
        match (errno, self.op) {
            (libc::EINTR | libc::EAGAIN, _) => Absorbed::More,
            // A discard is advice; a file system without holes keeps the data.
            (libc::EOPNOTSUPP, Op::Discard) => Absorbed::Finished,
            // fsync of something without a cache.
            (libc::EINVAL | libc::ENOTSUP, Op::Flush) => Absorbed::Finished,
            (libc::EOPNOTSUPP, Op::WriteZeroes { .. }) => {
                match image.write_zeros(self.offset, self.len) {
                    Ok(()) => Absorbed::Finished,
                    Err(error) => Absorbed::Failed(error.raw_os_error().unwrap_or(libc::EIO)),
                }
            }
            _ => self.fail(errno),
        }
    }

    fn fail(&mut self, errno: i32) -> Absorbed {
        self.bounce = None;
        Absorbed::Failed(errno)
    }

    fn finish(&mut self) -> Absorbed {
        if let Some(bounce) = self.bounce.take()
            && self.op == Op::Read
        {
            bounce.scatter();
        }
        Absorbed::Finished
    }

    fn advance(&mut self, moved: u64) {
        self.offset += moved;
        self.len -= moved;
        let mut left = moved as usize;
        while left > 0 {
            let Some(segment) = self.iov.get_mut(self.first) else { return };
            if left < segment.iov_len {
                segment.iov_len -= left;
                // SAFETY: left < iov_len, so the pointer stays inside the segment.
                segment.iov_base = unsafe { segment.iov_base.cast::<u8>().add(left).cast() };
                return;
            }
            left -= segment.iov_len;
            self.first += 1;
        }
    }

    fn zero_rest(&mut self) {
        for segment in &self.iov[self.first.min(self.iov.len())..] {
            // SAFETY: the segment was valid for a read into it (contract of `submit`).
            unsafe { std::ptr::write_bytes(segment.iov_base.cast::<u8>(), 0, segment.iov_len) };
        }
    }
}

/// Page-aligned stand-in for a guest's unaligned buffer.
#[derive(Debug)]
struct Bounce {
    memory: *mut u8,
    layout: std::alloc::Layout,
    reserved: u64,
    guest: Vec<libc::iovec>,
}

impl Bounce {
    /// The caller has taken `len` out of the budget.
    fn new(len: usize, guest: Vec<libc::iovec>) -> Self {
        // Lengths are bounded by the request (the caller checked them against the disk).
        let layout = std::alloc::Layout::from_size_align(len.max(1), 4096)
            .unwrap_or(std::alloc::Layout::new::<[u8; 4096]>());
        // SAFETY: the layout is not empty.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        if memory.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Self { memory, layout, reserved: len as u64, guest }
    }

    fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.memory.cast(), iov_len: self.layout.size() }
    }

    fn gather(&mut self) {
        let mut at = 0;
        for s in &self.guest {
            let len = s.iov_len.min(self.layout.size() - at);
            // SAFETY: the segment is guest memory of iov_len bytes; `at + len` is within ours.
            unsafe {
                std::ptr::copy_nonoverlapping(s.iov_base.cast::<u8>(), self.memory.add(at), len);
            }
            at += len;
        }
    }

    fn scatter(&self) {
        let mut at = 0;
        for s in &self.guest {
            let len = s.iov_len.min(self.layout.size() - at);
            // SAFETY: as in `gather`, the other way.
            unsafe {
                std::ptr::copy_nonoverlapping(self.memory.add(at), s.iov_base.cast::<u8>(), len);
            }
            at += len;
        }
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { std::alloc::dealloc(self.memory, self.layout) };
        BOUNCED.fetch_sub(self.reserved, Ordering::Relaxed);
    }
}
