//! Descriptor chains: walking them without believing them.

use crate::memory::GuestMemory;

/// Most descriptors that one chain may have, indirect tables included.
///
/// The specification bounds a chain by the queue size, but Linux drivers size indirect tables by
/// `seg_max` instead; `IOV_MAX` is the real bound of what one system call can carry.
pub const MAX_CHAIN_DESCRIPTORS: u32 = 1024;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const DESC_SIZE: u64 = 16;

/// One piece of a guest's buffer, in host memory.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// First byte. Valid for `len` bytes as long as the memory table lives; the guest may change
    /// the bytes at any instant.
    pub ptr: *mut u8,
    /// Length in bytes; never 0.
    pub len: usize,
    /// Whether the device writes here (and may not read), or the other way round.
    pub writable: bool,
}

/// What a guest did wrong in a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor names a successor outside its table.
    #[error("descriptor index {0} is outside the table")]
    Index(u16),
    /// More than [`MAX_CHAIN_DESCRIPTORS`], or a loop.
    #[error("the chain is longer than {MAX_CHAIN_DESCRIPTORS} descriptors, or loops")]
    TooLong,
    /// A buffer is not in guest memory.
    #[error("the buffer at {addr:#x} of {len} bytes is not guest memory")]
    Buffer {
        /// Guest-physical address.
        addr: u64,
        /// Bytes.
        len: u32,
        /// Whether it is the chain's last buffer. If not, the walk went on to the end.
        last: bool,
    },
    /// An indirect table that is nested, empty, ragged, out of memory, or chained.
    #[error("the indirect table is malformed")]
    Indirect,
    /// A buffer for the device to read follows one for it to write (VIRTIO 1.2, 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
}

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Reads a descriptor once.
///
/// # Safety
/// `table` must be valid for reads of `16 * (index + 1)` bytes.
unsafe fn read_descriptor(table: *const u8, index: u16) -> Descriptor {
    // SAFETY: the caller vouches for the range. An unaligned copy, because an indirect table may
    // stand at any address; a torn read by a racing guest gives some descriptor, and every field
    // of it is checked after this one read.
    let raw: [u8; 16] =
        unsafe { std::ptr::read_volatile(table.add(usize::from(index) * 16).cast()) };
    let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
    Descriptor {
        addr: u64::from_le_bytes([raw[0], raw[1], raw[2], raw[3], raw[4], raw[5], raw[6], raw[7]]),
        len: u32::from_le_bytes([raw[8], raw[9], raw[10], raw[11]]),
        flags: word(12),
        next: word(14),
    }
}

/// Walks the chain at `head` and hands its segments to `each`, readable ones first.
///
/// Empty buffers are skipped. When an error is returned, `each` may have been called already. A
/// buffer that is not guest memory does not end the walk, so that whoever knows where in a chain
/// its status stands can still report the error; after any other error what was gathered is void.
///
/// # Safety
/// `table` must be valid for reads of `16 * size` bytes, and `head` must be below `size`.
pub(crate) unsafe fn walk(
    memory: &GuestMemory,
    table: *const u8,
    size: u16,
    head: u16,
    mut each: impl FnMut(Segment),
) -> Result<(), ChainError> {
    let (mut table, mut size, mut index) = (table, size, head);
    let mut indirect = false;
    let mut seen_writable = false;
    let mut count = 0;
    let mut unmapped = None;
    loop {
        count += 1;
        if count > MAX_CHAIN_DESCRIPTORS {
            return Err(ChainError::TooLong);
        }
        // SAFETY: index < size at every turn (the caller's promise, or the check below), and the
        // table has that many entries (the caller's promise, or the translation below).
        let desc = unsafe { read_descriptor(table, index) };
        if desc.flags & F_INDIRECT != 0 {
            let entries = u64::from(desc.len) / DESC_SIZE;
            if indirect
                || desc.flags & F_NEXT != 0
                || entries == 0
                || u64::from(desc.len) % DESC_SIZE != 0
            {
                return Err(ChainError::Indirect);
            }
            // Entries past 65535 cannot be named by a 16-bit index.
            table = memory.translate(desc.addr, u64::from(desc.len)).ok_or(ChainError::Indirect)?;
            size = entries.min(u64::from(u16::MAX)) as u16;
            index = 0;
            indirect = true;
            continue;
        }
        let writable = desc.flags & F_WRITE != 0;
        if seen_writable && !writable {
            return Err(ChainError::Order);
        }
        seen_writable |= writable;
        let mapped = memory.for_each_slice(desc.addr, u64::from(desc.len), |ptr, len| {
            each(Segment { ptr, len, writable });
        });
        let last = desc.flags & F_NEXT == 0;
        if !mapped {
            unmapped = Some(ChainError::Buffer { addr: desc.addr, len: desc.len, last });
        }
        if last {
            return unmapped.map_or(Ok(()), Err);
        }
        if desc.next >= size {
            return Err(ChainError::Index(desc.next));
        }
        index = desc.next;
    }
}
