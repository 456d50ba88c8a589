//! Requests of the namespace, on an engine of `semper-block`.
//!
//! A read goes straight into the guest's memory while the bus is direct, and else into a buffer of our
//! own, from which the bus takes it: a page that the engine writes behind QEMU's back would be missing
//! at the destination of a move.

use std::collections::VecDeque;
use std::sync::Arc;

use semper_block::{Absorbed, Engine, Image, Io, Op, Prepared, Submission};
use semper_device::{Bus, Route};
use semper_ring::GuestMemory;

use crate::data::Range;
use crate::spec::Status;

/// Requests on their way at a time; a driver that has more waits.
pub const IN_FLIGHT_MOST: usize = 128;

/// A request of the namespace. The caller has checked that its range is inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The queue that its command came from.
    pub queue: u16,
    /// The command's number.
    pub id: u16,
    /// What to do.
    pub op: Op,
    /// First byte of the image, and how many.
    pub range: (u64, u64),
    /// Where its data is in the guest's memory: as many bytes, for reads and writes.
    pub data: Vec<Range>,
    /// Further ranges of the image, for which the same is done afterwards.
    pub more: VecDeque<(u64, u64)>,
    /// Done only when it would survive a power cut, which for this operation a flush has to see to.
    pub stable: bool,
    /// Where its command stands in the journal.
    pub slot: Option<u16>,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// As in the job.
    pub queue: u16,
    /// The same.
    pub id: u16,
    /// The same.
    pub op: Op,
    /// Bytes of its data.
    pub len: u64,
    /// How it ended.
    pub status: Status,
    /// As in the job.
    pub slot: Option<u16>,
}

/// What holds the namespace's data, whatever engine does its I/O.
pub trait Storage: Send {
    /// Bytes of a block.
    fn block_size(&self) -> u32;

    /// Bytes of all blocks.
    fn capacity(&self) -> u64;

    /// Whether it must not be written.
    fn is_read_only(&self) -> bool;

    /// Begins a request; its end comes by [`Storage::advance`], perhaps at once.
    fn begin(&mut self, job: Job, bus: &mut dyn Bus);

    /// Hands on what was begun, and appends what has ended. Never waits.
    fn advance(&mut self, bus: &mut dyn Bus, ended: &mut Vec<Ended>);

    /// Requests that have not been told of as ended.
    fn in_flight(&self) -> usize;

    /// Whether requests of this queue have not been told of as ended.
    fn is_busy_for(&self, queue: u16) -> bool;

    /// Waits until everything that was written is on stable storage: at a shutdown.
    fn settle(&mut self);

    /// Whether a flush has failed: all further ones fail.
    fn has_lost(&self) -> bool;

    /// A flush has failed in the process before this one.
    fn lose(&mut self);
}

/// Memory with the alignment that direct I/O wants.
#[derive(Clone, Copy)]
#[repr(align(4096))]
struct Block {
    _bytes: [u8; BLOCK],
}
const BLOCK: usize = 4096;

struct InFlight {
    job: Job,
    /// Where it is must not change while the engine has it.
    io: Box<Io>,
    /// Keeps mapped what the segments name.
    _memory: Arc<GuestMemory>,
    /// Stands in for the guest's memory.
    buffer: Option<Vec<Block>>,
    /// It keeps others from the blocks of the storage that it writes.
    entered: bool,
    /// What was written is on its way to the medium.
    flushing: bool,
}

/// An image and an engine.
pub struct Store<E> {
    image: Arc<Image>,
    engine: E,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Others write to the same blocks of the storage.
    held: VecDeque<usize>,
    /// Over, and not told yet.
    over: Vec<(usize, Status)>,
    results: Vec<(u64, i32)>,
    /// A flush has failed: the kernel tells once that data was lost, and we tell every flush.
    lost: bool,
}

// SAFETY: the segments of requests lead into guest memory and buffers, which stay where they are when
// the store moves; an engine is used by the one thread that has the store.
unsafe impl<E> Send for Store<E> {}

