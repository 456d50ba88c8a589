//! The memory that requests read into and write from, shared with the backend.

use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// One memfd, mapped once and filled, cut into buffers of equal size.
pub struct Memory {
    file: OwnedFd,
    map: MmapRaw,
    size: usize,
}

impl Memory {
    /// Maps `count` buffers of `size` bytes and fills them, so that no page is missing later.
    pub fn new(count: usize, size: usize) -> io::Result<Self> {
        let file = memfd_create("semper-load", MemfdFlags::CLOEXEC)?;
        let length = count.checked_mul(size).ok_or(io::ErrorKind::OutOfMemory)?;
        ftruncate(&file, length as u64)?;
        let map = MmapRaw::map_raw(&file)?;
        let memory = Self { file, map, size };
        for index in 0..count {
            // SAFETY: nobody else knows the memory yet.
            let buffer = unsafe { std::slice::from_raw_parts_mut(memory.buffer(index), size) };
            for (at, byte) in buffer.iter_mut().enumerate() {
                *byte = (at as u8).wrapping_mul(31).wrapping_add(index as u8) | 1;
            }
        }
        Ok(memory)
    }

    /// The address of the whole, to be registered with the backend.
    pub fn address(&self) -> usize {
        self.map.as_mut_ptr() as usize
    }

    /// The length of the whole.
    pub fn length(&self) -> usize {
        self.map.len()
    }

    /// The memfd behind it.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The first byte of buffer `index`.
    ///
    /// # Panics
    /// There is no such buffer.
    pub fn buffer(&self, index: usize) -> *mut u8 {
        assert!((index + 1) * self.size <= self.map.len());
        // SAFETY: the offset lies inside the mapping.
        unsafe { self.map.as_mut_ptr().add(index * self.size) }
    }
}
