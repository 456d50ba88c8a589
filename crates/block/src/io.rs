//! One request on its way through an engine.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::image::Image;
use crate::op::Op;

/// Bytes of all buffers together that stand in for unaligned ones. A guest may have a queue full of
/// unaligned requests, and each may name the same memory a thousand times.
const BOUNCE_BUDGET: u64 = 256 << 20;

/// How much of the budget is in use.
static BOUNCED: AtomicU64 = AtomicU64::new(0);

/// Whether a request can be submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// It can.
    Ready,
    /// There is nothing to be done for it.
    Nothing,
    /// The buffers that it takes would be unreasonably large, with all others of this process.
    TooLarge,
}

/// A system call of a request that takes several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Reads a block of the storage, of which the request writes a part, to a place in the buffer.
    Load { offset: u64, at: usize },
    /// Puts what the request writes into the buffer, and writes that.
    Store { stable: bool },
    /// Writes zeros.
    Zeros { offset: u64, len: u64 },
    /// Discards, or has the file system or the device make zeros.
    Trim { op: Op, offset: u64, len: u64 },
    /// Makes durable what was done before.
    Flush,
}

/// A request: operation, range, and segments of memory. Reused from request to request, so that
/// a queue at work allocates nothing for those that are one system call.
///
/// Most requests are one system call, which the public fields describe. Those that are several (see
/// [`Io::prepare`]) are described by their present one: engines know nothing of the others.
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
    /// What the whole request asks for.
    asked: Op,
    /// It ends when what it did is on stable storage.
    durable: bool,
    /// Segments before this one are finished.
    first: usize,
    /// For those that are more than one plain system call.
    detour: Option<Box<Detour>>,
}

/// What most requests do not need.
#[derive(Debug, Default)]
struct Detour {
    /// What comes after the present system call, the next one last.
    steps: Vec<Step>,
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
        Self {
            op: Op::Flush,
            offset: 0,
            len: 0,
            iov: Vec::new(),
            asked: Op::Flush,
            durable: true,
            first: 0,
            detour: None,
        }
    }
}

/// Where zeros to be written are taken from.
#[repr(align(4096))]
struct Zeros([u8; ZEROS_LEN]);
const ZEROS_LEN: usize = 65536;
static ZEROS: Zeros = Zeros([0; ZEROS_LEN]);
/// Zeros of one system call: as many segments as the kernel takes.
const MOST_ZEROS: u64 = (ZEROS_LEN * 1024) as u64;

fn zeros(len: u64) -> libc::iovec {
    // The kernel only reads it: it is the memory of a write.
    libc::iovec { iov_base: ZEROS.0.as_ptr().cast_mut().cast(), iov_len: len as usize }
}

impl Io {
    /// Empties the request for its next use; keeps its memory.
    pub fn reset(&mut self, op: Op) {
        self.op = op;
        self.offset = 0;
        self.len = 0;
        self.iov.clear();
        self.asked = op;
        self.durable = matches!(op, Op::Flush | Op::Write { stable: true });
        self.first = 0;
        self.detour = None;
    }

    /// Makes `part` the `len` bytes of a read or write that follow the first `skip`: what an engine
    /// submits that does a request in parts.
    pub fn begin_part(&self, part: &mut Self, skip: u64, len: u64) {
        part.reset(self.op);
        (part.offset, part.len) = (self.offset + skip, len);
        let (mut skip, mut left) = (skip as usize, len as usize);
        for segment in self.segments() {
            let skipped = segment.iov_len.min(skip);
            let iov_len = (segment.iov_len - skipped).min(left);
            if iov_len > 0 {
                let iov_base = segment.iov_base.cast::<u8>().wrapping_add(skipped).cast();
                part.iov.push(libc::iovec { iov_base, iov_len });
            }
            (skip, left) = (skip - skipped, left - iov_len);
            if left == 0 {
                break;
            }
        }
    }

    fn detour(&mut self) -> &mut Detour {
        self.detour.get_or_insert_default()
    }

    /// What the whole request asks for.
    pub fn asked(&self) -> Op {
        self.asked
    }

