//! A guest that submits a list of requests and holds the device to its word.

use std::hash::{Hash, Hasher};

use crate::driver::{Buffer, DriverRing, Layout};
use crate::history::{History, MAX_BLOCKS, Request, Verb};

const MAX_HEADS: usize = 8;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const HEADER_SIZE: usize = 16;
const TABLE_SIZE: usize = 3 * 16;
const STATUS_UNTOUCHED: u8 = 0xff;
const DATA_UNTOUCHED: u8 = 0xee;
const NOBODY: u8 = u8::MAX;

/// How the blocks of the model's disk look on the wire (the header is virtio-blk's).
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Bytes of one block in a data buffer; all of them have the block's value.
    pub block_bytes: usize,
    /// Sector number in the header for each block that a request may start at.
    pub sectors: [u64; MAX_BLOCKS],
}

/// How the guest learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// It looks all the time.
    Polls,
    /// It sleeps until an interrupt; with `event_idx` it says for which completion it wants one.
    Interrupts {
        /// VIRTIO_F_EVENT_IDX was negotiated.
        event_idx: bool,
    },
}

/// What no device may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misbehaviour {
    /// A used element names a chain that the device did not have ("is not a head!").
    NotAHead(u32),
    /// More was used than the device had.
    UsedIndex(u16),
    /// The status byte of a completed request is not "done".
    Status {
        /// Which request.
        request: usize,
        /// Its status byte.
        status: u8,
    },
    /// The number of bytes written is wrong.
    Written {
        /// Which request.
        request: usize,
        /// What the used element says.
        written: u32,
    },
    /// The bytes of one block differ from each other.
    Torn {
        /// Which request.
        request: usize,
    },
}

/// The guest. A copy of it, together with a copy of its memory, is a snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    memory: *mut u8,
    guest_addr: u64,
    ring: DriverRing,
    format: Format,
    wakeup: Wakeup,
    /// Whether the head that became free last is used first, as Linux does.
    last_freed_first: bool,
    next: usize,
    free: [u16; MAX_HEADS],
    free_len: usize,
    owner: [u8; MAX_HEADS],
    avail_idx: u16,
    last_used: u16,
    history: History,
}

impl Guest {
    /// Bytes of memory that a guest needs.
    pub fn memory_needed(size: u16, format: Format) -> usize {
        Self::chunk_at(Layout::packed(0, size), format, size)
    }

    fn chunk_at(layout: Layout, format: Format, head: u16) -> usize {
        let chunk = TABLE_SIZE + HEADER_SIZE + format.block_bytes * MAX_BLOCKS + 1;
        layout.end.next_multiple_of(16) + usize::from(head) * chunk.next_multiple_of(16)
    }

    /// A guest in zeroed memory at `memory`, which it calls `guest_addr`, with a queue of `size` at
    /// its start. The ring's indices start at `idx`.
    ///
    /// # Safety
    /// `memory` must be 16-aligned and valid for reads and writes of [`Guest::memory_needed`] bytes
    /// for as long as the value or a copy is used.
    ///
    /// # Panics
    /// When `size` is more than 8.
    pub unsafe fn new(
        memory: *mut u8,
        guest_addr: u64,
        size: u16,
        idx: u16,
        program: &[Request],
        (format, wakeup, last_freed_first): (Format, Wakeup, bool),
    ) -> Self {
        assert!(usize::from(size) <= MAX_HEADS);
        // SAFETY: the caller's promise.
        let ring = unsafe { DriverRing::new(memory, Layout::packed(0, size)) };
        ring.set_avail_idx(idx);
        ring.set_used_idx(idx);
        ring.set_used_event(idx);
        let mut free = [0; MAX_HEADS];
        (0..size).for_each(|head| free[usize::from(head)] = head);
        Self {
            memory,
            guest_addr,
            ring,
            format,
            wakeup,
            last_freed_first,
            next: 0,
            free,
            free_len: usize::from(size),
            owner: [NOBODY; MAX_HEADS],
            avail_idx: idx,
            last_used: idx,
            history: History::new(program),
        }
    }

    /// The ring.
    pub fn ring(&self) -> &DriverRing {
        &self.ring
    }

    /// What happened so far.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Whether there is a request to submit and a descriptor for it.
    pub fn can_submit(&self) -> bool {
        self.next < self.history.requests().len() && self.free_len > 0
    }

    /// Submits the next request; true if the device wants to be kicked for it.
    pub fn submit(&mut self) -> bool {
        let index = self.next;
        self.next += 1;
        let at = if self.last_freed_first { self.free_len - 1 } else { 0 };
        let head = self.free[at];
        self.free.copy_within(at + 1..self.free_len, at);
        self.free_len -= 1;
        self.owner[usize::from(head)] = index as u8;
        self.write_request(head, index);
        self.ring.write_avail(self.avail_idx, head);
        let old = self.avail_idx;
        self.avail_idx = old.wrapping_add(1);
        self.ring.set_avail_idx(self.avail_idx);
        self.history.submit(index);
        let event_idx = self.wakeup == Wakeup::Interrupts { event_idx: true };
        self.ring.needs_kick(old, self.avail_idx, event_idx)
    }

