//! Dirty logging: telling the front end which pages of the guest the device has written, so that
//! it can migrate the guest while the device works.
//!
//! One bit for each 4 KiB page of guest-physical memory, in memory that the front end shares
//! (vhost-user.rst, "Migration"; VHOST_USER_PROTOCOL_F_LOG_SHMFD). The front end takes bits away
//! while we set others, so each is set atomically, and **after** the write that it tells of:
//! before it, the page could be sent and the bit taken in between. Whoever dies between write and
//! bit has the request still in flight, and the next process writes and logs again; the used ring,
//! which is not, is logged whole when a queue starts.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use semper_ring::{GuestMemory, MemoryError, RegionSpec};

const PAGE_SHIFT: u32 = 12;

/// The front end's bitmap, mapped: memory that somebody shares, like the guest's.
pub(crate) struct DirtyBitmap(GuestMemory);

impl DirtyBitmap {
    /// Maps `size` bytes from `offset` in `file`.
    ///
    /// # Errors
    /// A file that is shorter than that, an empty range, and the kernel's.
    pub(crate) fn map(file: &File, offset: u64, size: u64) -> Result<Self, MemoryError> {
        let spec = RegionSpec { guest_addr: 0, size, user_addr: 0, file_offset: offset };
        GuestMemory::empty().with_region(spec, file).map(Self)
    }

    fn set(&self, page: u64) {
        // Memory that the log does not cover is not migrated.
        let Some(byte) = self.0.translate(page / 8, 1) else { return };
        // SAFETY: inside the mapping, which lives as long as `self`; a byte is always aligned.
        let bits = unsafe { AtomicU8::from_ptr(byte) };
        // Never "unless it is set": what was just written may become visible after such a look, and
        // the front end takes the bit and reads the page in between.
        bits.fetch_or(1 << (page % 8), Ordering::SeqCst);
    }
}

/// What one queue logs, and where.
#[derive(Clone)]
pub(crate) struct DirtyLog {
    pub bitmap: Arc<DirtyBitmap>,
    pub memory: Arc<GuestMemory>,
    /// Guest-physical address of the used ring, if writes to it are to be logged.
    pub used: Option<u64>,
}

impl DirtyLog {
    /// The device has written `len` bytes at this guest-physical address.
    pub(crate) fn wrote(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = addr.saturating_add(len - 1) >> PAGE_SHIFT;
        (addr >> PAGE_SHIFT..=last).for_each(|page| self.bitmap.set(page));
    }

    /// The device has written `len` bytes here.
    pub(crate) fn wrote_at(&self, ptr: *const u8, len: usize) {
        if let Some(addr) = self.memory.guest_address(ptr) {
            self.wrote(addr, len as u64);
        }
    }

    /// The device has written into the used ring of a queue of this size.
    pub(crate) fn wrote_used(&self, size: u16) {
        if let Some(used) = self.used {
            self.wrote(used, 6 + 8 * u64::from(size));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_bits_and_what_is_outside_is_nobodys() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096 + 3).unwrap();
        assert!(DirtyBitmap::map(&file, 4096, 4).is_err());
        assert!(DirtyBitmap::map(&file, u64::MAX, 4).is_err());
        assert!(DirtyBitmap::map(&file, 0, 0).is_err());
        assert!(DirtyBitmap::map(&file, 0, u64::MAX).is_err());
        let bitmap = Arc::new(DirtyBitmap::map(&file, 4000, 99).unwrap());
        let memory = Arc::new(GuestMemory::empty());
        let log = DirtyLog { bitmap, memory, used: Some(0x9000) };
        log.wrote(0x1fff, 2);
        log.wrote(0x5000, 0);
        log.wrote(u64::MAX - 1, 100);
        log.wrote(99 * 8 * 4096 - 1, 2);
        log.wrote_used(256);
        let mut bytes = vec![0; 4099];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert!(bytes[..4000].iter().all(|byte| *byte == 0));
        assert_eq!((bytes[4000], bytes[4001], bytes[4098]), (0b110, 0b10, 0x80));
        assert_eq!(bytes[4000..].iter().map(|byte| byte.count_ones()).sum::<u32>(), 4);
    }
}
