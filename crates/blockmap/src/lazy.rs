//! Large arrays of atomics that cost memory only where they were written.
//!
//! Anonymous memory, not reserved: a page of it that nobody has written is the kernel's zero page.
//! A page of `PROT_NONE` behind each array keeps the kernel from joining it with a neighbour, so
//! that [`resident`] can find out what it really takes.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU64;

use crate::PAGE_SIZE;

/// Types of which all-zero bytes are a value, and which any thread may change.
///
/// # Safety
/// Both must be true of the type.
pub(crate) unsafe trait Zeroable: Sync {}

// SAFETY: an atomic integer.
unsafe impl Zeroable for AtomicU64 {}

/// `len` values, zero at first.
#[derive(Debug)]
pub(crate) struct Lazy<T> {
    base: *mut T,
    len: usize,
    mapped: usize,
}

// SAFETY: owns its mapping, and the values are shared only as `&T`, which is Sync.
unsafe impl<T: Zeroable + Send> Send for Lazy<T> {}
// SAFETY: as above.
unsafe impl<T: Zeroable> Sync for Lazy<T> {}

fn whole_pages<T>(len: usize) -> io::Result<usize> {
    len.max(1)
        .checked_mul(size_of::<T>())
        .and_then(|bytes| bytes.checked_next_multiple_of(PAGE_SIZE))
        .filter(|bytes| *bytes < usize::MAX / 4)
        .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

fn checked(base: *mut libc::c_void) -> io::Result<*mut libc::c_void> {
    if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(base) }
}

impl<T: Zeroable> Lazy<T> {
    /// # Errors
    /// The kernel's, when it has no address space left.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let bytes = whole_pages::<T>(len)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = checked(unsafe {
            libc::mmap(std::ptr::null_mut(), bytes + PAGE_SIZE, libc::PROT_NONE, flags, -1, 0)
        })?;
        let array = Self { base: base.cast(), len, mapped: bytes + PAGE_SIZE };
        // SAFETY: the range is ours. Huge pages would make the first write cost 2 MiB; without the
        // advice it is merely larger.
        let status = unsafe {
            libc::madvise(base, bytes, libc::MADV_NOHUGEPAGE);
            libc::mprotect(base, bytes, libc::PROT_READ | libc::PROT_WRITE)
        };
        if status != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(array)
    }

    /// The values that begin at byte `offset` (whole pages) of a file, shared with every process
    /// that maps it. The file must hold them all, allocated: a store must not find the disk full.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn of_file(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let bytes = whole_pages::<T>(len)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: as in `new`.
        let base = checked(unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        })?;
        Ok(Self { base: base.cast(), len, mapped: bytes })
    }

    /// Bytes of memory that it takes now.
    pub(crate) fn resident(&self) -> u64 {
        let start = self.base.addr();
        resident(start, start + self.mapped).unwrap_or(0)
    }
}

impl<T> Deref for Lazy<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping holds `len` values, zero or written through atomics.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }
}

impl<T> Drop for Lazy<T> {
    fn drop(&mut self) {
        // SAFETY: what `new` or `of_file` mapped; nobody borrows it any more.
        unsafe { libc::munmap(self.base.cast(), self.mapped) };
    }
}

/// Memory in use between two addresses, from `/proc/self/smaps`. Not `mincore`, which counts pages
/// that were only read.
fn resident(start: usize, end: usize) -> io::Result<u64> {
    let mut inside = false;
    let mut bytes = 0;
    for line in BufReader::new(File::open("/proc/self/smaps")?).lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((low, high)) = first.split_once('-') {
            let address = |text| usize::from_str_radix(text, 16);
            inside = match (address(low), address(high)) {
                (Ok(low), Ok(high)) => low >= start && high <= end,
                _ => inside,
            };
        } else if inside && first == "Rss:" {
            bytes += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn only_what_was_written_takes_memory() {
        let array = Lazy::<AtomicU64>::new(1 << 27).unwrap();
        let sum: u64 = array.iter().step_by(512 << 10).map(|v| v.load(Ordering::Relaxed)).sum();
        assert_eq!((sum, array.resident()), (0, 0));
        array[(1 << 27) - 1].store(7, Ordering::Relaxed);
        array[0].store(7, Ordering::Relaxed);
        assert_eq!(array.resident(), 8192);
    }

    #[test]
    fn an_impossible_size_is_refused() {
        assert!(Lazy::<AtomicU64>::new(usize::MAX / 2).is_err());
    }
}
