//! The page of registers that a guest writes without anybody being told: shared memory that QEMU
//! maps into the guest. What is written there by another way, trapped or captured, is put there as
//! well, so a device looks at this page and nowhere else.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::PAGE;

/// Registers of 4 bytes on a page.
pub const WORDS: usize = PAGE as usize / 4;

/// A file in memory as large as the BAR, of which one page is mapped here.
#[derive(Debug)]
pub struct Page {
    file: File,
    words: *const AtomicU32,
    /// Of each register: somebody has told us of its last value, which the guest did not write here.
    told: Vec<AtomicBool>,
}

// SAFETY: the pointer leads into a mapping that lives as long as the page; it is accessed by atomics.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// The page at `offset`, a multiple of the page's size, of a file of `size` bytes.
    ///
    /// # Errors
    /// The system's.
    pub fn new(size: u64, offset: u64) -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a string; the result is checked and then owned.
        let fd = unsafe { libc::memfd_create(c"registers".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // Who has it could otherwise cut it off, and each access here would be a SIGBUS.
        // SAFETY: no memory is passed.
        if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Self::of(file, offset)
    }

    /// The page at `offset` of a file that another process has made by [`Page::new`].
    ///
    /// # Errors
    /// The system's; `InvalidData` for a file that is too short, or could be cut off.
    pub fn of(file: File, offset: u64) -> io::Result<Self> {
        let fd = file.as_raw_fd();
        // SAFETY: no memory is passed.
        let seals = unsafe { libc::fcntl(fd, libc::F_GET_SEALS) };
        if seals & libc::F_SEAL_SHRINK == 0 || file.metadata()?.len() < offset + PAGE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let at = offset as libc::off_t;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let mapped = unsafe {
            libc::mmap(std::ptr::null_mut(), PAGE as usize, protection, libc::MAP_SHARED, fd, at)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let told = (0..WORDS).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { file, words: mapped.cast(), told })
    }

    fn word(&self, index: usize) -> &AtomicU32 {
        assert!(index < WORDS, "register {index} of a page of {WORDS}");
        // SAFETY: the index is inside the mapped page, which is aligned for words.
        unsafe { &*self.words.add(index) }
    }

    /// A register, by its number on the page. What the guest wrote before is visible after it.
    ///
    /// # Panics
    /// When there is no such register.
    pub fn load(&self, index: usize) -> u32 {
        u32::from_le(self.word(index).load(Ordering::Acquire))
    }

    /// Writes a register.
    ///
    /// # Panics
    /// When there is no such register.
    pub fn store(&self, index: usize, value: u32) {
        self.word(index).store(value.to_le(), Ordering::Release);
    }

    /// Writes a register for a guest whose write came by another way.
    ///
    /// # Panics
    /// When there is no such register.
    pub fn tell(&self, index: usize, value: u32) {
        self.told[index].store(true, Ordering::Relaxed);
        self.store(index, value);
    }

    /// Whether a register was written by [`Page::tell`] since this was asked.
    ///
    /// # Panics
    /// When there is no such register.
    pub fn take_told(&self, index: usize) -> bool {
        self.told[index].swap(false, Ordering::Relaxed)
    }

    /// Makes all registers 0.
    pub fn clear(&self) {
        (0..WORDS).for_each(|index| self.store(index, 0));
    }

    /// The file, for who maps it.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; nobody keeps a reference beyond the page's life.
        unsafe { libc::munmap(self.words.cast_mut().cast(), PAGE as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_somebody_else_writes_to_the_file_is_seen() {
        let page = Page::new(0x4000, 0x1000).unwrap();
        page.file.write_all_at(&7u32.to_le_bytes(), 0x1008).unwrap();
        assert_eq!((page.load(2), page.load(3)), (7, 0));
        page.store(3, 9);
        let mut read = [0; 4];
        page.file.read_exact_at(&mut read, 0x100c).unwrap();
        assert_eq!(u32::from_le_bytes(read), 9);
        page.tell(2, 8);
        assert_eq!((page.load(2), page.take_told(2), page.take_told(2)), (8, true, false));
        page.clear();
        assert_eq!((page.load(2), page.load(3)), (0, 0));
    }

    #[test]
    fn nobody_who_has_the_file_can_cut_it_off() {
        let page = Page::new(0x4000, 0x1000).unwrap();
        assert!(page.file.set_len(0).is_err());
    }
}