    /// Whether it ends only when what it did is on stable storage.
    pub fn is_durable(&self) -> bool {
        self.durable
    }

    /// After a failure: whether the kernel may have told with it of data that it had taken before
    /// and could not write. It tells that once.
    pub fn tells_of_loss(&self, errno: i32) -> bool {
        match self.op {
            Op::Flush => true,
            // A full file system has refused this write, and lost none.
            Op::Write { stable: true } => errno == libc::EIO,
            Op::Read | Op::Write { .. } | Op::Discard | Op::WriteZeroes { .. } => false,
        }
    }

    /// The segments that are left.
    pub fn segments(&self) -> &[libc::iovec] {
        &self.iov[self.first.min(self.iov.len())..]
    }

    /// The guest's own segments, whatever stands in for them. Only before the first submission.
    pub fn guest_segments(&self) -> &[libc::iovec] {
        match self.asked {
            // Those that there are may be zeros of our own.
            Op::Discard | Op::WriteZeroes { .. } => &[],
            Op::Read | Op::Write { .. } | Op::Flush => {
                let bounce = self.detour.as_ref().and_then(|detour| detour.bounce.as_ref());
                bounce.map_or(&self.iov, |bounce| &bounce.guest)
            }
        }
    }

    /// Finds out what it takes to do the request, whose fields are set, on this image. Call once,
    /// before the first submission.
    ///
    /// * Memory that direct I/O does not take is stood in for by a buffer.
    /// * Of blocks that a write touches in part, and direct I/O writes as a whole, the rest is read
    ///   before. [`Image::try_enter`] keeps other writes of these blocks away.
    /// * A discard leaves out the parts of blocks at its ends, write zeroes writes them.
    /// * `stable`: a discard, or write zeroes, ends when it would survive a power cut.
    pub fn prepare(&mut self, image: &Image, stable: bool) -> Prepared {
        self.asked = self.op;
        self.durable = match self.op {
            Op::Flush => true,
            Op::Read => false,
            Op::Write { stable } => stable,
            Op::Discard | Op::WriteZeroes { .. } => stable,
        };
        match self.op {
            Op::Read | Op::Write { .. } => match self.align_for(image) {
                true => Prepared::Ready,
                false => Prepared::TooLarge,
            },
            Op::Discard | Op::WriteZeroes { .. } => self.clip(image),
            Op::Flush => Prepared::Ready,
        }
    }

    fn align_for(&mut self, image: &Image) -> bool {
        let mask = image.memory_alignment() - 1;
        let parts = (self.offset | self.len) & (u64::from(image.transfer_alignment()) - 1) != 0;
        if mask == 0 && !parts {
            return true;
        }
        let bits = self.iov.iter().fold(0, |bits, s| bits | s.iov_base.addr() | s.iov_len);
        if bits & mask == 0 && !parts {
            return true;
        }
        let guest = std::mem::take(&mut self.iov);
        let Some(mut bounce) = Bounce::new(image, (self.offset, self.len), guest) else {
            return false;
        };
        match self.op {
            Op::Write { stable } if parts => {
                self.change(image, bounce, stable);
                return true;
            }
            Op::Write { .. } => bounce.gather(),
            _ => (self.offset, self.len) = (bounce.offset, bounce.len() as u64),
        }
        self.iov.push(bounce.iovec());
        self.detour().bounce = Some(bounce);
        true
    }

    /// Begins a write of parts of blocks: those are read, and written as a whole.
    fn change(&mut self, image: &Image, bounce: Bounce, stable: bool) {
        let block = image.transfer_alignment() as usize;
        let (start, whole) = (bounce.offset, bounce.len());
        let last = start + (whole - block) as u64;
        let end = (self.offset + self.len) % block as u64;
        let first = self.offset != start || (end != 0 && whole == block);
        let detour = self.detour();
        detour.bounce = Some(bounce);
        detour.steps.push(Step::Store { stable });
        if end != 0 && whole > block {
            detour.steps.push(Step::Load { offset: last, at: whole - block });
        }
        if first {
            detour.steps.push(Step::Load { offset: start, at: 0 });
        }
        // There is one, and it cannot fail: the buffer is there.
        let _ = self.go_on(image);
    }