impl<E: Engine> Store<E> {
    /// On this image, which is locked before the first request.
    pub fn new(image: Arc<Image>, engine: E) -> Self {
        let slots = (0..IN_FLIGHT_MOST).map(|_| None).collect();
        let free = (0..IN_FLIGHT_MOST).rev().collect();
        let (held, over, results) = (VecDeque::new(), Vec::new(), Vec::new());
        Self { image, engine, slots, free, held, over, results, lost: false }
    }

    /// Begins the first range of a job.
    fn start(&mut self, index: usize, bus: &dyn Bus) {
        let Some(slot) = &mut self.slots[index] else { return };
        let InFlight { job, io, buffer, .. } = slot;
        io.reset(job.op);
        (io.offset, io.len) = job.range;
        let mut reachable = true;
        match job.op {
            Op::Read if bus.route() == Route::Mediated => {
                let blocks = (job.range.1 as usize).div_ceil(BLOCK);
                let memory = buffer.insert(vec![Block { _bytes: [0; BLOCK] }; blocks]);
                let iov_base = memory.as_mut_ptr().cast();
                io.iov.push(libc::iovec { iov_base, iov_len: job.range.1 as usize });
            }
            Op::Read | Op::Write { .. } => {
                for &(address, len) in &job.data {
                    reachable &= bus.memory().for_each_slice(address, len, |start, len| {
                        io.iov.push(libc::iovec { iov_base: start.cast(), iov_len: len });
                    });
                }
            }
            Op::Flush | Op::Discard | Op::WriteZeroes { .. } => {}
        }
        match reachable {
            true => self.prepare(index),
            false => self.over.push((index, Status::TRANSFER)),
        }
    }

    fn prepare(&mut self, index: usize) {
        let Some(slot) = &mut self.slots[index] else { return };
        match slot.io.prepare(&self.image, false) {
            Prepared::Ready => self.enter(index),
            Prepared::Nothing => self.go_on(index),
            Prepared::TooLarge => self.over.push((index, Status::INTERNAL)),
        }
    }

    fn enter(&mut self, index: usize) {
        let Some(slot) = &mut self.slots[index] else { return };
        let (offset, len) = slot.job.range;
        let op = if slot.flushing { Op::Flush } else { slot.job.op };
        slot.entered = self.image.try_enter(op, offset, len);
        match slot.entered {
            true => self.submit(index),
            false => self.held.push_back(index),
        }
    }

    fn submit(&mut self, index: usize) {
        while let Some(slot) = &self.slots[index] {
            // SAFETY: the request is in a box, its segments name memory that the slot keeps, and the
            // slot stays until its token was reaped.
            match unsafe { self.engine.submit(index as u64, &slot.io) } {
                Submission::Queued => return,
                Submission::Done(result) if self.absorb(index, result) => {}
                Submission::Done(_) => return,
            }
        }
    }

    /// Takes a result; whether the request is to be submitted again.
    fn absorb(&mut self, index: usize, result: i32) -> bool {
        let Some(slot) = &mut self.slots[index] else { return false };
        match slot.io.absorb(result, &self.image) {
            Absorbed::More => return true,
            Absorbed::Finished => self.go_on(index),
            Absorbed::Failed(errno) => {
                self.lost |= slot.io.tells_of_loss(errno);
                let status = match (slot.job.op, errno) {
                    (_, libc::ENOSPC | libc::EDQUOT) => Status::CAPACITY,
                    (Op::Read, _) => Status::READ_ERROR,
                    _ => Status::WRITE_FAULT,
                };
                let ((offset, len), op) = (slot.job.range, slot.job.op.name());
                log::warn!("a request failed op={op} offset={offset} len={len} errno={errno}");
                self.leave(index);
                self.over.push((index, status));
            }
        }
        false
    }

    /// One range is done: the next one, or the end.
    fn go_on(&mut self, index: usize) {
        self.leave(index);
        let Some(slot) = &mut self.slots[index] else { return };
        if let Some(range) = slot.job.more.pop_front() {
            slot.job.range = range;
            slot.io.reset(slot.job.op);
            (slot.io.offset, slot.io.len) = range;
            return self.prepare(index);
        }
        if std::mem::take(&mut slot.job.stable) {
            slot.io.reset(Op::Flush);
            (slot.io.offset, slot.io.len) = (0, 0);
            slot.flushing = true;
            return self.prepare(index);
        }
        let failed = (slot.flushing || slot.job.op == Op::Flush) && self.lost;
        self.over.push((index, if failed { Status::WRITE_FAULT } else { Status::OK }));
    }