    fn write_request(&self, head: u16, index: usize) {
        let request = self.history.requests()[index];
        let (kind, fill) = match request.verb {
            Verb::Read => (T_IN, DATA_UNTOUCHED),
            Verb::Write(value) => (T_OUT, value),
        };
        let chunk = Self::chunk_at(self.ring.layout(), self.format, head);
        let (header, data) = (chunk + TABLE_SIZE, chunk + TABLE_SIZE + HEADER_SIZE);
        let len = self.format.block_bytes * request.count;
        let mut bytes = [0; HEADER_SIZE];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&self.format.sectors[request.first].to_le_bytes());
        let addr = |offset: usize| self.guest_addr + offset as u64;
        let buffers = [
            Buffer { addr: addr(header), len: HEADER_SIZE as u32, writable: false },
            Buffer { addr: addr(data), len: len as u32, writable: kind == T_IN },
            Buffer { addr: addr(self.status_at(head)), len: 1, writable: true },
        ];
        // SAFETY: everything is inside the chunk of this head, which is inside the memory.
        unsafe {
            self.memory.add(header).cast::<[u8; HEADER_SIZE]>().write(bytes);
            self.memory.add(data).write_bytes(fill, len);
            self.memory.add(self.status_at(head)).write(STATUS_UNTOUCHED);
            self.ring.write_indirect(head, chunk, addr(chunk), &buffers);
        }
    }

    fn status_at(&self, head: u16) -> usize {
        let chunk = Self::chunk_at(self.ring.layout(), self.format, head);
        chunk + TABLE_SIZE + HEADER_SIZE + self.format.block_bytes * MAX_BLOCKS
    }

    /// Whether the guest polls.
    pub fn polls(&self) -> bool {
        self.wakeup == Wakeup::Polls
    }

    /// Looks at the used ring; gives the number of requests that are newly completed.
    ///
    /// # Errors
    /// [`Misbehaviour`].
    pub fn observe(&mut self) -> Result<usize, Misbehaviour> {
        let used = self.ring.used_idx();
        let news = used.wrapping_sub(self.last_used);
        if news > self.avail_idx.wrapping_sub(self.last_used) {
            return Err(Misbehaviour::UsedIndex(used));
        }
        for _ in 0..news {
            let (id, written) = self.ring.used_element(self.last_used);
            self.last_used = self.last_used.wrapping_add(1);
            self.take_back(id, written)?;
        }
        Ok(usize::from(news))
    }

    /// An interrupt: looks at the used ring, asks for the next interrupt, and looks again.
    ///
    /// # Errors
    /// [`Misbehaviour`].
    pub fn interrupt(&mut self) -> Result<usize, Misbehaviour> {
        let mut news = 0;
        loop {
            news += self.observe()?;
            self.ring.set_used_event(self.last_used);
            if self.ring.used_idx() == self.last_used {
                return Ok(news);
            }
        }
    }

    fn take_back(&mut self, id: u32, written: u32) -> Result<(), Misbehaviour> {
        let head = usize::try_from(id).unwrap_or(usize::MAX);
        let owner = self.owner.get_mut(head).filter(|owner| **owner != NOBODY);
        let owner = owner.ok_or(Misbehaviour::NotAHead(id))?;
        let request = usize::from(std::mem::replace(owner, NOBODY));
        let Request { verb, count, .. } = self.history.requests()[request];
        let chunk = Self::chunk_at(self.ring.layout(), self.format, head as u16);
        let data = chunk + TABLE_SIZE + HEADER_SIZE;
        let len = if verb == Verb::Read { self.format.block_bytes * count } else { 0 };
        if written as usize != len + 1 {
            return Err(Misbehaviour::Written { request, written });
        }
        // SAFETY: the chunk of this head is inside the memory.
        let (status, bytes) = unsafe {
            let status = self.memory.add(self.status_at(head as u16)).read();
            (status, std::slice::from_raw_parts(self.memory.add(data), len))
        };
        if status != 0 {
            return Err(Misbehaviour::Status { request, status });
        }
        let mut values = [0; MAX_BLOCKS];
        for (value, block) in values.iter_mut().zip(bytes.chunks(self.format.block_bytes)) {
            *value = block[0];
            if block.iter().any(|byte| byte != value) {
                return Err(Misbehaviour::Torn { request });
            }
        }
        self.history.complete(request, &values[..if len > 0 { count } else { 0 }]);
        // Nothing of a finished request stays, so that states that differ only in it are the same.
        // SAFETY: as above.
        unsafe {
            self.memory.add(chunk).write_bytes(0, self.status_at(head as u16) + 1 - chunk);
        }
        self.free[self.free_len] = head as u16;
        self.free_len += 1;
        Ok(())
    }

    /// Feeds everything that decides the guest's future into `state`; its memory is not included.
    pub fn fingerprint(&self, state: &mut impl Hasher) {
        self.next.hash(state);
        self.free[..self.free_len].hash(state);
        self.owner.hash(state);
        self.avail_idx.hash(state);
        self.last_used.hash(state);
        self.history.hash(state);
    }
}