    /// Cuts a discard or write zeroes to what the image takes.
    fn clip(&mut self, image: &Image) -> Prepared {
        let unit = u64::from(image.trim_alignment());
        let (start, end) = (self.offset, self.offset + self.len);
        let (first, last) = (start.next_multiple_of(unit), end - end % unit);
        let whole = first < last;
        if self.op == Op::Discard && !whole {
            return Prepared::Nothing;
        }
        let (op, durable) = (self.op, self.durable);
        let steps = &mut self.detour().steps;
        if durable {
            steps.push(Step::Flush);
        }
        if whole {
            if op != Op::Discard && last < end {
                steps.push(Step::Zeros { offset: last, len: end - last });
            }
            steps.push(Step::Trim { op, offset: first, len: last - first });
            if op != Op::Discard && start < first {
                steps.push(Step::Zeros { offset: start, len: first - start });
            }
        } else {
            steps.push(Step::Zeros { offset: start, len: end - start });
        }
        match self.go_on(image) {
            Absorbed::Failed(_) => Prepared::TooLarge,
            Absorbed::Finished | Absorbed::More => Prepared::Ready,
        }
    }

    /// Takes a system call's result into account.
    pub fn absorb(&mut self, result: i32, image: &Image) -> Absorbed {
        if result < 0 {
            return self.absorb_error(-result, image);
        }
        if !matches!(self.op, Op::Read | Op::Write { .. }) {
            return self.go_on(image);
        }
        let moved = u64::from(result.unsigned_abs()).min(self.len);
        self.advance(moved);
        if self.len == 0 {
            return self.go_on(image);
        }
        // The end of the file. A file whose size is no multiple of the sector ends inside its
        // last sector, and the rest reads as zeros. (Nothing to ask for: direct I/O would not
        // start there.)
        if self.op == Op::Read && self.offset >= image.file_size() {
            self.zero_rest();
            return self.go_on(image);
        }
        // Nothing moved: the image was truncated under us.
        if moved > 0 { Absorbed::More } else { self.fail(libc::EIO) }
    }

    fn absorb_error(&mut self, errno: i32, image: &Image) -> Absorbed {
        match (errno, self.op) {
            (libc::EINTR | libc::EAGAIN, _) => Absorbed::More,
            // A discard is advice; a file system without holes keeps the data.
            (libc::EOPNOTSUPP, Op::Discard) => self.go_on(image),
            // fsync of something without a cache.
            (libc::EINVAL | libc::ENOTSUP, Op::Flush) => self.go_on(image),
            // What gives no space back may make zeros, or else take them.
            (libc::EOPNOTSUPP, Op::WriteZeroes { unmap: true }) => {
                self.op = Op::WriteZeroes { unmap: false };
                Absorbed::More
            }
            (libc::EOPNOTSUPP, Op::WriteZeroes { unmap: false }) => {
                self.start(Step::Zeros { offset: self.offset, len: self.len }, image)
            }
            _ => self.fail(errno),
        }
    }

    fn fail(&mut self, errno: i32) -> Absorbed {
        self.detour = None;
        Absorbed::Failed(errno)
    }

    /// A system call is done: the next one, or the end.
    fn go_on(&mut self, image: &Image) -> Absorbed {
        let Some(detour) = &mut self.detour else { return Absorbed::Finished };
        if let Some(step) = detour.steps.pop() {
            return self.start(step, image);
        }
        if let Some(bounce) = detour.bounce.take()
            && self.asked == Op::Read
        {
            bounce.scatter();
        }
        self.detour = None;
        Absorbed::Finished
    }

