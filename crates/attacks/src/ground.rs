//! The memory in which attacks take place, and the guest's hand that writes it.
//!
//! ```text
//!   guest address   0x1000 ─ R0 ─ 0x9000 ─ R1 ─ 0x11000   hole   0x20000 ─ R2 ─ 0x27ef0
//!   host            three mappings of one file; R2 starts inside a page
//! ```
//!
//! The queue stands at the start of R0.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use semper_ring::{GuestMemory, RegionSpec, RingAddresses, Segment, SplitQueue};
use semper_testbed::{DriverRing, Layout};

use crate::bytes::Bytes;

pub(crate) const R0: u64 = 0x1000;
pub(crate) const R1: u64 = 0x9000;
pub(crate) const R2: u64 = 0x20000;
pub(crate) const FIRST_LEN: u64 = 0x8000;
pub(crate) const LAST_LEN: u64 = 0x7ef0;
pub(crate) const USER_OFFSET: u64 = 0x7000_0000_0000;
/// Bytes of R0 that belong to the largest queue; indirect tables and buffers come after it.
pub(crate) const QUEUE_SPACE: u64 = 0x1000;
/// Largest queue.
pub(crate) const MAX_SIZE: u16 = 64;

/// File offset and address of each region.
const REGIONS: [(u64, u64, u64); 3] =
    [(R0, FIRST_LEN, 0), (R1, FIRST_LEN, 0x8000), (R2, LAST_LEN, 0x10010)];
const FILE_LEN: u64 = 0x18000;

