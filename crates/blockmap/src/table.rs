//! One region's associations: a direct-mapped array, one entry of 16 bytes for each guest page.
//!
//! ```text
//!   word 0   sector + 1; 0 = nothing is known
//!   word 1   stamp << 22 | check, the check being a hash of the sector
//! ```
//!
//! Two plain stores write an entry. Two threads may write the same one at once (a guest may let two
//! requests use one page), and a reader may come between: the check tells a mixture from an entry.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::lazy::{Lazy, Zeroable};

const CHECK_BITS: u32 = 22;
const CHECK: u64 = (1 << CHECK_BITS) - 1;

#[derive(Debug, Default)]
#[repr(C, align(16))]
struct Entry {
    sector: AtomicU64,
    stamp: AtomicU64,
}

// SAFETY: two atomic integers.
unsafe impl Zeroable for Entry {}

/// What an entry says: the page was filled from, or written to, the eight sectors from `sector`
/// when their stamp was `stamp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub sector: u64,
    pub stamp: u64,
}

#[derive(Debug)]
pub(crate) struct PageTable {
    entries: Lazy<Entry>,
}

#[inline]
fn check(sector: u64) -> u64 {
    sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - CHECK_BITS)
}

impl PageTable {
    pub(crate) fn new(pages: usize) -> io::Result<Self> {
        Ok(Self { entries: Lazy::new(pages)? })
    }

    pub(crate) fn pages(&self) -> usize {
        self.entries.len()
    }

    #[inline]
    pub(crate) fn store(&self, page: usize, sector: u64, stamp: u64) {
        let Some(entry) = self.entries.get(page) else { return };
        entry.sector.store(sector + 1, Ordering::Relaxed);
        entry.stamp.store(stamp << CHECK_BITS | check(sector), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn clear(&self, page: usize) {
        let Some(entry) = self.entries.get(page) else { return };
        // A page that has no entry takes no memory.
        if entry.sector.load(Ordering::Relaxed) != 0 {
            entry.sector.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn load(&self, page: usize) -> Option<Stored> {
        let entry = self.entries.get(page)?;
        let stamp = entry.stamp.load(Ordering::Relaxed);
        let sector = entry.sector.load(Ordering::Relaxed).checked_sub(1)?;
        (stamp & CHECK == check(sector)).then_some(Stored { sector, stamp: stamp >> CHECK_BITS })
    }

    pub(crate) fn resident(&self) -> u64 {
        self.entries.resident()
    }
}

/// A stamp as an entry keeps it.
pub(crate) fn kept(stamp: u64) -> u64 {
    stamp << CHECK_BITS >> CHECK_BITS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_of_two_entries_is_none() {
        let table = PageTable::new(4).unwrap();
        table.store(1, 800, 7);
        assert_eq!(table.load(1), Some(Stored { sector: 800, stamp: 7 }));
        let torn = table.entries[1].stamp.load(Ordering::Relaxed);
        table.store(1, 808, 9);
        table.entries[1].stamp.store(torn, Ordering::Relaxed);
        assert_eq!(table.load(1), None);
        table.clear(1);
        assert_eq!((table.load(0), table.load(1), table.load(4)), (None, None, None));
    }
}
