//! Which memory the function reaches, and at which address: the guest's, at the guest's addresses.
//!
//! The kernel gives a map back only as a whole. So memory is mapped in pieces of [`PIECE`] bytes: where a
//! queue is to lie in other memory for a moment ([`crate::nvme`]), one piece goes and comes back, not all.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use semper_device::PAGE;
use semper_ring::GuestMemory;

use crate::kernel;

/// Bytes of a piece, and what a piece's address is a multiple of. The kernel takes 65,535 pieces: 1 TiB.
pub const PIECE: u64 = 16 << 20;

/// Address, bytes and where they are in this process.
type Pieces = BTreeMap<u64, (u64, usize)>;

/// A container with an IOMMU.
#[derive(Debug)]
pub struct Iommu {
    container: File,
    mapped: Pieces,
}

/// A range as pieces.
fn cut(address: u64, len: u64, host: usize) -> Pieces {
    let mut pieces = Pieces::new();
    let mut done = 0;
    while done < len {
        let here = address + done;
        let most = PIECE - here % PIECE;
        let size = most.min(len - done);
        pieces.insert(here, (size, host + done as usize));
        done += size;
    }
    pieces
}

fn pieces(memory: &GuestMemory) -> Pieces {
    let whole = memory.mapped().filter(|(spec, host, _)| {
        spec.guest_addr % PAGE == 0 && spec.size % PAGE == 0 && host.addr() as u64 % PAGE == 0
    });
    whole.flat_map(|(spec, host, _)| cut(spec.guest_addr, spec.size, host.addr())).collect()
}

impl Iommu {
    /// Of a container that has been told to use its IOMMU.
    pub fn new(container: File) -> Self {
        Self { container, mapped: Pieces::new() }
    }

    /// From now on the function reaches this memory and no other.
    ///
    /// # Errors
    /// The kernel's; a part of the memory is not reached then, and nothing else is.
    pub fn follow(&mut self, memory: &GuestMemory) -> io::Result<()> {
        self.follow_but(memory, &[])
    }

    /// The same, but for the pieces that these ranges, address and bytes, touch.
    ///
    /// # Errors
    /// As [`Iommu::follow`].
    pub fn follow_but(&mut self, memory: &GuestMemory, ranges: &[(u64, u64)]) -> io::Result<()> {
        let mut wanted = pieces(memory);
        wanted.retain(|address, (len, _)| {
            !ranges.iter().any(|(start, size)| *address < start + size && *start < address + *len)
        });
        let gone: Vec<_> = self
            .mapped
            .iter()
            .filter(|(address, piece)| wanted.get(address) != Some(piece))
            .map(|(address, (len, _))| (*address, *len))
            .collect();
        for (address, len) in gone {
            kernel::unmap(&self.container, address, len)?;
            self.mapped.remove(&address);
        }
        for (address, piece) in wanted {
            if self.mapped.contains_key(&address) {
                continue;
            }
            // SAFETY: the memory is mapped as long as the table that it is from, and the kernel keeps
            // its pages beyond that; it is a guest's, which expects that its device writes there.
            unsafe { kernel::map(&self.container, address, piece.0, piece.1) }?;
            self.mapped.insert(address, piece);
        }
        Ok(())
    }

    /// Has the function reach memory of ours, beside the guest's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn lend(&self, own: &Own) -> io::Result<()> {
        // SAFETY: `Own` is mapped while it lives, and is accessed by volatile reads and writes alone.
        unsafe { kernel::map(&self.container, own.address, own.len, own.base.addr()) }
    }

    /// Takes that back.
    ///
    /// # Errors
    /// The kernel's; the function still reaches it.
    pub fn take_back(&self, own: &Own) -> io::Result<()> {
        kernel::unmap(&self.container, own.address, own.len)
    }
}

/// Memory of ours that a function reaches at `address`, zeros in the beginning.
#[derive(Debug)]
pub struct Own {
    /// Where the function sees it.
    pub address: u64,
    /// Bytes, whole pages.
    pub len: u64,
    base: *mut u8,
}

// SAFETY: the pointer leads into a mapping that lives as long as the value, and is accessed by volatile
// accesses within it.
unsafe impl Send for Own {}

impl Own {
    /// So many bytes, for a function that will see them at `address`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(address: u64, len: u64) -> io::Result<Self> {
        let len = len.next_multiple_of(PAGE);
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), len as usize, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address, len, base: base.cast() })
    }

    fn place<T>(&self, at: u64) -> *mut T {
        assert!(at % size_of::<T>() as u64 == 0 && at + size_of::<T>() as u64 <= self.len);
        // SAFETY: within the mapping.
        unsafe { self.base.add(at as usize).cast() }
    }

    /// A word.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn word(&self, at: u64) -> u32 {
        // SAFETY: `place` has checked it.
        u32::from_le(unsafe { self.place::<u32>(at).read_volatile() })
    }

    /// Writes words.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn put(&self, at: u64, words: &[u32]) {
        for (index, word) in words.iter().enumerate() {
            // SAFETY: `place` has checked it.
            unsafe { self.place::<u32>(at + 4 * index as u64).write_volatile(word.to_le()) };
        }
    }

    /// Bytes.
    ///
    /// # Panics
    /// Beyond the end, or where they are no whole words.
    pub fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        (0..len / 4).flat_map(|index| self.word(at + 4 * index).to_le_bytes()).collect()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; nobody keeps a reference beyond its life.
        unsafe { libc::munmap(self.base.cast(), self.len as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_where_pieces_begin() {
        let pieces = cut(PIECE - PAGE, PIECE + 3 * PAGE, 0x1000);
        let found: Vec<_> = pieces.into_iter().collect();
        assert_eq!(
            found,
            [
                (PIECE - PAGE, (PAGE, 0x1000)),
                (PIECE, (PIECE, 0x2000)),
                (2 * PIECE, (2 * PAGE, 0x2000 + PIECE as usize)),
            ]
        );
    }

    #[test]
    fn memory_of_our_own_is_zero_and_holds_words() {
        let own = Own::new(0x1000, 100).unwrap();
        assert_eq!((own.len, own.word(4092)), (PAGE, 0));
        own.put(8, &[1, 0x0203]);
        assert_eq!(own.bytes(8, 8), [1, 0, 0, 0, 3, 2, 0, 0]);
    }
}