/// A memory file, and what a vhost-user memory table says of it.
pub(crate) fn memory_file() -> File {
    // SAFETY: the name is a C string; the result is checked and then owned.
    let file = unsafe {
        let fd = libc::memfd_create(c"ground".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(FILE_LEN).expect("room for guest memory");
    file
}

/// The regions as a memory table has them.
pub(crate) fn specs() -> [RegionSpec; 3] {
    REGIONS.map(|(guest_addr, size, file_offset)| RegionSpec {
        guest_addr,
        size,
        user_addr: guest_addr + USER_OFFSET,
        file_offset,
    })
}

/// Guest memory with one queue.
pub(crate) struct Ground {
    /// The memory as the device has it.
    pub memory: Arc<GuestMemory>,
    file: File,
    hosts: [*mut u8; 3],
}

impl Ground {
    pub(crate) fn new() -> Self {
        let file = memory_file();
        let memory =
            specs().iter().try_fold(GuestMemory::empty(), |m, spec| m.with_region(*spec, &file));
        let memory = Arc::new(memory.expect("three regions"));
        let hosts = REGIONS.map(|(addr, len, _)| memory.translate(addr, len).expect("a region"));
        Self { memory, file, hosts }
    }

    /// Zeroes all of it.
    pub(crate) fn clear(&self) {
        for ((_, len, _), host) in REGIONS.iter().zip(self.hosts) {
            // SAFETY: the mapping of the region; nobody else uses it now.
            unsafe { host.write_bytes(0, *len as usize) };
        }
    }

    /// The file behind it.
    pub(crate) fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// The driver's end of the queue.
    pub(crate) fn ring(&self, size: u16) -> DriverRing {
        let layout = Layout::packed(0, size);
        assert!(layout.end as u64 <= QUEUE_SPACE);
        // SAFETY: page-aligned, and the layout is inside R0.
        unsafe { DriverRing::new(self.hosts[0], layout) }
    }

    /// Where the queue is, in the front end's addresses.
    pub(crate) fn addresses(size: u16) -> RingAddresses {
        let layout = Layout::packed(0, size);
        let at = |offset: usize| R0 + USER_OFFSET + offset as u64;
        RingAddresses { desc: at(layout.desc), avail: at(layout.avail), used: at(layout.used) }
    }

    /// The device's end of the queue.
    pub(crate) fn queue(&self, size: u16, event_idx: bool) -> SplitQueue {
        let addresses = Self::addresses(size);
        SplitQueue::new(Arc::clone(&self.memory), addresses, u32::from(size), event_idx)
            .expect("a queue in memory")
    }

    /// Panics unless the segment is guest memory, all of it, and not empty.
    pub(crate) fn check(&self, segment: &Segment) {
        let start = segment.ptr.addr();
        let inside = REGIONS.iter().zip(self.hosts).any(|((_, len, _), host)| {
            let base = host.addr();
            start >= base && start + segment.len <= base + *len as usize
        });
        assert!(inside && segment.len > 0, "{segment:?} is not guest memory");
    }

    /// Writes bytes at an offset of R0.
    pub(crate) fn poke(&self, offset: u64, bytes: &[u8]) {
        let offset = offset % (FIRST_LEN - bytes.len() as u64);
        // SAFETY: inside R0.
        unsafe { self.hosts[0].add(offset as usize).copy_from(bytes.as_ptr(), bytes.len()) };
    }
}

/// An address that a hostile guest would choose: mostly near something.
pub(crate) fn address(bytes: &mut Bytes<'_>) -> u64 {
    let kind = bytes.u8();
    let near = match kind % 10 {
        0 => R0,
        1 | 2 => R0 + QUEUE_SPACE,
        3 => R1,
        4 => R1 + FIRST_LEN,
        5 => R2,
        6 => R2 + LAST_LEN,
        7 => 0,
        8 => return bytes.u64(),
        _ => u64::MAX,
    };
    let by = i16::from_le_bytes(bytes.u16().to_le_bytes());
    match kind / 10 % 3 {
        0 => near.wrapping_add_signed(i64::from(by) * 16),
        1 => near.wrapping_add_signed(i64::from(by)),
        _ => near,
    }
}

/// A length that a hostile guest would choose: mostly a sensible one.
pub(crate) fn length(bytes: &mut Bytes<'_>) -> u32 {
    match bytes.u8() {
        0..=31 => 1,
        32..=95 => 16,
        96..=159 => 512,
        160..=191 => 16 * u32::from(bytes.u8()),
        192..=223 => u32::from(bytes.u16()),
        _ => bytes.u32(),
    }
}

/// What a guest writes into its ring, rightly or wrongly: one step.
pub(crate) fn guest_step(ground: &Ground, ring: &DriverRing, bytes: &mut Bytes<'_>) {
    let size = ring.layout().size;
    match bytes.u8() % 10 {
        // Descriptors, here or in an indirect table.
        0..=2 => {
            let (index, addr, len) = (bytes.u16(), address(bytes), length(bytes));
            let (flags, next) = (u16::from(bytes.u8()) % 8, u16::from(bytes.u8()) % (size + 1));
            ring.write_descriptor(index, addr, len, flags, next);
        }
        3 | 4 => {
            let (entry, addr, len) = (u64::from(bytes.u8()), address(bytes), length(bytes));
            let (flags, next) = (u16::from(bytes.u8()) % 8, u16::from(bytes.u8()));
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&addr.to_le_bytes());
            raw[8..12].copy_from_slice(&len.to_le_bytes());
            raw[12..14].copy_from_slice(&flags.to_le_bytes());
            raw[14..].copy_from_slice(&next.to_le_bytes());
            ground.poke(QUEUE_SPACE + 16 * entry, &raw);
        }
        // A head made available.
        5 | 6 => {
            let idx = ring.avail_idx();
            ring.write_avail(idx, u16::from(bytes.u8()) % (size + 2));
            ring.set_avail_idx(idx.wrapping_add(1));
        }
        7 => ring.set_avail_idx(ring.avail_idx().wrapping_add(bytes.u16())),
        8 => {
            ring.set_used_event(bytes.u16());
            ring.set_avail_flags(u16::from(bytes.u8()));
        }
        // Anything anywhere, the used ring included.
        _ => {
            let (at, len) = (bytes.u16(), usize::from(bytes.u8() % 32));
            let at = u64::from(at) % (QUEUE_SPACE * 2);
            ground.poke(at, bytes.take(len));
        }
    }
}

/// A request as drivers make them, for a disk of `disk_len` bytes, with numbers out of the input:
/// header, data and status.
pub(crate) fn sensible_request(
    ground: &Ground,
    ring: &DriverRing,
    bytes: &mut Bytes<'_>,
    disk_len: u64,
) {
    const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 2, 77];
    let size = ring.layout().size;
    let kind = KINDS[usize::from(bytes.u8() % 8)];
    let sector = match bytes.u8() % 4 {
        0 => bytes.u64(),
        1 => u64::MAX / 512 - u64::from(bytes.u8()),
        _ => u64::from(bytes.u16()) % (disk_len / 512 + 4),
    };
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let head = u16::from(bytes.u8()) % size;
    // A header and a status for each head, and data that all share.
    let header_at = QUEUE_SPACE + 32 * u64::from(head);
    let (status_at, data_at) = (header_at + 16, QUEUE_SPACE + 32 * u64::from(MAX_SIZE));
    ground.poke(header_at, &header);
    ground.poke(data_at, bytes.take(16));
    let len = match kind {
        11 | 13 => 16,
        _ => 512 * (u32::from(bytes.u8()) % 40) + u32::from(bytes.u8() % 32 == 1),
    };
    let second = (head + 1) % size;
    let third = (head + 2) % size;
    let writable = if kind == 0 || kind == 8 { 2 } else { 0 };
    ring.write_descriptor(head, R0 + header_at, 16, 1, second);
    ring.write_descriptor(second, R0 + data_at, len, 1 | writable, third);
    ring.write_descriptor(third, R0 + status_at, 1, 2, 0);
    let idx = ring.avail_idx();
    ring.write_avail(idx, head);
    ring.set_avail_idx(idx.wrapping_add(1));
}