    fn leave(&mut self, index: usize) {
        let Some(slot) = &mut self.slots[index] else { return };
        if std::mem::take(&mut slot.entered) {
            let op = if slot.flushing { Op::Flush } else { slot.job.op };
            self.image.leave(op, slot.job.range.0, slot.job.range.1);
        }
    }

    fn tell(&mut self, index: usize, status: Status, bus: &mut dyn Bus) -> Option<Ended> {
        let InFlight { job, buffer, .. } = self.slots[index].take()?;
        self.free.push(index);
        let reads = job.op == Op::Read && status == Status::OK;
        let status = if reads { hand_on(&job.data, buffer.as_deref(), bus) } else { status };
        let len = job.data.iter().map(|(_, len)| len).sum();
        Some(Ended { queue: job.queue, id: job.id, op: job.op, len, status, slot: job.slot })
    }
}

/// Has the bus take what a read has brought, or know of it.
fn hand_on(data: &[Range], buffer: Option<&[Block]>, bus: &mut dyn Bus) -> Status {
    let Some(blocks) = buffer else {
        data.iter().for_each(|&(address, len)| bus.wrote(address, len));
        return Status::OK;
    };
    // SAFETY: blocks are bytes without gaps: their size is their alignment.
    let bytes =
        unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast::<u8>(), blocks.len() * BLOCK) };
    let mut at = 0;
    for &(address, len) in data {
        let Some(part) = bytes.get(at..at + len as usize) else { return Status::INTERNAL };
        if bus.write(address, part).is_err() {
            return Status::TRANSFER;
        }
        at += part.len();
    }
    Status::OK
}

impl<E: Engine> Storage for Store<E> {
    fn block_size(&self) -> u32 {
        self.image.block_size()
    }

    fn capacity(&self) -> u64 {
        let size = self.image.capacity();
        size - size % u64::from(self.image.block_size())
    }

    fn is_read_only(&self) -> bool {
        self.image.read_only()
    }

    fn begin(&mut self, job: Job, bus: &mut dyn Bus) {
        let Some(index) = self.free.pop() else {
            debug_assert!(false, "the caller looks at in_flight before");
            return;
        };
        let memory = Arc::clone(bus.memory());
        let (io, buffer) = (Box::default(), None);
        let slot = InFlight { job, io, _memory: memory, buffer, entered: false, flushing: false };
        self.slots[index] = Some(slot);
        self.start(index, bus);
    }

    fn advance(&mut self, bus: &mut dyn Bus, ended: &mut Vec<Ended>) {
        for _ in 0..self.held.len() {
            let Some(index) = self.held.pop_front() else { break };
            self.enter(index);
        }
        if let Err(error) = self.engine.flush() {
            log::warn!("the engine of the image takes no requests for now error=\"{error}\"");
        }
        let mut results = std::mem::take(&mut self.results);
        self.engine.reap(&mut results);
        for (token, result) in results.drain(..) {
            let index = token as usize;
            if self.absorb(index, result) {
                self.submit(index);
            }
        }
        self.results = results;
        for (index, status) in std::mem::take(&mut self.over) {
            ended.extend(self.tell(index, status, bus));
        }
    }

    fn in_flight(&self) -> usize {
        IN_FLIGHT_MOST - self.free.len()
    }

    fn is_busy_for(&self, queue: u16) -> bool {
        self.slots.iter().flatten().any(|slot| slot.job.queue == queue)
    }

    fn settle(&mut self) {
        if self.image.read_only() {
            return;
        }
        if let Err(error) = self.image.file().sync_data() {
            log::error!("the image was not flushed at the shutdown error=\"{error}\"");
            self.lost = true;
        }
    }

    fn has_lost(&self) -> bool {
        self.lost
    }

    fn lose(&mut self) {
        self.lost = true;
    }
}

impl<E> Drop for Store<E> {
    fn drop(&mut self) {
        // The kernel may still write to what the slots keep.
        if self.slots.iter().any(Option::is_some) {
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}
