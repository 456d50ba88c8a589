//! One split virtqueue, seen from the device.
//!
//! ```text
//!   desc[size]   16 bytes each: addr u64, len u32, flags u16, next u16
//!   avail        flags u16, idx u16, ring[size] u16, used_event u16
//!   used         flags u16, idx u16, ring[size] {id u32, len u32}, avail_event u16
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use crate::chain::{self, ChainError, Segment};
use crate::memory::GuestMemory;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;
const RING_OFFSET: usize = 4;

/// Where the three parts of a queue stand, in the front end's address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring (the driver writes it).
    pub avail: u64,
    /// Used ring (the device writes it).
    pub used: u64,
}

/// Why a queue cannot be set up, or can no longer be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Not a power of two between 1 and 32768.
    #[error("queue size {0} is not a power of two from 1 to 32768")]
    Size(u32),
    /// A part of the ring is not guest memory, or is not aligned as VIRTIO 1.2, 2.7 demands.
    #[error("the {part} at {addr:#x} is not aligned guest memory")]
    Address {
        /// Which part.
        part: &'static str,
        /// Its address as given.
        addr: u64,
    },
    /// The driver claims more available buffers than the queue has room for.
    #[error("the available index jumped from {last} to {idx} in a queue of {size}")]
    AvailIndex {
        /// What the device had consumed.
        last: u16,
        /// What the driver wrote.
        idx: u16,
        /// Queue size.
        size: u16,
    },
    /// The available ring names a chain that the device has not given back yet.
    #[error("the available ring names descriptor {head}, which is in flight already")]
    Busy {
        /// What the driver wrote.
        head: u16,
    },
    /// The available ring names a descriptor outside the table.
    #[error("the available ring names descriptor {head} in a queue of {size}")]
    Head {
        /// What the driver wrote.
        head: u16,
        /// Queue size.
        size: u16,
    },
}

/// The device's end of one split virtqueue.
///
/// Not `Sync`: exactly one thread owns a queue. It never panics on what the guest writes.
pub struct SplitQueue {
    memory: Arc<GuestMemory>,
    desc: *const u8,
    avail: *const u8,
    used: *mut u8,
    size: u16,
    event_idx: bool,
    /// Next entry of the available ring that the device will take.
    last_avail: u16,
    /// The driver's `avail.idx` as last read; saves reading a contended cache line for each entry.
    avail_seen: u16,
    /// `used.idx` as last published.
    used_idx: u16,
    /// Elements written behind `used_idx` and not published yet.
    staged: u16,
    /// `used_idx` when the driver was last considered for a notification.
    signalled: u16,
    notify_always: bool,
}

/// How far the driver of a queue has come, for another thread than the one that serves it.
pub struct AvailWatch {
    _memory: Arc<GuestMemory>,
    avail: *const AtomicU16,
}

// SAFETY: the pointer leads into the memory, which this keeps alive, and all that is done with it is
// an atomic load.
unsafe impl Send for AvailWatch {}

impl AvailWatch {
    /// The driver's `avail.idx` (free-running), to be held against [`SplitQueue::last_avail`].
    pub fn index(&self) -> u16 {
        // SAFETY: it points to an aligned u16 in memory that is mapped as long as this lives.
        unsafe { &*self.avail }.load(Ordering::Acquire)
    }
}

impl std::fmt::Debug for AvailWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AvailWatch").finish_non_exhaustive()
    }
}

// SAFETY: the raw pointers lead into `memory`, which the queue keeps alive; a queue may move to
// another thread, and is used by one at a time.
unsafe impl Send for SplitQueue {}

impl SplitQueue {
    /// Resolves `addresses` in `memory`. Takes up at `used.idx` with nothing in flight; see
    /// [`SplitQueue::resume_at`].
    ///
    /// # Errors
    /// [`RingError::Size`] and [`RingError::Address`].
    pub fn new(
        memory: Arc<GuestMemory>,
        addresses: RingAddresses,
        size: u32,
        event_idx: bool,
    ) -> Result<Self, RingError> {
        if !size.is_power_of_two() || size > 32768 {
            return Err(RingError::Size(size));
        }
        let entries = u64::from(size);
        let find = |part, addr: u64, len: u64, align: usize| {
            memory
                .translate_user(addr, len)
                .filter(|ptr| ptr.addr() % align == 0)
                .ok_or(RingError::Address { part, addr })
        };
        let desc = find("descriptor table", addresses.desc, 16 * entries, 16)?;
        let avail = find("available ring", addresses.avail, 6 + 2 * entries, 2)?;
        let used = find("used ring", addresses.used, 6 + 8 * entries, 4)?;
        let mut queue = Self {
            memory,
            desc,
            avail,
            used,
            size: size as u16,
            event_idx,
            last_avail: 0,
            avail_seen: 0,
            used_idx: 0,
            staged: 0,
            signalled: 0,
            notify_always: true,
        };
        queue.resume_at(queue.published_used_idx(), 0);
        Ok(queue)
    }

