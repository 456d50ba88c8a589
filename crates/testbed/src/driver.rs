//! The driver's end of a split virtqueue (VIRTIO 1.2, 2.7), written from the specification and
//! without a line of the device's code.

use std::sync::atomic::{AtomicU16, Ordering, fence};

/// Where the parts of a queue stand, as offsets from the start of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Entries of the queue; a power of two.
    pub size: u16,
    /// Descriptor table.
    pub desc: usize,
    /// Available ring.
    pub avail: usize,
    /// Used ring.
    pub used: usize,
    /// First byte behind the queue.
    pub end: usize,
}

impl Layout {
    /// A queue of `size` entries that starts at `offset`, packed as tightly as the alignments of
    /// the specification allow.
    pub const fn packed(offset: usize, size: u16) -> Self {
        let entries = size as usize;
        let desc = offset.next_multiple_of(16);
        let avail = desc + 16 * entries;
        let used = (avail + 6 + 2 * entries).next_multiple_of(4);
        Self { size, desc, avail, used, end: used + 6 + 8 * entries }
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// Raw access to a queue in memory. It keeps no state: every index is the caller's or memory's.
#[derive(Clone, Copy, Debug)]
pub struct DriverRing {
    memory: *mut u8,
    layout: Layout,
}

// SAFETY: a pointer and numbers; all shared words are accessed atomically or volatile.
unsafe impl Send for DriverRing {}

impl DriverRing {
    /// The queue at `layout` in the memory at `memory`.
    ///
    /// # Safety
    /// `memory` must be 16-aligned and valid for reads and writes of `layout.end` bytes for as
    /// long as the value (or a copy) is used.
    pub unsafe fn new(memory: *mut u8, layout: Layout) -> Self {
        assert!(memory.addr() % 16 == 0 && layout.size.is_power_of_two());
        Self { memory, layout }
    }

    /// Where the queue is.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Zeroes descriptor table and both rings.
    ///
    /// # Safety
    /// No device may be using the queue.
    pub unsafe fn clear(&self) {
        let Layout { desc, end, .. } = self.layout;
        // SAFETY: inside the queue, which nobody uses.
        unsafe { self.memory.add(desc).write_bytes(0, end - desc) };
    }

    /// Writes one descriptor as it is, sensible or not.
    pub fn write_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.layout.desc + 16 * usize::from(index % self.layout.size);
        self.write_descriptor_at(at, addr, len, flags, next);
    }

    /// Writes a chain of `buffers` into the descriptors `indices` (as many as there are buffers).
    pub fn write_chain(&self, indices: &[u16], buffers: &[Buffer]) {
        assert_eq!(indices.len(), buffers.len());
        for (i, buffer) in buffers.iter().enumerate() {
            let next = indices.get(i + 1).copied();
            let flags = u16::from(next.is_some()) * F_NEXT + u16::from(buffer.writable) * F_WRITE;
            self.write_descriptor(indices[i], buffer.addr, buffer.len, flags, next.unwrap_or(0));
        }
    }

    /// Writes a chain of `buffers` as an indirect table at `offset` of the memory, which has the
    /// guest address `table_addr`, and makes the descriptor `head` lead to it.
    ///
    /// # Safety
    /// The memory must have room for the table at `offset`.
    pub unsafe fn write_indirect(
        &self,
        head: u16,
        offset: usize,
        table_addr: u64,
        buffers: &[Buffer],
    ) {
        for (i, buffer) in buffers.iter().enumerate() {
            let more = i + 1 < buffers.len();
            let flags = u16::from(more) * F_NEXT + u16::from(buffer.writable) * F_WRITE;
            let next = if more { i as u16 + 1 } else { 0 };
            self.write_descriptor_at(offset + 16 * i, buffer.addr, buffer.len, flags, next);
        }
        self.write_descriptor(head, table_addr, 16 * buffers.len() as u32, F_INDIRECT, 0);
    }

    fn write_descriptor_at(&self, at: usize, addr: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0u8; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        // SAFETY: inside the queue (`write_descriptor`) or vouched for (`write_indirect`).
        unsafe { self.memory.add(at).cast::<[u8; 16]>().write_volatile(raw) };
    }

    /// Puts `head` into the available ring at the free-running index `idx`; not yet visible.
    pub fn write_avail(&self, idx: u16, head: u16) {
        let slot = usize::from(idx & (self.layout.size - 1));
        self.word(self.layout.avail + 4 + 2 * slot).store(head, Ordering::Relaxed);
    }

    /// The driver's available index as it stands in memory.
    pub fn avail_idx(&self) -> u16 {
        self.word(self.layout.avail + 2).load(Ordering::Relaxed)
    }

    /// Shows everything up to `idx` to the device.
    pub fn set_avail_idx(&self, idx: u16) {
        self.word(self.layout.avail + 2).store(idx, Ordering::Release);
    }

    /// Sets the available ring's flags (1 = no interrupts).
    pub fn set_avail_flags(&self, flags: u16) {
        self.word(self.layout.avail).store(flags, Ordering::Relaxed);
    }

    /// Asks for an interrupt as soon as `used.idx` passes `idx` (EVENT_IDX).
    pub fn set_used_event(&self, idx: u16) {
        let at = self.layout.avail + 4 + 2 * usize::from(self.layout.size);
        self.word(at).store(idx, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The device's used index.
    pub fn used_idx(&self) -> u16 {
        self.word(self.layout.used + 2).load(Ordering::Acquire)
    }

    /// Sets the used index, as only the set-up of a test (or a hostile driver) does.
    pub fn set_used_idx(&self, idx: u16) {
        self.word(self.layout.used + 2).store(idx, Ordering::Release);
    }

    /// The used element (head, bytes written) at the free-running index `idx`.
    pub fn used_element(&self, idx: u16) -> (u32, u32) {
        let slot = usize::from(idx & (self.layout.size - 1));
        // SAFETY: inside the queue; unaligned, because the used ring is only 4-aligned.
        let raw = unsafe {
            self.memory.add(self.layout.used + 4 + 8 * slot).cast::<u64>().read_unaligned()
        };
        (raw as u32, (raw >> 32) as u32)
    }

    /// Whether the device wants a kick, now that the available index went from `old` to `new`.
    pub fn needs_kick(&self, old: u16, new: u16, event_idx: bool) -> bool {
        fence(Ordering::SeqCst);
        if event_idx {
            let at = self.layout.used + 4 + 8 * usize::from(self.layout.size);
            let event = self.word(at).load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.word(self.layout.used).load(Ordering::Relaxed) & 1 == 0
        }
    }

    fn word(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at % 2 == 0 && at + 2 <= self.layout.end);
        // SAFETY: inside the queue and even; the promise of `new`.
        unsafe { AtomicU16::from_ptr(self.memory.add(at).cast()) }
    }
}