    fn start(&mut self, step: Step, image: &Image) -> Absorbed {
        self.iov.clear();
        self.first = 0;
        match (step, &mut self.detour.get_or_insert_default().bounce) {
            (Step::Load { offset, at }, Some(bounce)) => {
                let block = u64::from(image.transfer_alignment());
                (self.op, self.offset, self.len) = (Op::Read, offset, block);
                self.iov.push(bounce.part(at, block as usize));
            }
            (Step::Store { stable }, Some(bounce)) => {
                bounce.gather();
                self.op = Op::Write { stable };
                (self.offset, self.len) = (bounce.offset, bounce.len() as u64);
                self.iov.push(bounce.iovec());
            }
            // Both follow the making of their buffer.
            (Step::Load { .. } | Step::Store { .. }, None) => return self.fail(libc::EIO),
            (Step::Zeros { offset, len }, _) => return self.write_zeros(offset, len, image),
            (Step::Trim { op, offset, len }, _) => {
                (self.op, self.offset, self.len) = (op, offset, len);
            }
            (Step::Flush, _) => (self.op, self.offset, self.len) = (Op::Flush, 0, 0),
        }
        Absorbed::More
    }

    /// Writes as many zeros as one system call does, and leaves the rest to the next step.
    fn write_zeros(&mut self, offset: u64, len: u64, image: &Image) -> Absorbed {
        let block = u64::from(image.transfer_alignment());
        let whole = if offset % block == 0 { len - len % block } else { 0 };
        let now = match whole {
            // The part of a block.
            0 => len.min(block - offset % block),
            _ => whole.min(MOST_ZEROS),
        };
        if now < len {
            let rest = Step::Zeros { offset: offset + now, len: len - now };
            self.detour().steps.push(rest);
        }
        (self.op, self.offset, self.len) = (Op::Write { stable: false }, offset, now);
        if whole == 0 {
            self.detour().bounce = None;
            let Some(bounce) = Bounce::new(image, (offset, now), vec![zeros(now)]) else {
                return self.fail(libc::ENOMEM);
            };
            self.change(image, bounce, false);
            return Absorbed::More;
        }
        let mut left = now;
        while left > 0 {
            let piece = left.min(ZEROS_LEN as u64);
            self.iov.push(zeros(piece));
            left -= piece;
        }
        Absorbed::More
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

/// Page-aligned stand-in for a guest's buffer, of whole blocks of the storage.
#[derive(Debug)]
struct Bounce {
    memory: *mut u8,
    layout: std::alloc::Layout,
    guest: Vec<libc::iovec>,
    /// Where on the disk it begins.
    offset: u64,
    /// Bytes of it before the guest's first.
    lead: usize,
}

impl Bounce {
    /// For the blocks of a range of the disk. `None` if all such buffers of this process together
    /// would be unreasonably large.
    fn new(image: &Image, range: (u64, u64), guest: Vec<libc::iovec>) -> Option<Self> {
        // Lengths are bounded by the request (the caller checked them against the disk).
        let (offset, len) = image.whole_blocks(range.0, range.1);
        let layout = std::alloc::Layout::from_size_align(usize::try_from(len).ok()?, 4096).ok()?;
        let reserve = |used: u64| used.checked_add(len).filter(|sum| *sum <= BOUNCE_BUDGET);
        if len == 0 || BOUNCED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve).is_err()
        {
            return None;
        }
        // SAFETY: the layout is not empty.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        if memory.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Some(Self { memory, layout, guest, offset, lead: (range.0 - offset) as usize })
    }

    fn len(&self) -> usize {
        self.layout.size()
    }

    fn iovec(&self) -> libc::iovec {
        self.part(0, self.len())
    }

    fn part(&self, at: usize, len: usize) -> libc::iovec {
        let at = at.min(self.len());
        // SAFETY: at most one past the end.
        let iov_base = unsafe { self.memory.add(at).cast() };
        libc::iovec { iov_base, iov_len: len.min(self.len() - at) }
    }

    fn gather(&mut self) {
        let mut at = self.lead;
        for s in &self.guest {
            let len = s.iov_len.min(self.len() - at);
            // SAFETY: the segment is guest memory of iov_len bytes; `at + len` is within ours.
            unsafe {
                std::ptr::copy_nonoverlapping(s.iov_base.cast::<u8>(), self.memory.add(at), len);
            }
            at += len;
        }
    }

    fn scatter(&self) {
        let mut at = self.lead;
        for s in &self.guest {
            let len = s.iov_len.min(self.len() - at);
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
        BOUNCED.fetch_sub(self.len() as u64, Ordering::Relaxed);
    }
}