    /// Sets the device's indices: `used_idx` as it stands in the ring, and the next available
    /// entry `in_flight` further on. The first notification after this is never suppressed,
    /// because nobody knows what the driver has been told.
    pub fn resume_at(&mut self, used_idx: u16, in_flight: u16) {
        self.used_idx = used_idx;
        self.signalled = used_idx;
        self.last_avail = used_idx.wrapping_add(in_flight);
        self.avail_seen = self.last_avail;
        self.staged = 0;
        self.notify_always = true;
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest memory that the queue's buffers are in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Next available entry that the device will take (free-running).
    pub fn last_avail(&self) -> u16 {
        self.last_avail
    }

    /// `used.idx` as this end last published it. The driver may not write that word, but nothing
    /// stops a hostile one; the device's own arithmetic uses this copy.
    pub fn used_idx(&self) -> u16 {
        self.used_idx
    }

    /// `used.idx` as it stands in guest memory.
    pub fn published_used_idx(&self) -> u16 {
        self.atomic(self.used, 2).load(Ordering::Acquire)
    }

    /// Takes the head of the next available chain.
    ///
    /// # Errors
    /// [`RingError::AvailIndex`] and [`RingError::Head`]: the ring makes no sense any more, and
    /// nothing can be completed on it; the queue must stop until the driver resets it.
    #[inline]
    pub fn pop_head(&mut self) -> Result<Option<u16>, RingError> {
        if self.last_avail == self.avail_seen {
            self.avail_seen = self.atomic(self.avail, 2).load(Ordering::Acquire);
            if self.last_avail == self.avail_seen {
                return Ok(None);
            }
            if self.avail_seen.wrapping_sub(self.last_avail) > self.size {
                let error = RingError::AvailIndex {
                    last: self.last_avail,
                    idx: self.avail_seen,
                    size: self.size,
                };
                self.avail_seen = self.last_avail;
                return Err(error);
            }
        }
        let slot = usize::from(self.last_avail & (self.size - 1));
        let head = self.atomic(self.avail, RING_OFFSET + 2 * slot).load(Ordering::Relaxed);
        if head >= self.size {
            return Err(RingError::Head { head, size: self.size });
        }
        self.last_avail = self.last_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Whether the driver has made anything available that was not taken.
    #[inline]
    pub fn has_available(&self) -> bool {
        self.last_avail != self.atomic(self.avail, 2).load(Ordering::Acquire)
    }

    /// Lets another thread see how far the driver is.
    pub fn watch(&self) -> AvailWatch {
        let avail = std::ptr::from_ref(self.atomic(self.avail, 2));
        AvailWatch { _memory: Arc::clone(&self.memory), avail }
    }

    /// Hands the segments of the chain at `head` to `each`, readable ones first.
    ///
    /// # Errors
    /// [`ChainError`]; what `each` was given until then is to be discarded.
    #[inline]
    pub fn walk(&self, head: u16, each: impl FnMut(Segment)) -> Result<(), ChainError> {
        if head >= self.size {
            return Err(ChainError::Index(head));
        }
        // SAFETY: `new` checked that the table has `size` entries; head is below size.
        unsafe { chain::walk(&self.memory, self.desc, self.size, head, each) }
    }

    /// Writes a used element for `head` behind those staged before; the driver does not see it
    /// until [`SplitQueue::publish_used`]. `written` is in bytes.
    #[inline]
    pub fn stage_used(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.used_idx.wrapping_add(self.staged) & (self.size - 1));
        let element = (u64::from(written) << 32) | u64::from(head);
        // SAFETY: `new` checked `size` elements of 8 bytes from offset 4; slot is below size. The
        // used ring is only 4-aligned, hence the unaligned store. It is ordered before the index
        // by the release store in `publish_used`.
        unsafe {
            std::ptr::write_unaligned(self.used.add(RING_OFFSET + 8 * slot).cast(), element);
        }
        self.staged = self.staged.wrapping_add(1);
    }

    /// Elements staged and not published.
    pub fn staged(&self) -> u16 {
        self.staged
    }

    /// Shows all staged elements to the driver, by one store of `used.idx`.
    #[inline]
    pub fn publish_used(&mut self) {
        self.used_idx = self.used_idx.wrapping_add(self.staged);
        self.staged = 0;
        self.atomic(self.used, 2).store(self.used_idx, Ordering::Release);
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        let old = std::mem::replace(&mut self.signalled, self.used_idx);
        let new = self.used_idx;
        if std::mem::replace(&mut self.notify_always, false) {
            return true;
        }
        if old == new {
            return false;
        }
        // The index must be visible before the driver's wish is read; otherwise both sides could
        // miss each other and the request would hang.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = RING_OFFSET + 2 * usize::from(self.size);
            let event = self.atomic(self.avail, at).load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.atomic(self.avail, 0).load(Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver for a kick, then looks again: true if something is already there, in which
    /// case the caller goes on working instead of sleeping.
    #[inline]
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            let at = RING_OFFSET + 8 * usize::from(self.size);
            self.atomic(self.used, at).store(self.last_avail, Ordering::Relaxed);
        } else {
            self.atomic(self.used, 0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Tells the driver that kicks are not needed while the device is busy. With EVENT_IDX this
    /// costs nothing: the event index simply stays behind.
    #[inline]
    pub fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.atomic(self.used, 0).store(USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    #[inline]
    fn atomic(&self, base: *const u8, offset: usize) -> &AtomicU16 {
        // SAFETY: `new` checked alignment and length of all three parts, and every offset used in
        // this file is inside them; the memory lives as long as `self.memory`. Atomics are the
        // one kind of reference to shared memory that a racing writer does not break.
        unsafe { AtomicU16::from_ptr(base.add(offset).cast::<u16>().cast_mut()) }
    }
}
